// Number formats: conversions that PTX defines and C++ does not have. Everything inline, so that lane loops vectorise.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptx_emulator {
namespace PTX_ISA {

enum class Rounding : uint8_t { kNearestEven, kNearestAway, kZero, kDown, kUp };

inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }

// 16-bit formats as types of their own, so that lane functions say what they mean.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline float widen(Half h) {
  const uint32_t shifted = static_cast<uint32_t>(h.bits & 0x7fff) << 13;
  uint32_t bits = float_to_bits(bits_to_float(shifted) * 0x1p112f);
  bits |= (h.bits & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
  return bits_to_float(bits | static_cast<uint32_t>(h.bits & 0x8000) << 16);
}
inline float widen(Bfloat h) { return bits_to_float(static_cast<uint32_t>(h.bits) << 16); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Round to nearest even; NaN becomes the canonical 0x7fff.
template <class T>
T narrow(float value);
template <>
inline Half narrow<Half>(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
  const uint32_t odd = (magnitude >> 13) & 1;
  const uint32_t normal = (magnitude + 0xc8000fff + odd) >> 13;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? 0x7c00 : result;
  result |= (bits >> 16) & 0x8000;
  return {static_cast<uint16_t>(magnitude > 0x7f800000 ? 0x7fff : result)};
}
template <>
inline Bfloat narrow<Bfloat>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded)};
}

// A small format: an exponent of `exponent_bits`, a fraction of `fraction_bits`.
struct Format {
  int exponent_bits, fraction_bits;
  bool infinity;  // without one (e4m3) the top exponent holds numbers, and NaN only at the top fraction
  constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  constexpr uint32_t infinity_bits() const { return ((1u << exponent_bits) - 1) << fraction_bits; }
  constexpr uint32_t largest() const {
    return infinity ? infinity_bits() - 1 : infinity_bits() + (1u << fraction_bits) - 2;
  }
  constexpr uint32_t nan() const { return (1u << (exponent_bits + fraction_bits)) - 1; }
  constexpr uint32_t sign() const { return 1u << (exponent_bits + fraction_bits); }
};
inline constexpr Format kHalfFormat{5, 10, true}, kBfloatFormat{8, 7, true}, kFloatFormat{8, 23, true},
    kTf32Format{8, 10, true}, kE4m3Format{4, 3, false}, kE5m2Format{5, 2, true};

inline bool rounds_up(Rounding mode, bool negative, bool odd, double fraction) {
  switch (mode) {
    case Rounding::kNearestEven:
      return fraction > 0.5 || (fraction == 0.5 && odd);
    case Rounding::kNearestAway:
      return fraction >= 0.5;
    case Rounding::kZero:
      return false;
    case Rounding::kDown:
      return negative && fraction > 0;
    case Rounding::kUp:
      return !negative && fraction > 0;
  }
  return false;
}

// The bits of `value` in `format`. `finite`: beyond the largest number stay there (NaN stays NaN).
inline uint32_t encode(double value, Format format, Rounding mode, bool finite) {
  if (std::isnan(value)) return format.nan();
  const bool negative = std::signbit(value);
  const uint32_t sign = negative ? format.sign() : 0;
  const double magnitude = std::fabs(value);
  if (magnitude == 0) return sign;
  const bool to_infinity = !finite && format.infinity;
  if (std::isinf(magnitude))
    return sign | (to_infinity ? format.infinity_bits() : format.infinity || finite ? format.largest() : format.nan());
  const int exponent = std::max(std::ilogb(magnitude), 1 - format.bias());
  const double scaled = std::ldexp(magnitude, format.fraction_bits - exponent);
  uint64_t integer = static_cast<uint64_t>(scaled);
  const bool odd = integer & 1;
  integer += rounds_up(mode, negative, odd, scaled - static_cast<double>(integer)) ? 1 : 0;
  // The hidden bit of a normal number carries into the exponent field, and so does a rounding overflow.
  const uint64_t bits = (static_cast<uint64_t>(exponent + format.bias() - 1) << format.fraction_bits) + integer;
  if (bits > format.largest()) {
    const bool away = mode == Rounding::kNearestEven || mode == Rounding::kNearestAway ||
                      (mode == Rounding::kUp && !negative) || (mode == Rounding::kDown && negative);
    return sign | (finite || !away ? format.largest() : format.infinity ? format.infinity_bits() : format.nan());
  }
  return sign | static_cast<uint32_t>(bits);
}

inline float decode(uint32_t bits, Format format) {
  const bool negative = bits & format.sign();
  const uint32_t magnitude = bits & (format.sign() - 1);
  float value;
  if (format.infinity && magnitude >= format.infinity_bits())
    value = magnitude == format.infinity_bits() ? INFINITY : std::numeric_limits<float>::quiet_NaN();
  else if (!format.infinity && magnitude == format.nan())
    value = std::numeric_limits<float>::quiet_NaN();
  else {
    const int exponent = static_cast<int>(magnitude >> format.fraction_bits);
    const int fraction = static_cast<int>(magnitude & ((1u << format.fraction_bits) - 1));
    value = exponent == 0 ? std::ldexp(static_cast<float>(fraction), 1 - format.bias() - format.fraction_bits)
                          : std::ldexp(static_cast<float>(fraction + (1 << format.fraction_bits)),
                                       exponent - format.bias() - format.fraction_bits);
  }
  return negative ? -value : value;
}

// a * b + c with one rounding, ready for a second rounding to a narrower format: the sum is rounded to odd, so no
// double rounding shows. Products of 16-bit floats are exact in a double.
inline double fma_to_odd(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b), addend = c;
  const double sum = product + addend;
  const double virtual_addend = sum - product;
  const double error = (product - (sum - virtual_addend)) + (addend - virtual_addend);
  if (!std::isfinite(sum) || !(error != 0)) return sum;
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if ((bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : ~uint64_t{0};
  return std::bit_cast<double>(bits);
}

// Rounds a double to a float that keeps the information a later rounding needs (round to odd).
inline float to_float_odd(double value) {
  float result = static_cast<float>(value);
  if (static_cast<double>(result) == value || std::isnan(value) || std::isinf(value)) return result;
  uint32_t bits = float_to_bits(result);
  // Towards zero first, then set the last bit.
  if (std::fabs(static_cast<double>(result)) > std::fabs(value)) --bits;
  return bits_to_float(bits | 1);
}

inline float flush(float x) {
  return (float_to_bits(x) & 0x7f800000) == 0 ? bits_to_float(float_to_bits(x) & 0x80000000) : x;
}
inline double flush(double x) { return x; }
inline Half flush(Half h) { return {static_cast<uint16_t>((h.bits & 0x7c00) == 0 ? h.bits & 0x8000 : h.bits)}; }
inline Bfloat flush(Bfloat h) { return {static_cast<uint16_t>((h.bits & 0x7f80) == 0 ? h.bits & 0x8000 : h.bits)}; }

}  // namespace PTX_ISA
}  // namespace ptx_emulator
