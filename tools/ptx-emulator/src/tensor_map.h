// Tensor maps: how a box of a tensor in global memory lies in shared memory. The 128 bytes of a CUtensorMap hold this.
#pragma once

#include <cstdint>
#include <string>

namespace ptx_emulator {

enum class Swizzle : uint8_t { kNone, k32, k64, k128 };

// Where a byte of shared memory lies once its 16-byte chunks are swizzled.
inline uint32_t swizzled(uint32_t address, Swizzle mode) {
  switch (mode) {
    case Swizzle::kNone:
      return address;
    case Swizzle::k32:
      return address ^ (address >> 3 & 0x10);
    case Swizzle::k64:
      return address ^ (address >> 3 & 0x30);
    case Swizzle::k128:
      return address ^ (address >> 3 & 0x70);
  }
  return address;
}

struct TensorMap {
  uint64_t mark;
  uint64_t address;
  uint64_t sizes[5];    // elements
  uint64_t strides[4];  // bytes, of the dimensions after the first
  uint16_t box[5];
  uint8_t steps[5];
  uint8_t rank, element;  // bytes
  uint8_t type;           // CUtensorMapDataType
  Swizzle swizzle;
  bool fill_nan;

  bool valid() const { return mark == kMark; }
  uint32_t box_bytes() const;
  // Elements of the box along a dimension.
  uint32_t extent(int dimension) const { return (uint32_t{box[dimension]} + steps[dimension] - 1) / steps[dimension]; }
  static constexpr uint64_t kMark = 0x70614d726f736e54;
};
static_assert(sizeof(TensorMap) <= 128);

// The arguments of cuTensorMapEncodeTiled.
struct TiledMap {
  int type;
  uint32_t rank;
  const void* address;
  const uint64_t *sizes, *strides;
  const uint32_t *box, *steps;
  int interleave, swizzle, promotion, fill;
};

enum class MapResult { kMade, kInvalid, kUnsupported };
// Otherwise than kMade, `problem` says which argument is wrong.
MapResult make_tensor_map(const TiledMap& given, TensorMap& map, std::string& problem);

}  // namespace ptx_emulator
