// Comparison and selection (PTX ISA 9.7.6).
#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

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

}  // namespace

void register_compare(InstructionTable& t) {
  t["setp"] = set_predicate;
  t["set"] = set_value;
  t["selp"] = select_predicated;
  t["slct"] = select_by_sign;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
