// Floating-point arithmetic (PTX ISA 9.7.3, 9.7.4, 9.7.5). Compiled with -ffp-contract=off: an a * b + c here is two
// roundings.
#include <cfenv>

#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

// A function of floats or doubles on any lane type: 16-bit operands are widened, the result is rounded once.
template <class T, bool kFlush, class Op, class... S>
inline T calculate(Op op, S... x) {
  const auto in = [](T v) { return widen(kFlush ? flush(v) : v); };
  const auto result = op(in(x)...);
  T narrowed;
  if constexpr (sizeof(T) == 2)
    narrowed = narrow<T>(static_cast<float>(result));
  else
    narrowed = static_cast<T>(result);
  return kFlush ? flush(narrowed) : narrowed;
}

template <class T, bool kFlush, class Op, class... S>
inline uint32_t calculate_packed(Op op, S... x) {
  const T low = calculate<T, kFlush>(op, T{static_cast<uint16_t>(x)}...);
  const T high = calculate<T, kFlush>(op, T{static_cast<uint16_t>(x >> 16)}...);
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

template <bool kFlush, class Op, class... U32>
Handler handler(Decoder& d, Type type, Op, U32...) {
  switch (type) {
    case Type::kF32:
      return map<float, decltype(U32{}, float{})...>([](auto... x) { return calculate<float, kFlush>(Op{}, x...); });
    case Type::kF64:
      return map<double, decltype(U32{}, double{})...>([](auto... x) { return calculate<double, false>(Op{}, x...); });
    case Type::kF16:
      return map<Half, decltype(U32{}, Half{})...>([](auto... x) { return calculate<Half, kFlush>(Op{}, x...); });
    case Type::kBf16:
      return map<Bfloat, decltype(U32{}, Bfloat{})...>([](auto... x) { return calculate<Bfloat, kFlush>(Op{}, x...); });
    case Type::kF16x2:
      return map<uint32_t, U32...>([](auto... x) { return calculate_packed<Half, kFlush>(Op{}, x...); });
    case Type::kBf16x2:
      return map<uint32_t, U32...>([](auto... x) { return calculate_packed<Bfloat, kFlush>(Op{}, x...); });
    default:
      d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  }
}

struct FloatModifiers {
  Rounding rounding = Rounding::kNearestEven;
  bool has_rounding = false, flush = false, saturate = false, relu = false, approximate = false, full = false;
  Type type = Type::kNone;
};

FloatModifiers take_float(Decoder& d) {
  FloatModifiers f;
  auto& m = d.modifiers();
  f.approximate = m.take("approx");
  f.full = m.take("full");
  const int mode = m.take_one({"rn", "rz", "rm", "rp"});
  f.has_rounding = mode >= 0;
  if (mode > 0) f.rounding = mode == 1 ? Rounding::kZero : mode == 2 ? Rounding::kDown : Rounding::kUp;
  m.take("noftz");
  f.flush = m.take("ftz");
  f.saturate = m.take("sat");
  f.relu = m.take("relu");
  f.type = d.require_type();
  if (f.rounding != Rounding::kNearestEven && f.type != Type::kF32 && f.type != Type::kF64)
    d.fail("this rounding is not possible for ." + std::string(type_name(f.type)));
  if (f.flush && f.type == Type::kF64 && !f.approximate) d.fail(".ftz is not possible for .f64");
  if (f.saturate && (f.type == Type::kF64 || f.type == Type::kBf16 || f.type == Type::kBf16x2))
    d.fail(".sat is not possible here");
  if (f.relu && type_bits(f.type) == 32 && f.type == Type::kF32) d.fail(".relu is not possible here");
  return f;
}

// Directed rounding: the host's own rounding mode around the same handler. The compiler cannot move the handler's loads
// and stores across the calls, so neither its arithmetic.
int host_mode(Rounding r) {
  return r == Rounding::kZero ? FE_TOWARDZERO : r == Rounding::kDown ? FE_DOWNWARD : FE_UPWARD;
}

void directed_run(Warp& w, const Instruction& i) {
  std::fesetround(static_cast<int>(i.immediate));
  reinterpret_cast<Handler>(static_cast<uintptr_t>(i.slots[-2]) | static_cast<uintptr_t>(i.slots[-1]) << 32)(w, i);
  std::fesetround(FE_TONEAREST);
}

void emit_rounded(Decoder& d, Handler handler, Rounding rounding, const std::vector<uint32_t>& slots) {
  if (rounding == Rounding::kNearestEven) {
    d.emit(handler, slots);
    return;
  }
  // The handler's address travels in front of the operands.
  const uintptr_t address = reinterpret_cast<uintptr_t>(handler);
  std::vector<uint32_t> with{static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  with.insert(with.end(), slots.begin(), slots.end());
  d.emit(directed_run, with, host_mode(rounding), 2);
}

// Clamping of a result in place.
void emit_clamp(Decoder& d, const FloatModifiers& f, uint32_t r) {
  const auto unit = [](float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; };  // NaN becomes 0
  const auto positive = [](float x) { return x != x ? std::numeric_limits<float>::quiet_NaN() : x > 0 ? x : 0.0f; };
  if (f.saturate) d.emit(handler<false>(d, f.type, unit, 0u), {r, r});
  if (f.relu) d.emit(handler<false>(d, f.type, positive, 0u), {r, r});
}

template <class Op, class... U32>
void arithmetic(Decoder& d, const FloatModifiers& f, Op op, U32... sources) {
  constexpr size_t n = sizeof...(U32);
  d.expect_operands(1 + n, 1 + n);
  std::vector<uint32_t> slots(1 + n);
  for (size_t k = 0; k < n; ++k) slots[1 + k] = d.source(1 + k, f.type);
  slots[0] = d.destination(0, f.type);
  emit_rounded(d, f.flush ? handler<true>(d, f.type, op, sources...) : handler<false>(d, f.type, op, sources...),
               f.rounding, slots);
  emit_clamp(d, f, slots[0]);
}

void add(Decoder& d) {
  arithmetic(d, take_float(d), [](auto a, auto b) { return a + b; }, 0u, 0u);
}
void subtract(Decoder& d) {
  arithmetic(d, take_float(d), [](auto a, auto b) { return a - b; }, 0u, 0u);
}
void multiply(Decoder& d) {
  arithmetic(d, take_float(d), [](auto a, auto b) { return a * b; }, 0u, 0u);
}

// For 16-bit types the sum is taken once, too: rounded to odd first, so that narrowing is the only rounding that shows.
struct FusedMultiplyAdd {
  float operator()(float a, float b, float c) const { return std::fma(a, b, c); }
  double operator()(double a, double b, double c) const { return std::fma(a, b, c); }
};
template <class T, bool kFlush>
T fma_narrow(T a, T b, T c) {
  const auto in = [](T v) { return widen(kFlush ? flush(v) : v); };
  const T r = narrow<T>(to_float_odd(fma_to_odd(in(a), in(b), in(c))));
  return kFlush ? flush(r) : r;
}
template <class T, bool kFlush>
uint32_t fma_packed(uint32_t a, uint32_t b, uint32_t c) {
  const auto low = [](uint32_t x) { return T{static_cast<uint16_t>(x)}; };
  const auto high = [](uint32_t x) { return T{static_cast<uint16_t>(x >> 16)}; };
  return fma_narrow<T, kFlush>(low(a), low(b), low(c)).bits |
         static_cast<uint32_t>(fma_narrow<T, kFlush>(high(a), high(b), high(c)).bits) << 16;
}
template <bool kFlush>
Handler fma_handler(Decoder& d, Type type) {
  switch (type) {
    case Type::kF16:
      return map<Half, Half, Half, Half>([](Half a, Half b, Half c) { return fma_narrow<Half, kFlush>(a, b, c); });
    case Type::kBf16:
      return map<Bfloat, Bfloat, Bfloat, Bfloat>(
          [](Bfloat a, Bfloat b, Bfloat c) { return fma_narrow<Bfloat, kFlush>(a, b, c); });
    case Type::kF16x2:
      return map<uint32_t, uint32_t, uint32_t, uint32_t>(
          [](uint32_t a, uint32_t b, uint32_t c) { return fma_packed<Half, kFlush>(a, b, c); });
    case Type::kBf16x2:
      return map<uint32_t, uint32_t, uint32_t, uint32_t>(
          [](uint32_t a, uint32_t b, uint32_t c) { return fma_packed<Bfloat, kFlush>(a, b, c); });
    default:
      return handler<kFlush>(d, type, FusedMultiplyAdd{}, 0u, 0u, 0u);
  }
}

void fused_multiply_add(Decoder& d) {
  d.modifiers().take("oob");
  const FloatModifiers f = take_float(d);
  d.expect_operands(4, 4);
  const std::vector<uint32_t> slots{d.destination(0, f.type), d.source(1, f.type), d.source(2, f.type),
                                    d.source(3, f.type)};
  emit_rounded(d, f.flush ? fma_handler<true>(d, f.type) : fma_handler<false>(d, f.type), f.rounding, slots);
  emit_clamp(d, f, slots[0]);
}

void require(Decoder& d, const FloatModifiers& f, std::initializer_list<Type> types) {
  for (const Type type : types)
    if (f.type == type) return;
  d.fail("type ." + std::string(type_name(f.type)) + " is not possible here");
}

void divide(Decoder& d) {
  const FloatModifiers f = take_float(d);
  require(d, f, {Type::kF32, Type::kF64});
  arithmetic(d, f, [](auto a, auto b) { return a / b; }, 0u, 0u);
}
void reciprocal(Decoder& d) {
  const FloatModifiers f = take_float(d);
  require(d, f, {Type::kF32, Type::kF64});
  arithmetic(d, f, [](auto a) { return decltype(a)(1) / a; }, 0u);
}
void square_root(Decoder& d) {
  const FloatModifiers f = take_float(d);
  require(d, f, {Type::kF32, Type::kF64});
  arithmetic(d, f, [](auto a) { return std::sqrt(a); }, 0u);
}
void reciprocal_square_root(Decoder& d) {
  const FloatModifiers f = take_float(d);
  if (!f.approximate) d.fail("rsqrt needs .approx");
  require(d, f, {Type::kF32, Type::kF64});
  arithmetic(d, f, [](auto a) { return static_cast<decltype(a)>(1.0 / std::sqrt(static_cast<double>(a))); }, 0u);
}

// Functions that PTX only approximates: the host's, which are closer than asked.
template <class Op>
void approximation(Decoder& d, std::initializer_list<Type> types, Op op) {
  const FloatModifiers f = take_float(d);
  if (!f.approximate) d.fail(".approx is missing");
  require(d, f, types);
  arithmetic(d, f, op, 0u);
}

void absolute(Decoder& d) {
  const FloatModifiers f = take_float(d);
  arithmetic(d, f, [](auto a) { return std::fabs(a); }, 0u);
}
void negate(Decoder& d) {
  const FloatModifiers f = take_float(d);
  arithmetic(d, f, [](auto a) { return -a; }, 0u);
}

// -0 is less than +0. Without .NaN a NaN loses against a number.
template <bool kMax, bool kNan, bool kXorSign>
struct Extreme {
  template <class F>
  F operator()(F a, F b) const {
    const bool negative = kXorSign && std::signbit(a) != std::signbit(b);
    if (kXorSign) a = std::fabs(a), b = std::fabs(b);
    F r;
    if (a != a || b != b)
      r = kNan || (a != a && b != b) ? std::numeric_limits<F>::quiet_NaN() : a != a ? b : a;
    else if (a == b)
      r = std::signbit(a) == kMax ? b : a;
    else
      r = (a < b) != kMax ? a : b;
    return negative && r == r ? -r : r;
  }
};

template <bool kMax>
void extreme(Decoder& d) {
  const bool nan = d.modifiers().take("NaN"), sign = d.modifiers().take("xorsign");
  if (sign && !d.modifiers().take("abs")) d.fail(".xorsign needs .abs");
  const FloatModifiers f = take_float(d);
  if (f.type == Type::kF64 && (nan || sign)) d.fail("modifiers are not possible for .f64");
  if (nan && sign)
    arithmetic(d, f, Extreme<kMax, true, true>{}, 0u, 0u);
  else if (nan)
    arithmetic(d, f, Extreme<kMax, true, false>{}, 0u, 0u);
  else if (sign)
    arithmetic(d, f, Extreme<kMax, false, true>{}, 0u, 0u);
  else
    arithmetic(d, f, Extreme<kMax, false, false>{}, 0u, 0u);
}

void copy_sign(Decoder& d) {
  const Type type = d.require_type();
  if (type == Type::kF32)
    return emit_map<uint32_t, uint32_t, uint32_t>(
        d, type, [](uint32_t a, uint32_t b) { return (a & 0x80000000u) | (b & 0x7fffffffu); });
  if (type == Type::kF64)
    return emit_map<uint64_t, uint64_t, uint64_t>(
        d, type, [](uint64_t a, uint64_t b) { return (a & (uint64_t{1} << 63)) | (b & ~(uint64_t{1} << 63)); });
  d.fail("copysign needs .f32 or .f64");
}

template <class T>
void test_run(Warp& w, const Instruction& i) {
  const T* a = w.lanes<T>(i.slots[1]);
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int kind = std::fpclassify(a[l]);
    const bool results[] = {kind != FP_NAN && kind != FP_INFINITE,
                            kind == FP_INFINITE,
                            kind != FP_NAN,
                            kind == FP_NAN,
                            kind == FP_NORMAL,
                            kind == FP_SUBNORMAL};
    mask |= static_cast<uint32_t>(results[i.immediate]) << l;
  }
  uint32_t& p = w.predicate(i.slots[0]);
  p = (p & ~w.active) | (mask & w.active);
}
void test_property(Decoder& d) {
  const int property = d.modifiers().take_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  if (property < 0) d.fail("testp needs a property");
  const Type type = d.require_type();
  d.expect_operands(2, 2);
  if (type != Type::kF32 && type != Type::kF64) d.fail("testp needs .f32 or .f64");
  const uint32_t a = d.source(1, type);
  d.emit(type == Type::kF32 ? test_run<float> : test_run<double>, {d.destination(d.operand(0), 0), a}, property);
}

}  // namespace

