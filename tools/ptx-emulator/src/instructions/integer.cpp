// Integer, logic, comparison, selection and data-movement instructions (PTX ISA 9.7.1, 9.7.2, 9.7.6, 9.7.8, 9.7.9.1).
#include <ctime>

#include "lanes.h"

namespace pop::emulator {
namespace POP_ISA {
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
template <class T>
using Unsigned = std::make_unsigned_t<T>;

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

// A 32-bit result from a 32- or 64-bit source.
template <class Op>
void count_bits(Decoder& d, Op) {
  const Type type = d.require_type();
  d.expect_operands(2, 2);
  if (type != Type::kB32 && type != Type::kB64)
    d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  const uint32_t a = d.source(1, type), r = d.destination(0, Type::kU32);
  if (type == Type::kB32)
    d.emit(map<uint32_t, uint32_t>(Op{}), {r, a});
  else
    d.emit(map<uint32_t, uint64_t>(Op{}), {r, a});
}

void find_bit(Decoder& d) {
  const bool shift_amount = d.modifiers().take("shiftamt");
  const Type type = d.require_type();
  d.expect_operands(2, 2);
  const uint32_t a = d.source(1, type), r = d.destination(0, Type::kU32);
  with_integer(d, type, [&]<class T>(T) {
    if constexpr (sizeof(T) < 4) d.fail("bfind needs a 32- or 64-bit type");
    using U = Unsigned<T>;
    const auto position = [](T a) {
      const U bits = static_cast<U>(std::is_signed_v<T> && a < 0 ? ~a : a);
      return bits == 0 ? 0xffffffffu
                       : static_cast<uint32_t>(8 * sizeof(T) - 1) - static_cast<uint32_t>(std::countl_zero(bits));
    };
    if (!shift_amount)
      d.emit(map<uint32_t, T>(position), {r, a});
    else
      d.emit(map<uint32_t, T>([](T a) {
               const uint32_t at = decltype(position){}(a);
               return at == 0xffffffffu ? at : static_cast<uint32_t>(8 * sizeof(T) - 1) - at;
             }),
             {r, a});
  });
}

void find_nth_set(Decoder& d) {
  if (d.require_type() != Type::kB32) d.fail("fns needs .b32");
  d.expect_operands(4, 4);
  const uint32_t mask = d.source(1, Type::kB32), base = d.source(2, Type::kB32), offset = d.source(3, Type::kS32);
  d.emit(map<uint32_t, uint32_t, uint32_t, int32_t>([](uint32_t mask, uint32_t base, int32_t offset) {
           if (base > 31) return 0xffffffffu;
           if (offset == 0) return mask >> base & 1 ? base : 0xffffffffu;
           const int step = offset > 0 ? 1 : -1;
           int64_t left = offset > 0 ? offset : -int64_t{offset};
           for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step)
             if ((mask >> at & 1) && --left == 0) return static_cast<uint32_t>(at);
           return 0xffffffffu;
         }),
         {d.destination(0, Type::kB32), mask, base, offset});
}

void reverse_bits(Decoder& d) {
  const Type type = d.require_type();
  if (type != Type::kB32 && type != Type::kB64) d.fail("brev needs .b32 or .b64");
  with_bits(d, type, [&]<class T>(T) {
    emit_map<T, T>(d, type, [](T a) {
      T r = 0;
      for (unsigned k = 0; k < 8 * sizeof(T); ++k) r = static_cast<T>(r << 1 | (a >> k & 1));
      return r;
    });
  });
}

void extract_field(Decoder& d) {
  const Type type = d.require_type();
  d.expect_operands(4, 4);
  const uint32_t a = d.source(1, type), b = d.source(2, Type::kU32), c = d.source(3, Type::kU32),
                 r = d.destination(0, type);
  with_integer(d, type, [&]<class T>(T) {
    if constexpr (sizeof(T) < 4) d.fail("bfe needs a 32- or 64-bit type");
    d.emit(
        map<T, T, uint32_t, uint32_t>([](T a, uint32_t position, uint32_t length) -> T {
          constexpr uint32_t kBits = 8 * sizeof(T);
          position &= 0xff, length &= 0xff;
          using U = Unsigned<T>;
          if (length == 0) return 0;
          const uint32_t sign_at = std::min(position + length - 1, kBits - 1);
          const bool negative = std::is_signed_v<T> && (static_cast<U>(a) >> sign_at & 1);
          const U bits = position >= kBits ? U{0} : static_cast<U>(static_cast<U>(a) >> position);
          const uint32_t available = position >= kBits ? 0 : std::min(length, kBits - position);
          const U field = available == 0 ? U{0} : available >= kBits ? ~U{0} : static_cast<U>((U{1} << available) - 1);
          return static_cast<T>((bits & field) | (negative ? ~field : U{0}));
        }),
        {r, a, b, c});
  });
}

void insert_field(Decoder& d) {
  const Type type = d.require_type();
  if (type != Type::kB32 && type != Type::kB64) d.fail("bfi needs .b32 or .b64");
  d.expect_operands(5, 5);
  const uint32_t a = d.source(1, type), b = d.source(2, type), p = d.source(3, Type::kU32), n = d.source(4, Type::kU32),
                 r = d.destination(0, type);
  with_bits(d, type, [&]<class T>(T) {
    d.emit(map<T, T, T, uint32_t, uint32_t>([](T a, T b, uint32_t position, uint32_t length) -> T {
             constexpr uint32_t kBits = 8 * sizeof(T);
             position &= 0xff, length &= 0xff;
             if (position >= kBits || length == 0) return b;
             const T ones = length >= kBits ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << length) - 1);
             const T field = static_cast<T>(ones << position);
             return static_cast<T>((b & ~field) | (static_cast<T>(a << position) & field));
           }),
           {r, a, b, p, n});
  });
}

