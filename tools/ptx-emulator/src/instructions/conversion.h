// What a cvt asks for, and the conversions to packed and small formats.
#pragma once

#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {

enum class Integral : uint8_t { kNone, kNearest, kZero, kDown, kUp };

struct ConversionOptions {
  Rounding rounding = Rounding::kNearestEven;
  Integral integral = Integral::kNone;
  bool has_rounding = false, flush = false, saturate = false, finite = false, relu = false;

  // Travels to the handler as the instruction's immediate.
  int64_t pack() const {
    return static_cast<int64_t>(rounding) | static_cast<int64_t>(integral) << 4 | int64_t{flush} << 8 |
           int64_t{saturate} << 9 | int64_t{finite} << 10 | int64_t{relu} << 11;
  }
  static ConversionOptions unpack(int64_t bits) {
    ConversionOptions o;
    o.rounding = static_cast<Rounding>(bits & 15);
    o.integral = static_cast<Integral>(bits >> 4 & 15);
    o.flush = bits >> 8 & 1, o.saturate = bits >> 9 & 1, o.finite = bits >> 10 & 1, o.relu = bits >> 11 & 1;
    return o;
  }
};
[[noreturn]] inline void impossible_conversion(Decoder& d, Type to, Type from) {
  d.fail("a conversion from ." + std::string(type_name(from)) + " to ." + type_name(to) + " is not possible");
}

void convert_packed(Decoder& d, const ConversionOptions& options, Type to, Type from);  // to .f16x2, .e4m3x2 and so on
void convert_tf32(Decoder& d, const ConversionOptions& options, Type from);
void pack_saturated(Decoder& d);  // cvt.pack

}  // namespace PTX_ISA
}  // namespace ptx_emulator
