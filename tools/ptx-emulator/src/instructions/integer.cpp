// Integer arithmetic (PTX ISA 9.7.1, 9.7.2).
#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

template <class T>
struct Wider;
template <>
struct Wider<uint16_t> {
  using type = uint32_t;
};
template <>
struct Wider<int16_t> {
  using type = int32_t;
};
template <>
struct Wider<uint32_t> {
  using type = uint64_t;
};
template <>
struct Wider<int32_t> {
  using type = int64_t;
};
template <>
struct Wider<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct Wider<int64_t> {
  using type = __int128;
};
template <class T>
using Wide = typename Wider<T>::type;

Type wide_type(Decoder& d, Type type) {
  switch (type) {
    case Type::kU16:
      return Type::kU32;
    case Type::kS16:
      return Type::kS32;
    case Type::kU32:
      return Type::kU64;
    case Type::kS32:
      return Type::kS64;
    default:
      d.fail(".wide needs a 16- or 32-bit type");
  }
}

int32_t saturate(int64_t x) { return static_cast<int32_t>(x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : x); }

// The condition code of add.cc and its kin: a hidden predicate of the frame.
uint32_t carry(Decoder& d) { return d.special(Special::kZero, 0); }

// d = a + b + carry-in, or a - b - borrow-in; a third source for mad.
template <class T, bool kSubtract, bool kIn, bool kOut>
void with_carry(Warp& w, const Instruction& i) {
  T* d = w.lanes<T>(i.slots[0]);
  const T *a = w.lanes<T>(i.slots[1]), *b = w.lanes<T>(i.slots[2]);
  uint32_t& code = w.predicate(i.slots[3]);
  uint32_t out = 0;
  alignas(64) T r[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const T in = kIn ? static_cast<T>(code >> l & 1) : T{0};
    T sum, second;
    const bool first_carry =
        kSubtract ? __builtin_sub_overflow(a[l], b[l], &sum) : __builtin_add_overflow(a[l], b[l], &sum);
    const bool second_carry =
        kSubtract ? __builtin_sub_overflow(sum, in, &second) : __builtin_add_overflow(sum, in, &second);
    r[l] = second;
    out |= static_cast<uint32_t>(first_carry | second_carry) << l;
  }
  store_lanes(d, r, w.active);
  if (kOut) code = (code & ~w.active) | (out & w.active);
}

template <class T>
Handler carry_handler(bool subtract, bool in, bool out) {
  if (subtract)
    return in ? (out ? with_carry<T, true, true, true> : with_carry<T, true, true, false>)
              : with_carry<T, true, false, true>;
  return in ? (out ? with_carry<T, false, true, true> : with_carry<T, false, true, false>)
            : with_carry<T, false, false, true>;
}

void emit_carry(Decoder& d, bool subtract, bool in, bool out, Type type, uint32_t destination, uint32_t a, uint32_t b) {
  if (type_bits(type) == 32)
    d.emit(carry_handler<uint32_t>(subtract, in, out), {destination, a, b, carry(d)});
  else if (type_bits(type) == 64)
    d.emit(carry_handler<uint64_t>(subtract, in, out), {destination, a, b, carry(d)});
  else
    d.fail("carries need a 32- or 64-bit type");
}

template <bool kSubtract>
void add(Decoder& d) {
  auto& m = d.modifiers();
  const bool out = m.take("cc"), sat = m.take("sat");
  const Type type = d.require_type();
  if (out) {
    d.expect_operands(3, 3);
    const uint32_t a = d.source(1, type), b = d.source(2, type);
    return emit_carry(d, kSubtract, false, true, type, d.destination(0, type), a, b);
  }
  if (sat) {
    if (type != Type::kS32) d.fail(".sat needs .s32");
    return emit_map<int32_t, int32_t, int32_t>(
        d, type, [](int32_t a, int32_t b) { return saturate(kSubtract ? int64_t{a} - b : int64_t{a} + b); });
  }
  if (type == Type::kU16x2 || type == Type::kS16x2)
    return emit_map<uint32_t, uint32_t, uint32_t>(d, type, [](uint32_t a, uint32_t b) {
      const uint32_t low = kSubtract ? a - b : a + b, high = kSubtract ? (a >> 16) - (b >> 16) : (a >> 16) + (b >> 16);
      return (low & 0xffff) | high << 16;
    });
  if (!is_integer(type)) d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  with_bits(d, type, [&]<class T>(T) {
    emit_map<T, T, T>(d, type, [](T a, T b) { return static_cast<T>(kSubtract ? a - b : a + b); });
  });
}