void sign_extend_field(Decoder& d) {
  const bool wrap = d.modifiers().take_one({"clamp", "wrap"}) == 1;
  const Type type = d.require_type();
  if (type != Type::kU32 && type != Type::kS32) d.fail("szext needs .u32 or .s32");
  const bool is_signed_field = type == Type::kS32;
  d.expect_operands(3, 3);
  const uint32_t a = d.source(1, type), b = d.source(2, Type::kU32);
  const auto unsigned_field = [](uint32_t a, uint32_t n) { return n >= 32 ? a : n == 0 ? 0 : a & ((1u << n) - 1); };
  const auto signed_field = [](uint32_t a, uint32_t n) {
    return n >= 32 ? a : n == 0 ? 0 : static_cast<uint32_t>(static_cast<int32_t>(a << (32 - n)) >> (32 - n));
  };
  uint32_t length = b;
  if (wrap) d.emit(map<uint32_t, uint32_t>([](uint32_t n) { return n & 31; }), {length = d.temporary(4), b});
  d.emit(is_signed_field ? map<uint32_t, uint32_t, uint32_t>(signed_field)
                         : map<uint32_t, uint32_t, uint32_t>(unsigned_field),
         {d.destination(0, type), a, length});
}

void bit_mask(Decoder& d) {
  const int mode = d.modifiers().take_one({"clamp", "wrap"});
  if (mode < 0) d.fail("bmsk needs .clamp or .wrap");
  if (d.require_type() != Type::kB32) d.fail("bmsk needs .b32");
  if (mode == 0)
    return emit_map<uint32_t, uint32_t, uint32_t>(d, Type::kB32, [](uint32_t at, uint32_t length) {
      if (at > 31 || length == 0) return 0u;
      return (length >= 32 ? ~0u : (1u << length) - 1) << at;
    });
  emit_map<uint32_t, uint32_t, uint32_t>(
      d, Type::kB32, [](uint32_t at, uint32_t length) { return ((1u << (length & 31)) - 1) << (at & 31); });
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

// and, or, xor, not: on bits or predicates.
template <class Op>
void logic(Decoder& d, Op) {
  const Type type = d.require_type();
  if (type == Type::kPred) {
    d.expect_operands(3, 3);
    const uint32_t a = d.predicate(d.operand(1)), b = d.predicate(d.operand(2));
    d.emit(
        [](Warp& w, const Instruction& i) {
          uint32_t& r = w.predicate(i.slots[0]);
          r = (r & ~w.active) | (Op{}(w.predicate(i.slots[1]), w.predicate(i.slots[2])) & w.active);
        },
        {d.destination(0, type), a, b});
    return;
  }
  if (type < Type::kB16 || type > Type::kB64) d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  with_bits(d, type,
            [&]<class T>(T) { emit_map<T, T, T>(d, type, [](T a, T b) { return static_cast<T>(Op{}(a, b)); }); });
}

void invert(Decoder& d) {
  const Type type = d.require_type();
  if (type == Type::kPred) {
    d.expect_operands(2, 2);
    const uint32_t a = d.predicate(d.operand(1));
    d.emit(
        [](Warp& w, const Instruction& i) {
          uint32_t& r = w.predicate(i.slots[0]);
          r = (r & ~w.active) | (~w.predicate(i.slots[1]) & w.active);
        },
        {d.destination(0, type), a});
    return;
  }
  if (type < Type::kB16 || type > Type::kB64) d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  with_bits(d, type, [&]<class T>(T) { emit_map<T, T>(d, type, [](T a) { return static_cast<T>(~a); }); });
}

void logical_not(Decoder& d) {
  const Type type = d.require_type();
  if (type < Type::kB16 || type > Type::kB64) d.fail("cnot needs untyped bits");
  with_bits(d, type, [&]<class T>(T) { emit_map<T, T>(d, type, [](T a) { return static_cast<T>(a == 0); }); });
}

// Any function of three bits: the sum of the minterms that the table names.
void lop3_run(Warp& w, const Instruction& i) {
  uint32_t* d = w.lanes<uint32_t>(i.slots[0]);
  const uint32_t *a = w.lanes<uint32_t>(i.slots[1]), *b = w.lanes<uint32_t>(i.slots[2]),
                 *c = w.lanes<uint32_t>(i.slots[3]);
  uint32_t minterm[8];
  for (int k = 0; k < 8; ++k) minterm[k] = i.immediate >> k & 1 ? ~0u : 0u;
  alignas(64) uint32_t r[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t low_b =
        (b[l] & ((c[l] & minterm[3]) | (~c[l] & minterm[2]))) | (~b[l] & ((c[l] & minterm[1]) | (~c[l] & minterm[0])));
    const uint32_t high_b =
        (b[l] & ((c[l] & minterm[7]) | (~c[l] & minterm[6]))) | (~b[l] & ((c[l] & minterm[5]) | (~c[l] & minterm[4])));
    r[l] = (a[l] & high_b) | (~a[l] & low_b);
  }
  store_lanes(d, r, w.active);
}

void lop3(Decoder& d) {
  if (d.require_type() != Type::kB32) d.fail("lop3 needs .b32");
  d.expect_operands(5, 5);
  if (d.operand(4).kind != Operand::Kind::kInteger || d.operand(4).bits > 255)
    d.fail("lop3's table must be a constant up to 255");
  const uint32_t a = d.source(1, Type::kB32), b = d.source(2, Type::kB32), c = d.source(3, Type::kB32);
  d.emit(lop3_run, {d.destination(0, Type::kB32), a, b, c}, static_cast<int64_t>(d.operand(4).bits));
}

// Shift amounts beyond the width count as the width.
template <bool kLeft>
void shift(Decoder& d) {
  const Type type = d.require_type();
  d.expect_operands(3, 3);
  const uint32_t a = d.source(1, type), b = d.source(2, Type::kU32), r = d.destination(0, type);
  if (kLeft ? type < Type::kB16 || type > Type::kB64 : type_bits(type) < 16 || type == Type::kPred || is_float(type))
    d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  const auto go = [&]<class T>(T) {
    d.emit(map<T, T, uint32_t>([](T a, uint32_t n) -> T {
             constexpr uint32_t kBits = 8 * sizeof(T);
             if (kLeft) return n >= kBits ? T{0} : static_cast<T>(static_cast<Unsigned<T>>(a) << n);
             return n >= kBits ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> n);
           }),
           {r, a, b});
  };
  if (!kLeft && is_signed(type))
    with_integer(d, type, go);
  else
    with_bits(d, type, go);
}

