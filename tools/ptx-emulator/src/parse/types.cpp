// Names and sizes of types.
#include <charconv>
#include <cmath>
#include <cstring>

#include "ptx.h"

namespace ptx_emulator {

namespace {

struct TypeInfo {
  const char* name;
  int bits;
};
constexpr TypeInfo kTypes[] = {
    {"", 0},     {"pred", 1},   {"b8", 8},      {"b16", 16},   {"b32", 32},   {"b64", 64},    {"b128", 128},
    {"u8", 8},   {"u16", 16},   {"u32", 32},    {"u64", 64},   {"s8", 8},     {"s16", 16},    {"s32", 32},
    {"s64", 64}, {"f16", 16},   {"bf16", 16},   {"f32", 32},   {"f64", 64},   {"tf32", 32},   {"e4m3", 8},
    {"e5m2", 8}, {"f16x2", 32}, {"bf16x2", 32}, {"u16x2", 32}, {"s16x2", 32}, {"e4m3x2", 16}, {"e5m2x2", 16},
    {"u4", 4},   {"s4", 4},     {"b1", 1},
};

}  // namespace

Type type_from_name(std::string_view name) {
  for (size_t i = 1; i < std::size(kTypes); ++i)
    if (name == kTypes[i].name) return static_cast<Type>(i);
  return Type::kNone;
}
const char* type_name(Type type) { return kTypes[static_cast<size_t>(type)].name; }
int type_bits(Type type) { return kTypes[static_cast<size_t>(type)].bits; }
bool is_signed(Type type) { return type >= Type::kS8 && type <= Type::kS64; }
bool is_float(Type type) { return type >= Type::kF16 && type <= Type::kE5m2; }
bool is_integer(Type type) { return type >= Type::kU8 && type <= Type::kS64; }

}  // namespace ptx_emulator