template <bool kSubtract>
void add_with_carry(Decoder& d) {
  const bool out = d.modifiers().take("cc");
  const Type type = d.require_type();
  d.expect_operands(3, 3);
  const uint32_t a = d.source(1, type), b = d.source(2, type);
  emit_carry(d, kSubtract, true, out, type, d.destination(0, type), a, b);
}

enum class Part { kLow, kHigh, kWide };
Part take_part(Decoder& d) {
  switch (d.modifiers().take_one({"lo", "hi", "wide"})) {
    case 0:
      return Part::kLow;
    case 1:
      return Part::kHigh;
    case 2:
      return Part::kWide;
    default:
      d.fail("one of .lo, .hi and .wide is missing");
  }
}

template <class T>
T high_product(T a, T b) {
  return static_cast<T>((static_cast<Wide<T>>(a) * b) >> (8 * sizeof(T)));
}
template <class T>
T low_product(T a, T b) {
  return static_cast<T>(static_cast<Wide<Unsigned<T>>>(static_cast<Unsigned<T>>(a)) * static_cast<Unsigned<T>>(b));
}

void multiply(Decoder& d) {
  const Part part = take_part(d);
  const Type type = d.require_type();
  with_integer(d, type, [&]<class T>(T) {
    if (part == Part::kLow) return emit_map<T, T, T>(d, type, [](T a, T b) { return low_product(a, b); });
    if (part == Part::kHigh) return emit_map<T, T, T>(d, type, [](T a, T b) { return high_product(a, b); });
    const Type wide = wide_type(d, type);
    if constexpr (sizeof(T) < 8) {
      d.expect_operands(3, 3);
      const uint32_t a = d.source(1, type), b = d.source(2, type);
      d.emit(map<Wide<T>, T, T>([](T a, T b) { return static_cast<Wide<T>>(static_cast<Wide<T>>(a) * b); }),
             {d.destination(0, wide), a, b});
    }
  });
}

template <bool kCarryIn>
void multiply_add(Decoder& d) {
  const Part part = take_part(d);
  auto& m = d.modifiers();
  const bool out = m.take("cc"), sat = m.take("sat");
  const Type type = d.require_type();
  d.expect_operands(4, 4);
  const Type result = part == Part::kWide ? wide_type(d, type) : type;
  const uint32_t a = d.source(1, type), b = d.source(2, type), c = d.source(3, result);
  with_integer(d, type, [&]<class T>(T) {
    if (out || kCarryIn) {
      if (part == Part::kWide || sizeof(T) < 4) d.fail("carries need .lo or .hi of a 32- or 64-bit type");
      const uint32_t product = d.temporary(sizeof(T));
      d.emit(part == Part::kLow ? map<T, T, T>([](T a, T b) { return low_product(a, b); })
                                : map<T, T, T>([](T a, T b) { return high_product(a, b); }),
             {product, a, b});
      return emit_carry(d, false, kCarryIn, out, type, d.destination(0, type), product, c);
    }
    if (sat) {
      if (part != Part::kHigh || type != Type::kS32) d.fail(".sat needs .hi.s32");
      d.emit(map<int32_t, int32_t, int32_t, int32_t>(
                 [](int32_t a, int32_t b, int32_t c) { return saturate(int64_t{high_product(a, b)} + c); }),
             {d.destination(0, type), a, b, c});
      return;
    }
    using U = Unsigned<T>;
    if (part == Part::kLow) {
      d.emit(map<T, T, T, T>(
                 [](T a, T b, T c) { return static_cast<T>(static_cast<U>(low_product(a, b)) + static_cast<U>(c)); }),
             {d.destination(0, type), a, b, c});
    } else if (part == Part::kHigh) {
      d.emit(map<T, T, T, T>(
                 [](T a, T b, T c) { return static_cast<T>(static_cast<U>(high_product(a, b)) + static_cast<U>(c)); }),
             {d.destination(0, type), a, b, c});
    } else if constexpr (sizeof(T) < 8) {
      using W = Wide<T>;
      d.emit(map<W, T, T, W>([](T a, T b, W c) {
               return static_cast<W>(static_cast<Unsigned<W>>(static_cast<W>(a) * b) + static_cast<Unsigned<W>>(c));
             }),
             {d.destination(0, result), a, b, c});
    }
  });
}