void funnel_shift(Decoder& d) {
  const int direction = d.modifiers().take_one({"l", "r"}), mode = d.modifiers().take_one({"clamp", "wrap"});
  if (direction < 0 || mode < 0) d.fail("shf needs .l or .r, and .clamp or .wrap");
  if (d.require_type() != Type::kB32) d.fail("shf needs .b32");
  const Type t = Type::kB32;
  if (direction == 0 && mode == 0)
    return emit_map<uint32_t, uint32_t, uint32_t, uint32_t>(d, t, [](uint32_t a, uint32_t b, uint32_t c) {
      const uint32_t n = std::min(c, 32u);
      return static_cast<uint32_t>(((uint64_t{b} << 32 | a) << n) >> 32);
    });
  if (direction == 0)
    return emit_map<uint32_t, uint32_t, uint32_t, uint32_t>(d, t, [](uint32_t a, uint32_t b, uint32_t c) {
      return static_cast<uint32_t>(((uint64_t{b} << 32 | a) << (c & 31)) >> 32);
    });
  if (mode == 0)
    return emit_map<uint32_t, uint32_t, uint32_t, uint32_t>(d, t, [](uint32_t a, uint32_t b, uint32_t c) {
      return static_cast<uint32_t>((uint64_t{b} << 32 | a) >> std::min(c, 32u));
    });
  emit_map<uint32_t, uint32_t, uint32_t, uint32_t>(d, t, [](uint32_t a, uint32_t b, uint32_t c) {
    return static_cast<uint32_t>((uint64_t{b} << 32 | a) >> (c & 31));
  });
}

uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t s = selector >> (4 * k);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << (8 * k);
  }
  return r;
}

