#include "tensor_map.h"

#include <cstring>

namespace ptx_emulator {

namespace {

// By CUtensorMapDataType: bytes, and whether it has NaNs.
struct MapType {
  uint8_t bytes;
  bool floating;
};
constexpr MapType kTypes[] = {{1, false}, {2, false}, {4, false}, {4, false}, {8, false}, {8, false}, {2, true},
                              {4, true},  {8, true},  {2, true},  {4, true},  {4, true},  {4, true}};
constexpr int kTypeCount = sizeof(kTypes) / sizeof(kTypes[0]);

std::string is(const std::string& name, uint64_t value, const std::string& expected) {
  return name + " is " + std::to_string(value) + ", expected " + expected;
}

}  // namespace

uint32_t TensorMap::box_bytes() const {
  uint32_t bytes = element;
  for (int d = 0; d < rank; ++d) bytes *= extent(d);
  return bytes;
}

MapResult make_tensor_map(const TiledMap& given, TensorMap& map, std::string& problem) {
  const auto invalid = [&](std::string text) { return problem = std::move(text), MapResult::kInvalid; };
  const auto unsupported = [&](std::string text) { return problem = std::move(text), MapResult::kUnsupported; };
  const auto at = [](const char* name, uint32_t k) { return std::string(name) + "[" + std::to_string(k) + "]"; };
  if (given.type < 0) return invalid("the data type is negative");
  if (given.type >= kTypeCount) return unsupported("data type " + std::to_string(given.type) + " is not supported");
  if (given.rank < 1 || given.rank > 5) return invalid(is("tensorRank", given.rank, "1 to 5"));
  if (!given.sizes || !given.box || !given.steps || (given.rank > 1 && !given.strides))
    return invalid("an array of sizes, strides, box sizes or element strides is null");
  if (given.interleave != 0) return unsupported("interleaved layouts are not supported");
  if (given.swizzle < 0 || given.swizzle > 3)
    return unsupported("swizzle mode " + std::to_string(given.swizzle) + " is not supported");
  if (given.promotion < 0 || given.promotion > 3) return invalid("the L2 promotion is unknown");
  if (given.fill < 0 || given.fill > 1 || (given.fill == 1 && !kTypes[given.type].floating))
    return invalid("oobFill asks for NaN, the data type is no floating-point type");
  const auto address = reinterpret_cast<uint64_t>(given.address);
  if (!address || address % 16) return invalid("globalAddress is not a multiple of 16");
  std::memset(static_cast<void*>(&map), 0, sizeof(map));
  map.mark = TensorMap::kMark, map.address = address;
  map.rank = static_cast<uint8_t>(given.rank), map.type = static_cast<uint8_t>(given.type);
  map.element = kTypes[given.type].bytes;
  map.swizzle = static_cast<Swizzle>(given.swizzle), map.fill_nan = given.fill == 1;
  for (uint32_t d = 0; d < given.rank; ++d) {
    if (given.sizes[d] == 0 || given.sizes[d] > uint64_t{1} << 32)
      return invalid(is(at("globalDim", d), given.sizes[d], "1 to 2^32"));
    if (d && (given.strides[d - 1] % 16 || given.strides[d - 1] >= uint64_t{1} << 40))
      return invalid(is(at("globalStrides", d - 1), given.strides[d - 1], "a multiple of 16 below 2^40"));
    if (given.box[d] == 0 || given.box[d] > 256) return invalid(is(at("boxDim", d), given.box[d], "1 to 256"));
    if (given.steps[d] == 0 || given.steps[d] > 8)
      return invalid(is(at("elementStrides", d), given.steps[d], "1 to 8"));
    map.sizes[d] = given.sizes[d];
    if (d) map.strides[d - 1] = given.strides[d - 1];
    map.box[d] = static_cast<uint16_t>(given.box[d]), map.steps[d] = static_cast<uint8_t>(given.steps[d]);
  }
  const uint32_t inner = map.extent(0) * map.element;
  if (inner % 16) return invalid(is("the box's inner dimension in bytes", inner, "a multiple of 16"));
  const uint32_t span = given.swizzle ? 16u << given.swizzle : 0;
  if (span && inner > span)
    return invalid(is("the box's inner dimension in bytes", inner, "at most the swizzle's " + std::to_string(span)));
  if (span && inner < span)
    return unsupported(is("the box's inner dimension in bytes", inner, "all of the swizzle's " + std::to_string(span)));
  return MapResult::kMade;
}

}  // namespace ptx_emulator
