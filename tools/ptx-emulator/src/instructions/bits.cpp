// Bits: counts, fields, logic, shifts, permutation (PTX ISA 9.7.1, 9.7.8).
#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

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

}  // namespace

void register_bits(InstructionTable& t) {
  t["popc"] = [](Decoder& d) { count_bits(d, [](auto a) { return static_cast<uint32_t>(std::popcount(a)); }); };
  t["clz"] = [](Decoder& d) { count_bits(d, [](auto a) { return static_cast<uint32_t>(std::countl_zero(a)); }); };
  t["bfind"] = find_bit;
  t["fns"] = find_nth_set;
  t["brev"] = reverse_bits;
  t["bfe"] = extract_field;
  t["bfi"] = insert_field;
  t["szext"] = sign_extend_field;
  t["bmsk"] = bit_mask;
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
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