void permute(Decoder& d) {
  const Type type = d.require_type();
  const int mode = d.modifiers().take_one({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  if (type != Type::kB32) d.fail("prmt needs .b32");
  const auto go = [&](auto op) { emit_map<uint32_t, uint32_t, uint32_t, uint32_t>(d, type, op); };
  // The special modes choose one of four selectors by the low two bits.
  switch (mode) {
    case 0:
      return go([](uint32_t a, uint32_t b, uint32_t c) {
        constexpr uint32_t s[4] = {0x3210, 0x4321, 0x5432, 0x6543};
        return pick_bytes(a, b, s[c & 3]);
      });
    case 1:
      return go([](uint32_t a, uint32_t b, uint32_t c) {
        constexpr uint32_t s[4] = {0x5670, 0x6701, 0x7012, 0x0123};
        return pick_bytes(a, b, s[c & 3]);
      });
    case 2:
      return go([](uint32_t a, uint32_t b, uint32_t c) {
        constexpr uint32_t s[4] = {0x0000, 0x1111, 0x2222, 0x3333};
        return pick_bytes(a, b, s[c & 3]);
      });
    case 3:
      return go([](uint32_t a, uint32_t b, uint32_t c) {
        constexpr uint32_t s[4] = {0x3210, 0x3211, 0x3222, 0x3333};
        return pick_bytes(a, b, s[c & 3]);
      });
    case 4:
      return go([](uint32_t a, uint32_t b, uint32_t c) {
        constexpr uint32_t s[4] = {0x0000, 0x1110, 0x2210, 0x3210};
        return pick_bytes(a, b, s[c & 3]);
      });
    case 5:
      return go([](uint32_t a, uint32_t b, uint32_t c) {
        constexpr uint32_t s[4] = {0x1010, 0x3232, 0x1010, 0x3232};
        return pick_bytes(a, b, s[c & 3]);
      });
    default:
      return go([](uint32_t a, uint32_t b, uint32_t c) { return pick_bytes(a, b, c); });
  }
}

// Comparisons: each to a mask of lanes.
enum class Compare : uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <class T, Compare kOp>
void compare_run(Warp& w, const Instruction& i) {
  const T *a = w.lanes<T>(i.slots[1]), *b = w.lanes<T>(i.slots[2]);
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) {
    const T x = a[l], y = b[l];
    bool r;
    if constexpr (kOp == Compare::kEq)
      r = x == y;
    else if constexpr (kOp == Compare::kNe)
      r = std::is_floating_point_v<T> ? (x < y) | (x > y) : x != y;
    else if constexpr (kOp == Compare::kLt)
      r = x < y;
    else if constexpr (kOp == Compare::kLe)
      r = x <= y;
    else if constexpr (kOp == Compare::kGt)
      r = x > y;
    else if constexpr (kOp == Compare::kGe)
      r = x >= y;
    else if constexpr (kOp == Compare::kEqu)
      r = !((x < y) | (x > y));
    else if constexpr (kOp == Compare::kNeu)
      r = !(x == y);
    else if constexpr (kOp == Compare::kLtu)
      r = !(x >= y);
    else if constexpr (kOp == Compare::kLeu)
      r = !(x > y);
    else if constexpr (kOp == Compare::kGtu)
      r = !(x <= y);
    else if constexpr (kOp == Compare::kGeu)
      r = !(x < y);
    else if constexpr (kOp == Compare::kNum)
      r = (x == x) & (y == y);
    else
      r = !((x == x) & (y == y));
    mask |= static_cast<uint32_t>(r) << l;
  }
  uint32_t& p = w.predicate(i.slots[0]);
  p = (p & ~w.active) | (mask & w.active);
}

template <class T>
Handler comparison(Compare op) {
  using enum Compare;
  if constexpr (std::is_floating_point_v<T>) {
    static constexpr Handler handlers[] = {
        compare_run<T, kEq>,  compare_run<T, kNe>,  compare_run<T, kLt>,  compare_run<T, kLe>,  compare_run<T, kGt>,
        compare_run<T, kGe>,  compare_run<T, kEqu>, compare_run<T, kNeu>, compare_run<T, kLtu>, compare_run<T, kLeu>,
        compare_run<T, kGtu>, compare_run<T, kGeu>, compare_run<T, kNum>, compare_run<T, kNan>};
    return handlers[static_cast<size_t>(op)];
  } else {
    static constexpr Handler handlers[] = {compare_run<T, kEq>, compare_run<T, kNe>, compare_run<T, kLt>,
                                           compare_run<T, kLe>, compare_run<T, kGt>, compare_run<T, kGe>};
    return handlers[static_cast<size_t>(op)];
  }
}

struct Comparison {
  std::string name;
  int bool_op;  // and, or, xor, or -1
  bool flush;
};

Comparison take_comparison(Decoder& d) {
  Comparison c;
  c.name = d.modifiers().take_next();
  c.bool_op = d.modifiers().take_one({"and", "or", "xor"});
  c.flush = d.modifiers().take("ftz");
  return c;
}

// Emits the comparison of two slots into a predicate slot.
void emit_compare(Decoder& d, const Comparison& c, Type type, uint32_t result, uint32_t a, uint32_t b) {
  static constexpr std::string_view kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                                "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  static constexpr std::string_view kUnsignedNames[] = {"lo", "ls", "hi", "hs"};
  int op = -1;
  for (int k = 0; k < 14; ++k)
    if (c.name == kNames[k]) op = k;
  const bool is_unsigned = type >= Type::kU16 && type <= Type::kU64, is_bits = type >= Type::kB16 && type <= Type::kB64;
  for (int k = 0; k < 4; ++k)
    if (c.name == kUnsignedNames[k] && is_unsigned) op = 2 + k;
  const bool floating = type == Type::kF16 || type == Type::kBf16 || type == Type::kF32 || type == Type::kF64;
  if (op < 0 || (!floating && op > 5) || (is_bits && op > 1))
    d.fail("comparison '." + c.name + "' is not possible for ." + std::string(type_name(type)));
  if (c.flush && type != Type::kF32 && type != Type::kF16) d.fail(".ftz is not possible here");
  const Compare compare = static_cast<Compare>(op);
  if (type == Type::kF32 && c.flush) {
    const uint32_t fa = d.temporary(4), fb = d.temporary(4);
    d.emit(map<float, float>([](float x) { return flush(x); }), {fa, a});
    d.emit(map<float, float>([](float x) { return flush(x); }), {fb, b});
    a = fa, b = fb;
  }
  if (type == Type::kF16 || type == Type::kBf16) {
    const uint32_t wa = d.temporary(4), wb = d.temporary(4);
    const Handler handler = type == Type::kF16 ? map<float, Half>([](Half h) { return widen(h); })
                                               : map<float, Bfloat>([](Bfloat h) { return widen(h); });
    d.emit(handler, {wa, a});
    d.emit(handler, {wb, b});
    d.emit(comparison<float>(compare), {result, wa, wb});
    return;
  }
  if (type == Type::kF32)
    d.emit(comparison<float>(compare), {result, a, b});
  else if (type == Type::kF64)
    d.emit(comparison<double>(compare), {result, a, b});
  else if (is_signed(type))
    with_integer(d, type, [&]<class T>(T) { d.emit(comparison<T>(compare), {result, a, b}); });
  else if (is_unsigned || is_bits)
    with_bits(d, type, [&]<class T>(T) { d.emit(comparison<T>(compare), {result, a, b}); });
  else
    d.fail("type ." + std::string(type_name(type)) + " is not possible here");
}

// p = comparison [op c], q = !comparison [op c]
void combine(Decoder& d, int bool_op, uint32_t result, uint32_t compared, bool inverted, uint32_t with) {
  static constexpr Handler kHandlers[3] = {
      [](Warp& w, const Instruction& i) {
        uint32_t& r = w.predicate(i.slots[0]);
        r = (r & ~w.active) |
            ((w.predicate(i.slots[1]) ^ static_cast<uint32_t>(i.immediate)) & w.predicate(i.slots[2]) & w.active);
      },
      [](Warp& w, const Instruction& i) {
        uint32_t& r = w.predicate(i.slots[0]);
        r = (r & ~w.active) |
            (((w.predicate(i.slots[1]) ^ static_cast<uint32_t>(i.immediate)) | w.predicate(i.slots[2])) & w.active);
      },
      [](Warp& w, const Instruction& i) {
        uint32_t& r = w.predicate(i.slots[0]);
        r = (r & ~w.active) |
            (((w.predicate(i.slots[1]) ^ static_cast<uint32_t>(i.immediate)) ^ w.predicate(i.slots[2])) & w.active);
      }};
  d.emit(kHandlers[bool_op < 0 ? 0 : bool_op], {result, compared, with}, inverted ? int64_t{kAllLanes} : 0);
}

// The two halves of a packed operand, each in a 16-bit temporary.
std::pair<uint32_t, uint32_t> halves(Decoder& d, uint32_t packed) {
  const uint32_t low = d.temporary(2), high = d.temporary(2);
  d.emit(map<uint16_t, uint32_t>([](uint32_t x) { return static_cast<uint16_t>(x); }), {low, packed});
  d.emit(map<uint16_t, uint32_t>([](uint32_t x) { return static_cast<uint16_t>(x >> 16); }), {high, packed});
  return {low, high};
}

void set_predicate(Decoder& d) {
  Comparison c = take_comparison(d);
  const Type type = d.require_type();
  const bool boolean = c.bool_op >= 0;
  d.expect_operands(boolean ? 4 : 3, boolean ? 4 : 3);
  const uint32_t a = d.source(1, type), b = d.source(2, type);
  const uint32_t with = boolean ? d.predicate(d.operand(3)) : d.constant(kAllLanes, 0);
  const Operand& pair = d.statement().pairs[0];
  const uint32_t p = d.destination(d.operand(0), 0);
  if (type == Type::kF16x2 || type == Type::kBf16x2) {
    // Both halves are compared: p has the low one, q the high.
    if (pair.kind == Operand::Kind::kSink) d.fail("a packed comparison needs p|q");
    const Type scalar = type == Type::kF16x2 ? Type::kF16 : Type::kBf16;
    const auto [a0, a1] = halves(d, a);
    const auto [b0, b1] = halves(d, b);
    const uint32_t low = d.temporary(0), high = d.temporary(0);
    emit_compare(d, c, scalar, low, a0, b0);
    emit_compare(d, c, scalar, high, a1, b1);
    combine(d, c.bool_op, p, low, false, with);
    return combine(d, c.bool_op, d.destination(pair, 0), high, false, with);
  }
  if (!boolean && pair.kind == Operand::Kind::kSink) return emit_compare(d, c, type, p, a, b);
  const uint32_t compared = d.temporary(0);
  emit_compare(d, c, type, compared, a, b);
  // The source predicate may be a destination, too.
  uint32_t kept = with;
  if (pair.kind != Operand::Kind::kSink && boolean)
    d.emit([](Warp& w, const Instruction& i) { w.predicate(i.slots[0]) = w.predicate(i.slots[1]); },
           {kept = d.temporary(0), with});
  combine(d, c.bool_op, p, compared, false, kept);
  if (pair.kind != Operand::Kind::kSink) combine(d, c.bool_op, d.destination(pair, 0), compared, true, kept);
}

template <class T>
void select_run(Warp& w, const Instruction& i) {
  T* d = w.lanes<T>(i.slots[0]);
  const T *a = w.lanes<T>(i.slots[1]), *b = w.lanes<T>(i.slots[2]);
  const uint32_t p = w.predicate(i.slots[3]);
  alignas(64) T r[kLanes];
  for (int l = 0; l < kLanes; ++l) r[l] = p >> l & 1 ? a[l] : b[l];
  store_lanes(d, r, w.active);
}

void emit_select(Decoder& d, int width, uint32_t result, uint32_t a, uint32_t b, uint32_t p) {
  d.emit(width == 2   ? select_run<uint16_t>
         : width == 4 ? select_run<uint32_t>
                      : select_run<uint64_t>,
         {result, a, b, p});
}

// set: the value for "true" is all ones for integers and one for floating-point types.
void set_value(Decoder& d) {
  Comparison c = take_comparison(d);
  const Type result = d.require_type(), type = d.require_type();
  const bool boolean = c.bool_op >= 0;
  d.expect_operands(boolean ? 4 : 3, boolean ? 4 : 3);
  const bool packed = type == Type::kF16x2 || type == Type::kBf16x2;
  const uint32_t a = d.source(1, type), b = d.source(2, type),
                 with = boolean ? d.predicate(d.operand(3)) : d.constant(kAllLanes, 0);
  const auto truth = [&](Type t) -> uint64_t {
    switch (t) {
      case Type::kU16:
      case Type::kS16:
        return 0xffff;
      case Type::kU32:
      case Type::kS32:
        return 0xffffffff;
      case Type::kF32:
        return 0x3f800000;
      case Type::kF16:
        return 0x3c00;
      case Type::kBf16:
        return 0x3f80;
      default:
        d.fail("a result of type ." + std::string(type_name(t)) + " is not possible here");
    }
  };
  if (packed) {
    const Type scalar = type == Type::kF16x2 ? Type::kF16 : Type::kBf16;
    if (result != type && result != Type::kU32 && result != Type::kS32)
      d.fail("a result of type ." + std::string(type_name(result)) + " is not possible here");
    const uint64_t one = truth(result == type ? scalar : Type::kU16);
    const auto [a0, a1] = halves(d, a);
    const auto [b0, b1] = halves(d, b);
    const uint32_t low = d.temporary(0), high = d.temporary(0), low_value = d.temporary(4), high_value = d.temporary(4),
                   zero = d.constant(0, 4);
    emit_compare(d, c, scalar, low, a0, b0);
    emit_compare(d, c, scalar, high, a1, b1);
    combine(d, c.bool_op, low, low, false, with);
    combine(d, c.bool_op, high, high, false, with);
    emit_select(d, 4, low_value, d.constant(one, 4), zero, low);
    emit_select(d, 4, high_value, d.constant(one << 16, 4), zero, high);
    d.emit(map<uint32_t, uint32_t, uint32_t>([](uint32_t x, uint32_t y) { return x | y; }),
           {d.destination(0, result), low_value, high_value});
    return;
  }
  const uint64_t one = truth(result);
  const int width = type_bytes(result);
  const uint32_t p = d.temporary(0);
  emit_compare(d, c, type, p, a, b);
  combine(d, c.bool_op, p, p, false, with);
  emit_select(d, width, d.destination(0, result), d.constant(one, width), d.constant(0, width), p);
}

void select_predicated(Decoder& d) {
  const Type type = d.require_type();
  d.expect_operands(4, 4);
  if (type_bits(type) < 16) d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  const uint32_t a = d.source(1, type), b = d.source(2, type), p = d.predicate(d.operand(3));
  emit_select(d, type_bytes(type), d.destination(0, type), a, b, p);
}

void select_by_sign(Decoder& d) {
  const bool ftz = d.modifiers().take("ftz");
  const Type type = d.require_type(), sign = d.require_type();
  d.expect_operands(4, 4);
  const uint32_t a = d.source(1, type), b = d.source(2, type), c = d.source(3, sign), p = d.temporary(0);
  if (sign != Type::kS32 && sign != Type::kF32) d.fail("slct needs .s32 or .f32");
  emit_compare(d, {"ge", -1, ftz}, sign, p, c, d.constant(0, 4));
  emit_select(d, type_bytes(type), d.destination(0, type), a, b, p);
}

template <class T>
void copy_run(Warp& w, const Instruction& i) {
  T* d = w.lanes<T>(i.slots[0]);
  const T* a = w.lanes<T>(i.slots[1]);
  if (w.active == kAllLanes)
    std::memcpy(d, a, sizeof(T) * kLanes);
  else
    store_lanes(d, a, w.active);
}

// mov between one register and a vector of smaller ones; slots: the wide register, then the parts from the low end.
template <class Whole, class Part, bool kPack>
void pack_run(Warp& w, const Instruction& i) {
  Whole* whole = w.lanes<Whole>(i.slots[0]);
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  alignas(64) Whole value[kLanes];
  if constexpr (kPack) {
    for (int l = 0; l < kLanes; ++l) value[l] = 0;
    for (int k = 0; k < kParts; ++k) {
      const Part* part = w.lanes<Part>(i.slots[1 + k]);
      for (int l = 0; l < kLanes; ++l)
        value[l] |= static_cast<Whole>(static_cast<Whole>(part[l]) << (8 * sizeof(Part) * k));
    }
    store_lanes(whole, value, w.active);
  } else {
    std::memcpy(value, whole, sizeof(value));
    for (int k = 0; k < kParts; ++k) {
      Part* part = w.lanes<Part>(i.slots[1 + k]);
#pragma GCC ivdep
      for (int l = 0; l < kLanes; ++l)
        if (w.active >> l & 1) part[l] = static_cast<Part>(value[l] >> (8 * sizeof(Part) * k));
    }
  }
}

template <bool kPack>
void move_vector(Decoder& d, Type type) {
  const Operand& vector = d.operand(kPack ? 1 : 0);
  const size_t parts = vector.elements.size();
  const int whole = type_bytes(type);
  if (parts == 0 || whole % static_cast<int>(parts) != 0) d.fail("the vector does not fill the register");
  const int part = whole / static_cast<int>(parts);
  std::vector<uint32_t> slots;
  const Type part_type = part == 1 ? Type::kB8 : part == 2 ? Type::kB16 : Type::kB32;
  slots.push_back(kPack ? d.destination(0, type) : d.source(1, type));
  for (const Operand& element : vector.elements)
    slots.push_back(kPack ? d.source(element, part_type) : d.destination(element, part));
  Handler handler = nullptr;
  if (whole == 2 && part == 1) handler = pack_run<uint16_t, uint8_t, kPack>;
  if (whole == 4 && part == 2) handler = pack_run<uint32_t, uint16_t, kPack>;
  if (whole == 4 && part == 1) handler = pack_run<uint32_t, uint8_t, kPack>;
  if (whole == 8 && part == 4) handler = pack_run<uint64_t, uint32_t, kPack>;
  if (whole == 8 && part == 2) handler = pack_run<uint64_t, uint16_t, kPack>;
  if (whole == 8 && part == 1) handler = pack_run<uint64_t, uint8_t, kPack>;
  if (!handler) d.fail("this packing is not possible");
  d.emit(handler, slots);
}

void move(Decoder& d) {
  const Type type = d.require_type();
  d.expect_operands(2, 2);
  const Operand& from = d.operand(1);
  if (type == Type::kPred) {
    const uint32_t a = d.predicate(from);
    d.emit(
        [](Warp& w, const Instruction& i) {
          uint32_t& r = w.predicate(i.slots[0]);
          r = (r & ~w.active) | (w.predicate(i.slots[1]) & w.active);
        },
        {d.destination(0, type), a});
    return;
  }
  if (from.kind == Operand::Kind::kVector) return move_vector<true>(d, type);
  if (d.operand(0).kind == Operand::Kind::kVector) return move_vector<false>(d, type);
  const uint32_t r = d.destination(0, type);
  if (from.kind == Operand::Kind::kSpecial) {
    // The clock counts the warp's own instructions: it never goes back, and repeats from run to run.
    if (from.name == "%clock64" || from.name == "%clock" || from.name == "%clock_hi") {
      if (type_bytes(type) != (from.name == "%clock64" ? 8 : 4)) d.fail("'" + from.name + "' has another width");
      const int64_t shift = from.name == "%clock_hi" ? 32 : 0;
      d.emit(type_bytes(type) == 8 ? Handler{[](Warp& w, const Instruction& i) {
               alignas(64) uint64_t v[kLanes];
               for (uint64_t& x : v) x = w.issued;
               store_lanes(w.lanes<uint64_t>(i.slots[0]), v, w.active);
             }}
                                   : Handler{[](Warp& w, const Instruction& i) {
                                       alignas(64) uint32_t v[kLanes];
                                       for (uint32_t& x : v) x = static_cast<uint32_t>(w.issued >> i.immediate);
                                       store_lanes(w.lanes<uint32_t>(i.slots[0]), v, w.active);
                                     }},
             {r}, shift);
      return;
    }
    if (from.name == "%globaltimer" || from.name == "%globaltimer_lo" || from.name == "%globaltimer_hi") {
      if (type_bytes(type) != (from.name == "%globaltimer" ? 8 : 4)) d.fail("'" + from.name + "' has another width");
      const int64_t shift = from.name == "%globaltimer_hi" ? 32 : 0;
      d.emit(type_bytes(type) == 8 ? Handler{[](Warp& w, const Instruction& i) {
               timespec now{};
               clock_gettime(CLOCK_MONOTONIC, &now);
               alignas(64) uint64_t v[kLanes];
               for (uint64_t& x : v)
                 x = static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
               store_lanes(w.lanes<uint64_t>(i.slots[0]), v, w.active);
             }}
                                   : Handler{[](Warp& w, const Instruction& i) {
                                       timespec now{};
                                       clock_gettime(CLOCK_MONOTONIC, &now);
                                       const uint64_t time = static_cast<uint64_t>(now.tv_sec) * 1000000000u +
                                                             static_cast<uint64_t>(now.tv_nsec);
                                       alignas(64) uint32_t v[kLanes];
                                       for (uint32_t& x : v) x = static_cast<uint32_t>(time >> i.immediate);
                                       store_lanes(w.lanes<uint32_t>(i.slots[0]), v, w.active);
                                     }},
             {r}, shift);
      return;
    }
  }
  // Addresses in the frame's local memory and in parameter space are relative to where those begin.
  if (from.kind == Operand::Kind::kVariable &&
      (d.code().local_offsets.contains(from.variable) || from.variable->space == Space::kParam)) {
    Operand wrapped;
    wrapped.kind = Operand::Kind::kAddress;
    wrapped.elements.push_back(from);
    wrapped.offset = from.offset;
    const Decoder::Address address = d.address(wrapped, Space::kGeneric);
    if (type_bytes(type) == 4)
      d.emit(map<uint32_t, uint64_t, uint32_t>([](uint64_t a, uint32_t b) { return static_cast<uint32_t>(a) + b; }),
             {r, address.base, d.constant(static_cast<uint64_t>(address.offset), 4)});
    else
      d.emit(map<uint64_t, uint64_t, uint64_t>([](uint64_t a, uint64_t b) { return a + b; }),
             {r, address.base, d.constant(static_cast<uint64_t>(address.offset), 8)});
    return;
  }
  if (from.kind == Operand::Kind::kLabel || type == Type::kB8) d.fail("unexpected operand");
  const uint32_t a = d.source(1, type);
  with_bits(d, type, [&]<class T>(T) { d.emit(copy_run<T>, {r, a}); });
}

// Shared and local addresses are offsets in their own space, and lie in a window of the generic one.
void convert_address(Decoder& d) {
  const bool from_generic = d.modifiers().take("to");
  const Space space = d.modifiers().take_space();
  const Type type = d.require_type();
  if (space == Space::kGeneric) d.fail("cvta needs a state space");
  if (type != Type::kU64 && type != Type::kU32) d.fail("cvta needs .u64");
  d.expect_operands(2, 2);
  const Operand& from = d.operand(1);
  uint32_t a;
  if (from.kind == Operand::Kind::kVariable &&
      (d.code().local_offsets.contains(from.variable) || from.variable->space == Space::kParam)) {
    Operand wrapped;
    wrapped.kind = Operand::Kind::kAddress;
    wrapped.elements.push_back(from);
    wrapped.offset = from.offset;
    const Decoder::Address address = d.address(wrapped, Space::kGeneric);
    a = d.temporary(8);
    d.emit(map<uint64_t, uint64_t, uint64_t>([](uint64_t x, uint64_t y) { return x + y; }),
           {a, address.base, d.constant(static_cast<uint64_t>(address.offset), 8)});
  } else {
    a = d.source(1, type);
  }
  const uint32_t r = d.destination(0, type);
  if (type == Type::kU32) {
    d.emit(copy_run<uint32_t>, {r, a});
    return;
  }
  uint64_t window = 0;
  if (space == Space::kShared) window = kSharedWindow;
  if (space == Space::kLocal || (space == Space::kParam && !d.code().entry)) window = kLocalWindow;
  d.emit(map<uint64_t, uint64_t, uint64_t>([](uint64_t x, uint64_t y) { return x + y; }),
         {r, a, d.constant(from_generic ? 0 - window : window, 8)});
}

template <bool kWindow, uint64_t kBase>
void is_space_run(Warp& w, const Instruction& i) {
  const uint64_t* a = w.lanes<uint64_t>(i.slots[1]);
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t window = a[l] & kWindowMask;
    const bool inside = kWindow ? window == kBase : window != kSharedWindow && window != kLocalWindow;
    mask |= static_cast<uint32_t>(inside) << l;
  }
  uint32_t& p = w.predicate(i.slots[0]);
  p = (p & ~w.active) | (mask & w.active);
}