template <bool kAdd>
void multiply24(Decoder& d) {
  const Part part = take_part(d);
  if (part == Part::kWide) d.fail("24-bit products have .lo and .hi");
  const bool sat = kAdd && d.modifiers().take("sat");
  const Type type = d.require_type();
  if (type != Type::kU32 && type != Type::kS32) d.fail("24-bit products need .u32 or .s32");
  d.expect_operands(3 + kAdd, 3 + kAdd);
  const uint32_t a = d.source(1, type), b = d.source(2, type);
  const uint32_t product = kAdd ? d.temporary(4) : d.destination(0, type);
  const bool high = part == Part::kHigh;
  if (type == Type::kU32)
    d.emit(high ? map<uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t b) {
             return static_cast<uint32_t>((uint64_t{a & 0xffffff} * (b & 0xffffff)) >> 16);
           })
                : map<uint32_t, uint32_t, uint32_t>(
                      [](uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); }),
           {product, a, b});
  else
    d.emit(high ? map<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) {
             return static_cast<int32_t>((int64_t{static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8} *
                                          (static_cast<int32_t>(static_cast<uint32_t>(b) << 8) >> 8)) >>
                                         16);
           })
                : map<int32_t, int32_t, int32_t>([](int32_t a, int32_t b) {
                    return static_cast<int32_t>(int64_t{static_cast<int32_t>(static_cast<uint32_t>(a) << 8) >> 8} *
                                                (static_cast<int32_t>(static_cast<uint32_t>(b) << 8) >> 8));
                  }),
           {product, a, b});
  if constexpr (kAdd) {
    const uint32_t c = d.source(3, type);
    if (sat && (!high || type != Type::kS32)) d.fail(".sat needs .hi.s32");
    d.emit(sat ? map<int32_t, int32_t, int32_t>([](int32_t p, int32_t c) { return saturate(int64_t{p} + c); })
               : map<int32_t, uint32_t, uint32_t>([](uint32_t p, uint32_t c) { return static_cast<int32_t>(p + c); }),
           {d.destination(0, type), product, c});
  }
}

void sum_of_differences(Decoder& d) {
  const Type type = d.require_type();
  with_integer(d, type, [&]<class T>(T) {
    emit_map<T, T, T, T>(d, type, [](T a, T b, T c) {
      using U = Unsigned<T>;
      return static_cast<T>(static_cast<U>(c) + (a < b ? static_cast<U>(static_cast<U>(b) - static_cast<U>(a))
                                                       : static_cast<U>(static_cast<U>(a) - static_cast<U>(b))));
    });
  });
}

// Division by zero is unspecified; the hardware gives all ones, and the dividend as remainder.
void divide(Decoder& d) {
  const Type type = d.require_type();
  with_integer(d, type, [&]<class T>(T) {
    emit_map<T, T, T>(d, type, [](T a, T b) {
      if (b == 0) return static_cast<T>(-1);
      if (std::is_signed_v<T> && b == static_cast<T>(-1))
        return static_cast<T>(Unsigned<T>{0} - static_cast<Unsigned<T>>(a));
      return static_cast<T>(a / b);
    });
  });
}
void remainder(Decoder& d) {
  const Type type = d.require_type();
  with_integer(d, type, [&]<class T>(T) {
    emit_map<T, T, T>(d, type, [](T a, T b) {
      if (b == 0) return a;
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return T{0};
      return static_cast<T>(a % b);
    });
  });
}

void absolute(Decoder& d) {
  const Type type = d.require_type();
  if (!is_signed(type)) d.fail("abs needs a signed type");
  with_integer(d, type, [&]<class T>(T) {
    emit_map<T, T>(d, type,
                   [](T a) { return a < 0 ? static_cast<T>(Unsigned<T>{0} - static_cast<Unsigned<T>>(a)) : a; });
  });
}
void negate(Decoder& d) {
  const Type type = d.require_type();
  if (!is_signed(type)) d.fail("neg needs a signed type");
  with_integer(d, type, [&]<class T>(T) {
    emit_map<T, T>(d, type, [](T a) { return static_cast<T>(Unsigned<T>{0} - static_cast<Unsigned<T>>(a)); });
  });
}

