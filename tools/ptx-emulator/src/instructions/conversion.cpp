// cvt between scalars: rounding and saturation (PTX ISA 9.7.9.21).
#include "conversion.h"

#include <limits>
#include <type_traits>

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

template <class T>
inline constexpr bool kIsFloat = std::is_floating_point_v<T> || std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>;

template <class F>
F to_integral(F x, Integral mode) {
  switch (mode) {
    case Integral::kNearest:
      return std::nearbyint(x);
    case Integral::kZero:
      return std::trunc(x);
    case Integral::kDown:
      return std::floor(x);
    case Integral::kUp:
      return std::ceil(x);
    default:
      return x;
  }
}

// The double nearest to an integer, rounded to odd where it is not exact: a later rounding is then the only one.
template <class T>
double to_double_odd(T x) {
  double d = static_cast<double>(x);
  if constexpr (sizeof(T) == 8) {
    const __int128 back = static_cast<__int128>(d);
    if (back != static_cast<__int128>(x)) {
      uint64_t bits = std::bit_cast<uint64_t>(d);
      const bool too_far = x > 0 ? back > static_cast<__int128>(x) : back < static_cast<__int128>(x);
      if (too_far) --bits;
      d = std::bit_cast<double>(bits | 1);
    }
  }
  return d;
}

