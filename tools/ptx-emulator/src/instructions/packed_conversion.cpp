// Conversions to and from packed and small floating-point formats, and cvt.pack (PTX ISA 9.7.9.21).
#include "conversion.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

// Each format is one function from floats (or from packed halves) to bits.
template <Type kTo>
uint32_t pack_two(float high, float low, ConversionOptions o) {
  if (o.relu) {
    high = high > 0 || high != high ? high : 0.0f;
    low = low > 0 || low != low ? low : 0.0f;
  }
  constexpr Format f = kTo == Type::kF16x2    ? kHalfFormat
                       : kTo == Type::kBf16x2 ? kBfloatFormat
                       : kTo == Type::kE4m3x2 ? kE4m3Format
                                              : kE5m2Format;
  constexpr int bits = f.exponent_bits + f.fraction_bits + 1;
  return encode(low, f, o.rounding, o.finite) | encode(high, f, o.rounding, o.finite) << bits;
}

template <Type kTo>
void pack_two_run(Warp& w, const Instruction& i) {
  using D = std::conditional_t<kTo == Type::kF16x2 || kTo == Type::kBf16x2, uint32_t, uint16_t>;
  const ConversionOptions o = ConversionOptions::unpack(i.immediate);
  const float *a = w.lanes<float>(i.slots[1]), *b = w.lanes<float>(i.slots[2]);
  alignas(64) D r[kLanes] = {};
  for (uint32_t m = w.active; m; m &= m - 1)
    r[first_lane(m)] = static_cast<D>(pack_two<kTo>(a[first_lane(m)], b[first_lane(m)], o));
  store_lanes(w.lanes<D>(i.slots[0]), r, w.active);
}

void halves_to_small_run(Warp& w, const Instruction& i) {
  ConversionOptions o = ConversionOptions::unpack(i.immediate & 0xffff);
  const Format f = i.immediate >> 16 ? kE5m2Format : kE4m3Format;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    const uint32_t a = w.lanes<uint32_t>(i.slots[1])[l];
    float low = widen(Half{static_cast<uint16_t>(a)}), high = widen(Half{static_cast<uint16_t>(a >> 16)});
    if (o.relu) low = low > 0 || low != low ? low : 0.0f, high = high > 0 || high != high ? high : 0.0f;
    w.lanes<uint16_t>(i.slots[0])[l] =
        static_cast<uint16_t>(encode(low, f, o.rounding, true) | encode(high, f, o.rounding, true) << 8);
  }
}

void small_to_halves_run(Warp& w, const Instruction& i) {
  const ConversionOptions o = ConversionOptions::unpack(i.immediate & 0xffff);
  const Format f = i.immediate >> 16 ? kE5m2Format : kE4m3Format;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    const uint16_t a = w.lanes<uint16_t>(i.slots[1])[l];
    float low = decode(a & 0xff, f), high = decode(a >> 8, f);
    if (o.relu) low = low > 0 || low != low ? low : 0.0f, high = high > 0 || high != high ? high : 0.0f;
    w.lanes<uint32_t>(i.slots[0])[l] = narrow<Half>(low).bits | static_cast<uint32_t>(narrow<Half>(high).bits) << 16;
  }
}

void tf32_run(Warp& w, const Instruction& i) {
  const ConversionOptions o = ConversionOptions::unpack(i.immediate);
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    float x = w.lanes<float>(i.slots[1])[l];
    if (o.relu && !(x > 0) && x == x) x = 0;
    w.lanes<uint32_t>(i.slots[0])[l] = x != x ? 0x7fffffffu : encode(x, kTf32Format, o.rounding, o.finite) << 13;
  }
}
}  // namespace