void is_space(Decoder& d) {
  const Space space = d.modifiers().take_space();
  d.expect_operands(2, 2);
  const uint32_t a = d.source(1, Type::kU64), p = d.destination(d.operand(0), 0);
  if (space == Space::kShared)
    d.emit(is_space_run<true, kSharedWindow>, {p, a});
  else if (space == Space::kLocal)
    d.emit(is_space_run<true, kLocalWindow>, {p, a});
  else if (space == Space::kGlobal)
    d.emit(is_space_run<false, 0>, {p, a});
  else
    d.fail("isspacep of this state space is not supported");
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
  t["popc"] = [](Decoder& d) { count_bits(d, [](auto a) { return static_cast<uint32_t>(std::popcount(a)); }); };
  t["clz"] = [](Decoder& d) { count_bits(d, [](auto a) { return static_cast<uint32_t>(std::countl_zero(a)); }); };
  t["bfind"] = find_bit;
  t["fns"] = find_nth_set;
  t["brev"] = reverse_bits;
  t["bfe"] = extract_field;
  t["bfi"] = insert_field;
  t["szext"] = sign_extend_field;
  t["bmsk"] = bit_mask;
  t["dp4a"] = dot<4>;
  t["dp2a"] = dot<2>;
  t["and"] = [](Decoder& d) { logic(d, [](auto a, auto b) { return a & b; }); };
  t["or"] = [](Decoder& d) { logic(d, [](auto a, auto b) { return a | b; }); };
  t["xor"] = [](Decoder& d) { logic(d, [](auto a, auto b) { return a ^ b; }); };
  t["not"] = invert;
  t["cnot"] = logical_not;
  t["lop3"] = lop3;
  t["shl"] = shift<true>;
  t["shr"] = shift<false>;
  t["shf"] = funnel_shift;
  t["prmt"] = permute;
  t["setp"] = set_predicate;
  t["set"] = set_value;
  t["selp"] = select_predicated;
  t["slct"] = select_by_sign;
  t["mov"] = move;
  t["cvta"] = convert_address;
  t["isspacep"] = is_space;
}

}  // namespace POP_ISA
}  // namespace pop::emulator