template <class T>
T clamp_to_integer(double x) {
  if (x != x) return 0;
  constexpr double kLow = static_cast<double>(std::numeric_limits<T>::min());
  const double high = std::ldexp(1.0, std::numeric_limits<T>::digits);
  if (x <= kLow) return std::numeric_limits<T>::min();
  if (x >= high) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

template <class D>
D round_float(double x, ConversionOptions o) {
  if constexpr (std::is_same_v<D, double>)
    return x;
  else if constexpr (std::is_same_v<D, float>)
    return o.rounding == Rounding::kNearestEven ? static_cast<float>(x)
           : x != x                             ? std::numeric_limits<float>::quiet_NaN()
                                                : bits_to_float(encode(x, kFloatFormat, o.rounding, false));
  else
    return D{
        static_cast<uint16_t>(encode(x, std::is_same_v<D, Half> ? kHalfFormat : kBfloatFormat, o.rounding, o.finite))};
}

template <class D, class S>
D convert(S x, ConversionOptions o) {
  if constexpr (!kIsFloat<S> && !kIsFloat<D>) {
    if (!o.saturate) return static_cast<D>(x);
    const __int128 wide = x;
    if (wide < std::numeric_limits<D>::min()) return std::numeric_limits<D>::min();
    if (wide > std::numeric_limits<D>::max()) return std::numeric_limits<D>::max();
    return static_cast<D>(x);
  } else if constexpr (!kIsFloat<S>) {
    D r;
    if constexpr (std::is_same_v<D, double>) {
      r = static_cast<double>(x);
      if (sizeof(S) == 8 && o.rounding != Rounding::kNearestEven) {
        const __int128 back = static_cast<__int128>(r), exact = static_cast<__int128>(x);
        const bool up = o.rounding == Rounding::kUp || (o.rounding == Rounding::kZero && exact < 0);
        if (up && back < exact) r = std::nextafter(r, INFINITY);
        if (!up && back > exact) r = std::nextafter(r, -INFINITY);
      }
    } else if (std::is_same_v<D, float> && o.rounding == Rounding::kNearestEven) {
      r = round_float<D>(static_cast<double>(static_cast<float>(x)), o);
    } else {
      r = round_float<D>(to_double_odd(x), o);
    }
    if (o.saturate) r = round_float<D>(std::clamp(static_cast<double>(widen(r)), 0.0, 1.0), o);
    return r;
  } else {
    const double value = widen(o.flush ? flush(x) : x);
    if constexpr (!kIsFloat<D>) {
      return clamp_to_integer<D>(to_integral(value, o.integral));
    } else {
      double v = to_integral(value, o.integral);
      if (o.relu && !(v > 0) && v == v) v = 0;
      D r;
      // A NaN keeps no payload between formats, and stays itself within one.
      if constexpr (std::is_same_v<D, S>)
        r = o.integral == Integral::kNone && !o.relu ? (o.flush ? flush(x) : x) : round_float<D>(v, o);
      else
        r = round_float<D>(v, o);
      if (o.saturate) {
        const double w = widen(r);
        r = round_float<D>(w > 0 ? (w < 1 ? w : 1.0) : 0.0, o);
      }
      if constexpr (std::is_same_v<D, float>) r = o.flush ? flush(r) : r;
      return r;
    }
  }
}

template <class D, class S>
void convert_run(Warp& w, const Instruction& i) {
  const ConversionOptions o = ConversionOptions::unpack(i.immediate);
  D* d = w.lanes<D>(i.slots[0]);
  const S* a = w.lanes<S>(i.slots[1]);
  alignas(64) D r[kLanes] = {};
  for (uint32_t m = w.active; m; m &= m - 1) r[first_lane(m)] = convert<D>(a[first_lane(m)], o);
  store_lanes(d, r, w.active);
}

// The conversions that kernels are full of, without options: these vectorise.
template <class D, class S>
Handler quick(ConversionOptions o) {
  if (o.pack() != ConversionOptions{}.pack()) {
    if constexpr (std::is_same_v<S, float> && std::is_integral_v<D> && sizeof(D) == 4) {
      ConversionOptions truncating;
      truncating.integral = Integral::kZero;
      if (o.pack() == truncating.pack())
        return map<D, float>([](float x) {
          const double t = std::trunc(static_cast<double>(x));
          constexpr double kLow = std::numeric_limits<D>::min(), kHigh = std::numeric_limits<D>::max();
          return t != t      ? D{0}
                 : t < kLow  ? std::numeric_limits<D>::min()
                 : t > kHigh ? std::numeric_limits<D>::max()
                             : static_cast<D>(static_cast<int64_t>(t));
        });
    }
    return nullptr;
  }
  if constexpr (std::is_integral_v<D> && std::is_integral_v<S>)
    return map<D, S>([](S x) { return static_cast<D>(x); });
  else if constexpr (std::is_integral_v<S> && (std::is_same_v<D, float> || std::is_same_v<D, double>))
    return map<D, S>([](S x) { return static_cast<D>(x); });
  else if constexpr (sizeof(S) == 2 && kIsFloat<S> && std::is_same_v<D, float>)
    return map<float, S>([](S x) {
      const float r = widen(x);
      return r;
    });
  else if constexpr (sizeof(D) == 2 && kIsFloat<D> && std::is_same_v<S, float>)
    return map<D, float>([](float x) { return narrow<D>(x); });
  else if constexpr (std::is_floating_point_v<S> && std::is_floating_point_v<D>)
    return map<D, S>([](S x) { return static_cast<D>(x); });
  return nullptr;
}

template <class F>
void with_scalar(Decoder& d, Type type, F f) {
  switch (type) {
    case Type::kU8:
      return f(uint8_t{});
    case Type::kS8:
      return f(int8_t{});
    case Type::kF16:
      return f(Half{});
    case Type::kBf16:
      return f(Bfloat{});
    case Type::kF32:
      return f(float{});
    case Type::kF64:
      return f(double{});
    default:
      return with_integer(d, type, f);
  }
}

// Operands of cvt may be wider than their type: sources are cut, results are extended.
uint32_t cut_source(Decoder& d, const Operand& operand, Type type) {
  const int actual = d.slot_width(operand), width = type_bytes(type);
  if (actual <= width) return d.source(operand, type);
  const uint32_t r = d.temporary(width);
  const uint32_t a = d.source(operand, actual == 2 ? Type::kB16 : actual == 4 ? Type::kB32 : Type::kB64);
  const auto go = [&]<class N>(N) {
    d.emit(actual == 2   ? map<N, uint16_t>([](uint16_t x) { return static_cast<N>(x); })
           : actual == 4 ? map<N, uint32_t>([](uint32_t x) { return static_cast<N>(x); })
                         : map<N, uint64_t>([](uint64_t x) { return static_cast<N>(x); }),
           {r, a});
  };
  width == 1 ? go(uint8_t{}) : width == 2 ? go(uint16_t{}) : go(uint32_t{});
  return r;
}

template <class W>
void extend(Decoder& d, Type type, uint32_t r, uint32_t from) {
  switch (type_bytes(type)) {
    case 1:
      d.emit(is_signed(type) ? map<W, int8_t>([](int8_t x) { return static_cast<W>(x); })
                             : map<W, uint8_t>([](uint8_t x) { return static_cast<W>(x); }),
             {r, from});
      return;
    case 2:
      d.emit(is_signed(type) ? map<W, int16_t>([](int16_t x) { return static_cast<W>(x); })
                             : map<W, uint16_t>([](uint16_t x) { return static_cast<W>(x); }),
             {r, from});
      return;
    default:
      d.emit(is_signed(type) ? map<W, int32_t>([](int32_t x) { return static_cast<W>(x); })
                             : map<W, uint32_t>([](uint32_t x) { return static_cast<W>(x); }),
             {r, from});
      return;
  }
}

void convert_statement(Decoder& d) {
  auto& m = d.modifiers();
  if (m.take("pack")) return pack_saturated(d);
  ConversionOptions o;
  if (const int mode = m.take_one({"rni", "rzi", "rmi", "rpi"}); mode >= 0)
    o.integral = static_cast<Integral>(mode + 1);
  if (const int mode = m.take_one({"rn", "rna", "rz", "rm", "rp"}); mode >= 0)
    o.rounding = static_cast<Rounding>(mode), o.has_rounding = true;
  o.flush = m.take("ftz");
  o.saturate = m.take("sat");
  o.finite = m.take("satfinite");
  o.relu = m.take("relu");
  const Type to = d.require_type(), from = d.require_type();

  if (to == Type::kF16x2 || to == Type::kBf16x2 || to == Type::kE4m3x2 || to == Type::kE5m2x2)
    return convert_packed(d, o, to, from);
  d.expect_operands(2, 2);
  if (to == Type::kTf32) return convert_tf32(d, o, from);
  const bool to_float = is_float(to), from_float = is_float(from);
  if (to_float && o.integral != Integral::kNone && to != from)
    d.fail("an integral rounding needs an integer result, or equal types");
  if (!to_float && from_float && o.integral == Integral::kNone) d.fail("an integral rounding is missing");
  if (!to_float && !from_float && (o.integral != Integral::kNone || o.has_rounding))
    d.fail("no rounding is possible here");
  if (to_float && o.has_rounding == (from_float && type_bytes(to) > type_bytes(from))) {
    if (o.has_rounding) d.fail("no rounding is possible here");
  }
  if (to_float && !o.has_rounding && (!from_float || type_bytes(to) < type_bytes(from)))
    d.fail("a rounding is missing");
  if (o.rounding == Rounding::kNearestAway) d.fail(".rna is not possible here");
  const uint32_t a = cut_source(d, d.operand(1), from);
  const int actual = d.slot_width(d.operand(0)), width = type_bytes(to);
  const bool extended = actual > width;
  const uint32_t r = extended ? d.temporary(width) : d.destination(0, to);
  with_scalar(d, to, [&]<class D>(D) {
    with_scalar(d, from, [&]<class S>(S) {
      const Handler handler = quick<D, S>(o);
      d.emit(handler ? handler : convert_run<D, S>, {r, a}, o.pack());
    });
  });
  if (!extended) return;
  const uint32_t destination = d.destination(d.operand(0), actual);
  actual == 2   ? extend<uint16_t>(d, to, destination, r)
  : actual == 4 ? extend<uint32_t>(d, to, destination, r)
                : extend<uint64_t>(d, to, destination, r);
}

}  // namespace

void register_conversion(InstructionTable& t) { t["cvt"] = t["cvt.f"] = convert_statement; }

}  // namespace PTX_ISA
}  // namespace ptx_emulator