void convert_packed(Decoder& d, const ConversionOptions& o, Type to, Type from) {
  const bool small_from = from == Type::kE4m3x2 || from == Type::kE5m2x2, small_to = type_bytes(to) == 2;
  if (from == Type::kF32) {
    d.expect_operands(3, 3);
    if (!o.has_rounding) d.fail("a rounding is missing");
    if (small_to && !o.finite) d.fail(".satfinite is missing");
    const uint32_t a = d.source(1, from), b = d.source(2, from), r = d.destination(0, to);
    if (o.pack() == ConversionOptions{}.pack() && to == Type::kBf16x2)
      d.emit(map<uint32_t, float, float>([](float a, float b) {
               return static_cast<uint32_t>(narrow<Bfloat>(a).bits) << 16 | narrow<Bfloat>(b).bits;
             }),
             {r, a, b});
    else if (o.pack() == ConversionOptions{}.pack() && to == Type::kF16x2)
      d.emit(map<uint32_t, float, float>([](float a, float b) {
               return static_cast<uint32_t>(narrow<Half>(a).bits) << 16 | narrow<Half>(b).bits;
             }),
             {r, a, b});
    else
      d.emit(to == Type::kF16x2    ? pack_two_run<Type::kF16x2>
             : to == Type::kBf16x2 ? pack_two_run<Type::kBf16x2>
             : to == Type::kE4m3x2 ? pack_two_run<Type::kE4m3x2>
                                   : pack_two_run<Type::kE5m2x2>,
             {r, a, b}, o.pack());
    return;
  }
  d.expect_operands(2, 2);
  if (small_to && from == Type::kF16x2) {
    if (!o.finite) d.fail(".satfinite is missing");
    const uint32_t a = d.source(1, from);
    d.emit(halves_to_small_run, {d.destination(0, to), a}, o.pack() | int64_t{to == Type::kE5m2x2} << 16);
  } else if (to == Type::kF16x2 && small_from) {
    const uint32_t a = d.source(1, from);
    d.emit(small_to_halves_run, {d.destination(0, to), a}, o.pack() | int64_t{from == Type::kE5m2x2} << 16);
  } else {
    impossible_conversion(d, to, from);
  }
}

void convert_tf32(Decoder& d, const ConversionOptions& o, Type from) {
  if (from != Type::kF32 || !o.has_rounding) impossible_conversion(d, Type::kTf32, from);
  const uint32_t a = d.source(1, from);
  d.emit(tf32_run, {d.destination(0, Type::kB32), a}, o.pack());
}

void pack_saturated(Decoder& d) {
  // cvt.pack.sat.to.s32 d, a, b: two to a word; with c, two bytes (or nibbles) are shifted in below.
  auto& m = d.modifiers();
  if (!m.take("sat")) d.fail("cvt.pack needs .sat");
  const Type to = d.require_type();
  if (d.require_type() != Type::kS32) d.fail("cvt.pack needs .s32 sources");
  const bool wide = to == Type::kU16 || to == Type::kS16;
  if (m.take("b32") == wide) d.fail("cvt.pack: .b32 goes with the 8-bit types");
  if (!wide && to != Type::kU8 && to != Type::kS8)
    d.fail("type ." + std::string(type_name(to)) + " is not possible here");
  d.expect_operands(wide ? 3 : 4, wide ? 3 : 4);
  const uint32_t a = d.source(1, Type::kS32), b = d.source(2, Type::kS32),
                 c = wide ? d.constant(0, 4) : d.source(3, Type::kB32), r = d.destination(0, Type::kB32);
  switch (to) {
    case Type::kU16:
      d.emit(map<uint32_t, int32_t, int32_t, uint32_t>([](int32_t a, int32_t b, uint32_t) {
               return static_cast<uint32_t>(std::clamp(a, 0, 65535)) << 16 |
                      static_cast<uint32_t>(std::clamp(b, 0, 65535));
             }),
             {r, a, b, c});
      return;
    case Type::kS16:
      d.emit(map<uint32_t, int32_t, int32_t, uint32_t>([](int32_t a, int32_t b, uint32_t) {
               return static_cast<uint32_t>(std::clamp(a, -32768, 32767)) << 16 |
                      (static_cast<uint32_t>(std::clamp(b, -32768, 32767)) & 0xffff);
             }),
             {r, a, b, c});
      return;
    case Type::kU8:
      d.emit(map<uint32_t, int32_t, int32_t, uint32_t>([](int32_t a, int32_t b, uint32_t c) {
               return c << 16 | static_cast<uint32_t>(std::clamp(a, 0, 255)) << 8 |
                      static_cast<uint32_t>(std::clamp(b, 0, 255));
             }),
             {r, a, b, c});
      return;
    default:
      d.emit(map<uint32_t, int32_t, int32_t, uint32_t>([](int32_t a, int32_t b, uint32_t c) {
               return c << 16 | (static_cast<uint32_t>(std::clamp(a, -128, 127)) & 0xff) << 8 |
                      (static_cast<uint32_t>(std::clamp(b, -128, 127)) & 0xff);
             }),
             {r, a, b, c});
      return;
  }
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