void register_floating(InstructionTable& t) {
  // Instructions that integers have too are told apart by ".f" behind the name.
  t["add.f"] = add;
  t["sub.f"] = subtract;
  t["mul.f"] = multiply;
  t["fma.f"] = t["mad.f"] = fused_multiply_add;
  t["div.f"] = divide;
  t["rcp.f"] = reciprocal;
  t["sqrt.f"] = square_root;
  t["rsqrt.f"] = reciprocal_square_root;
  t["sin.f"] = [](Decoder& d) { approximation(d, {Type::kF32}, [](auto a) { return std::sin(a); }); };
  t["cos.f"] = [](Decoder& d) { approximation(d, {Type::kF32}, [](auto a) { return std::cos(a); }); };
  t["lg2.f"] = [](Decoder& d) { approximation(d, {Type::kF32}, [](auto a) { return std::log2(a); }); };
  t["ex2.f"] = [](Decoder& d) {
    approximation(d, {Type::kF32, Type::kF16, Type::kF16x2, Type::kBf16, Type::kBf16x2},
                  [](auto a) { return std::exp2(a); });
  };
  t["tanh.f"] = [](Decoder& d) {
    approximation(d, {Type::kF32, Type::kF16, Type::kF16x2, Type::kBf16, Type::kBf16x2},
                  [](auto a) { return std::tanh(a); });
  };
  t["abs.f"] = absolute;
  t["neg.f"] = negate;
  t["min.f"] = extreme<false>;
  t["max.f"] = extreme<true>;
  t["copysign.f"] = copy_sign;
  t["testp.f"] = test_property;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