template <class T, bool kMax>
uint32_t packed_extreme(uint32_t a, uint32_t b) {
  const auto pick = [](T x, T y) { return kMax ? (x > y ? x : y) : (x < y ? x : y); };
  const T low = pick(static_cast<T>(a), static_cast<T>(b)),
          high = pick(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
  return static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
}

template <bool kMax>
void extreme(Decoder& d) {
  const bool relu = d.modifiers().take("relu");
  const Type type = d.require_type();
  if (type == Type::kU16x2 || type == Type::kS16x2) {
    if (relu) d.fail(".relu is not supported here");
    if (type == Type::kU16x2)
      return emit_map<uint32_t, uint32_t, uint32_t>(
          d, type, [](uint32_t a, uint32_t b) { return packed_extreme<uint16_t, kMax>(a, b); });
    return emit_map<uint32_t, uint32_t, uint32_t>(
        d, type, [](uint32_t a, uint32_t b) { return packed_extreme<int16_t, kMax>(a, b); });
  }
  if (relu) {
    if (type != Type::kS32) d.fail(".relu needs .s32");
    return emit_map<int32_t, int32_t, int32_t>(d, type, [](int32_t a, int32_t b) {
      const int32_t r = kMax ? (a > b ? a : b) : (a < b ? a : b);
      return r < 0 ? 0 : r;
    });
  }
  with_integer(d, type, [&]<class T>(T) {
    emit_map<T, T, T>(d, type, [](T a, T b) { return kMax ? (a > b ? a : b) : (a < b ? a : b); });
  });
}

template <class A, class B>
int32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int k = 0; k < 32; k += 8)
    c += static_cast<uint32_t>(int32_t{static_cast<A>(a >> k)} * int32_t{static_cast<B>(b >> k)});
  return static_cast<int32_t>(c);
}
template <class A, class B, bool kHigh>
int32_t dot2(uint32_t a, uint32_t b, uint32_t c) {
  using A16 = std::conditional_t<std::is_signed_v<A>, int16_t, uint16_t>;
  for (int k = 0; k < 2; ++k)
    c += static_cast<uint32_t>(int64_t{static_cast<A16>(a >> (16 * k))} *
                               int64_t{static_cast<B>(b >> (8 * k + (kHigh ? 16 : 0)))});
  return static_cast<int32_t>(c);
}

template <int kTerms>
void dot(Decoder& d) {
  const int half = kTerms == 2 ? d.modifiers().take_one({"lo", "hi"}) : 0;
  if (half < 0) d.fail("dp2a needs .lo or .hi");
  const Type at = d.require_type(), bt = d.require_type();
  if ((at != Type::kU32 && at != Type::kS32) || (bt != Type::kU32 && bt != Type::kS32))
    d.fail("types must be .u32 or .s32");
  const auto pick = [&]<class A, class B>(A, B) {
    if (kTerms == 4)
      return emit_map<int32_t, uint32_t, uint32_t, uint32_t>(
          d, Type::kU32, [](uint32_t a, uint32_t b, uint32_t c) { return dot4<A, B>(a, b, c); });
    if (half)
      return emit_map<int32_t, uint32_t, uint32_t, uint32_t>(
          d, Type::kU32, [](uint32_t a, uint32_t b, uint32_t c) { return dot2<A, B, true>(a, b, c); });
    return emit_map<int32_t, uint32_t, uint32_t, uint32_t>(
        d, Type::kU32, [](uint32_t a, uint32_t b, uint32_t c) { return dot2<A, B, false>(a, b, c); });
  };
  if (at == Type::kU32)
    bt == Type::kU32 ? pick(uint8_t{}, uint8_t{}) : pick(uint8_t{}, int8_t{});
  else
    bt == Type::kU32 ? pick(int8_t{}, uint8_t{}) : pick(int8_t{}, int8_t{});
}

}  // namespace

void register_integer(InstructionTable& t) {
  t["add"] = add<false>;
  t["sub"] = add<true>;
  t["addc"] = add_with_carry<false>;
  t["subc"] = add_with_carry<true>;
  t["mul"] = multiply;
  t["mad"] = multiply_add<false>;
  t["madc"] = multiply_add<true>;
  t["mul24"] = multiply24<false>;
  t["mad24"] = multiply24<true>;
  t["sad"] = sum_of_differences;
  t["div"] = divide;
  t["rem"] = remainder;
  t["abs"] = absolute;
  t["neg"] = negate;
  t["min"] = extreme<false>;
  t["max"] = extreme<true>;
  t["dp4a"] = dot<4>;
  t["dp2a"] = dot<2>;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
