// Instructions between the lanes of a warp (PTX ISA 9.7.9.5, 9.7.13). The scheduler has brought the lanes of the member
// mask together.
#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

// Emits a handler that runs once all lanes of the mask in `member_slot` have arrived: the mask is the first slot.
void emit_sync(Decoder& d, Handler handler, std::vector<uint32_t> slots, uint32_t members, int64_t immediate = 0) {
  slots.insert(slots.begin(), members);
  d.emit(handler, slots, immediate).kind = Kind::kWarpSync;
}

enum Vote { kAll, kAny, kUni, kBallot };

void vote_run(Warp& w, const Instruction& i) {
  const uint32_t members = w.lanes<uint32_t>(i.slots[0])[first_lane(w.active)] & w.active;
  const uint32_t p = w.predicate(i.slots[2]);
  const bool all = (p & members) == members, any = p & members;
  if (i.immediate == kBallot) {
    uint32_t* r = w.lanes<uint32_t>(i.slots[1]);
    for (int l = 0; l < kLanes; ++l)
      if (w.active >> l & 1) r[l] = p & members;
    return;
  }
  const bool result = i.immediate == kAll ? all : i.immediate == kAny ? any : all || !any;
  uint32_t& r = w.predicate(i.slots[1]);
  r = (r & ~w.active) | (result ? w.active : 0);
}

void vote(Decoder& d) {
  auto& m = d.modifiers();
  const bool sync = m.take("sync");
  const int mode = m.take_one({"all", "any", "uni", "ballot"});
  if (mode < 0) d.fail("vote needs a mode");
  const Type type = d.require_type();
  if (type != (mode == kBallot ? Type::kB32 : Type::kPred))
    d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  d.expect_operands(sync ? 3 : 2, sync ? 3 : 2);
  const uint32_t p = d.predicate(d.operand(1));
  const uint32_t r = d.destination(0, type);
  if (sync)
    emit_sync(d, vote_run, {r, p}, d.source(2, Type::kB32), mode);
  else
    d.emit(vote_run, {d.constant(kAllLanes, 4), r, p}, mode);
}

// slots: members, d, p, a, b, c
template <int kMode>  // up, down, bfly, idx
void shuffle_run(Warp& w, const Instruction& i) {
  uint32_t* d = w.lanes<uint32_t>(i.slots[1]);
  const uint32_t *a = w.lanes<uint32_t>(i.slots[3]), *b = w.lanes<uint32_t>(i.slots[4]),
                 *c = w.lanes<uint32_t>(i.slots[5]);
  alignas(64) uint32_t r[kLanes];
  uint32_t valid = 0;
  for (int l = 0; l < kLanes; ++l) {
    const int bval = static_cast<int>(b[l] & 31), cval = static_cast<int>(c[l] & 31),
              mask = static_cast<int>(c[l] >> 8 & 31);
    const int most = (l & mask) | (cval & ~mask), least = l & mask;
    int j;
    bool p;
    if constexpr (kMode == 0)
      j = l - bval, p = j >= most;
    else if constexpr (kMode == 1)
      j = l + bval, p = j <= most;
    else if constexpr (kMode == 2)
      j = l ^ bval, p = j <= most;
    else
      j = least | (bval & ~mask), p = j <= most;
    if (!p) j = l;
    r[l] = a[j & 31];
    valid |= static_cast<uint32_t>(p) << l;
  }
  store_lanes(d, r, w.active);
  uint32_t& p = w.predicate(i.slots[2]);
  p = (p & ~w.active) | (valid & w.active);
}

void shuffle(Decoder& d) {
  auto& m = d.modifiers();
  const bool sync = m.take("sync");
  const int mode = m.take_one({"up", "down", "bfly", "idx"});
  if (mode < 0) d.fail("shfl needs a mode");
  if (d.require_type() != Type::kB32) d.fail("shfl needs .b32");
  d.expect_operands(sync ? 5 : 4, sync ? 5 : 4);
  const uint32_t a = d.source(1, Type::kB32), b = d.source(2, Type::kB32), c = d.source(3, Type::kB32),
                 r = d.destination(0, Type::kB32);
  const Operand& pair = d.statement().pairs[0];
  const uint32_t p = pair.kind == Operand::Kind::kSink ? d.temporary(0) : d.destination(pair, 0);
  static constexpr Handler kHandlers[] = {shuffle_run<0>, shuffle_run<1>, shuffle_run<2>, shuffle_run<3>};
  if (sync)
    emit_sync(d, kHandlers[mode], {r, p, a, b, c}, d.source(4, Type::kB32));
  else
    d.emit(kHandlers[mode], {d.constant(kAllLanes, 4), r, p, a, b, c});
}

template <class T, bool kAllEqual>
void match_run(Warp& w, const Instruction& i) {
  const uint32_t members = w.lanes<uint32_t>(i.slots[0])[first_lane(w.active)] & w.active;
  const T* a = w.lanes<T>(i.slots[3]);
  uint32_t result[kLanes] = {}, valid = 0;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    uint32_t equal = 0;
    for (uint32_t n = members; n; n &= n - 1) equal |= static_cast<uint32_t>(a[first_lane(n)] == a[l]) << first_lane(n);
    const bool all = equal == members;
    result[l] = kAllEqual ? (all ? members : 0) : equal;
    valid |= static_cast<uint32_t>(all) << l;
  }
  store_lanes(w.lanes<uint32_t>(i.slots[1]), result, w.active);
  uint32_t& p = w.predicate(i.slots[2]);
  p = (p & ~w.active) | (valid & w.active);
}

void match(Decoder& d) {
  auto& m = d.modifiers();
  const int mode = m.take_one({"any", "all"});
  if (mode < 0 || !m.take("sync")) d.fail("match needs .any or .all, and .sync");
  const Type type = d.require_type();
  if (type != Type::kB32 && type != Type::kB64) d.fail("match needs .b32 or .b64");
  d.expect_operands(3, 3);
  const Operand& pair = d.statement().pairs[0];
  if (mode == 0 && pair.kind != Operand::Kind::kSink) d.fail("match.any has no predicate");
  const uint32_t a = d.source(1, type), r = d.destination(0, Type::kB32),
                 p = pair.kind == Operand::Kind::kSink ? d.temporary(0) : d.destination(pair, 0);
  const bool wide = type == Type::kB64;
  emit_sync(d,
            mode ? (wide ? match_run<uint64_t, true> : match_run<uint32_t, true>)
                 : (wide ? match_run<uint64_t, false> : match_run<uint32_t, false>),
            {r, p, a}, d.source(2, Type::kB32));
}

template <class T, class Op>
void reduce_run(Warp& w, const Instruction& i) {
  const uint32_t members = w.lanes<uint32_t>(i.slots[0])[first_lane(w.active)] & w.active;
  const T* a = w.lanes<T>(i.slots[2]);
  T result = a[first_lane(members)];
  for (uint32_t m = members & (members - 1); m; m &= m - 1) result = Op{}(result, a[first_lane(m)]);
  T* r = w.lanes<T>(i.slots[1]);
  for (int l = 0; l < kLanes; ++l)
    if (w.active >> l & 1) r[l] = result;
}

template <class T, class Op>
Handler reduction(Op) {
  return reduce_run<T, Op>;
}

void reduce(Decoder& d) {
  auto& m = d.modifiers();
  if (!m.take("sync")) d.fail("redux needs .sync");
  const int op = m.take_one({"add", "min", "max", "and", "or", "xor"});
  if (op < 0) d.fail("an operation is missing or unknown");
  const Type type = d.require_type();
  if (op < 3 ? type != Type::kU32 && type != Type::kS32 : type != Type::kB32)
    d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  d.expect_operands(3, 3);
  const uint32_t a = d.source(1, type);
  const auto s = [](auto f) { return f; };
  Handler handler = nullptr;
  const bool sign = type == Type::kS32;
  switch (op) {
    case 0:
      handler = reduction<uint32_t>(s([](uint32_t x, uint32_t y) { return x + y; }));
      break;
    case 1:
      handler = sign ? reduction<int32_t>([](int32_t x, int32_t y) { return std::min(x, y); })
                     : reduction<uint32_t>([](uint32_t x, uint32_t y) { return std::min(x, y); });
      break;
    case 2:
      handler = sign ? reduction<int32_t>([](int32_t x, int32_t y) { return std::max(x, y); })
                     : reduction<uint32_t>([](uint32_t x, uint32_t y) { return std::max(x, y); });
      break;
    case 3:
      handler = reduction<uint32_t>([](uint32_t x, uint32_t y) { return x & y; });
      break;
    case 4:
      handler = reduction<uint32_t>([](uint32_t x, uint32_t y) { return x | y; });
      break;
    default:
      handler = reduction<uint32_t>([](uint32_t x, uint32_t y) { return x ^ y; });
      break;
  }
  emit_sync(d, handler, {d.destination(0, type), a}, d.source(2, Type::kB32));
}

void active_mask(Decoder& d) {
  if (d.require_type() != Type::kB32) d.fail("activemask needs .b32");
  d.expect_operands(1, 1);
  d.emit(
      [](Warp& w, const Instruction& i) {
        uint32_t* r = w.lanes<uint32_t>(i.slots[0]);
        for (int l = 0; l < kLanes; ++l)
          if (w.active >> l & 1) r[l] = w.active;
      },
      {d.destination(0, Type::kB32)});
}

void elect(Decoder& d) {
  if (!d.modifiers().take("sync")) d.fail("elect needs .sync");
  d.expect_operands(2, 2);
  const Operand& pair = d.statement().pairs[0];
  const uint32_t r = d.destination(0, Type::kB32), p = d.destination(pair, 0);
  emit_sync(
      d,
      [](Warp& w, const Instruction& i) {
        const uint32_t members = w.lanes<uint32_t>(i.slots[0])[first_lane(w.active)] & w.active;
        const uint32_t leader = static_cast<uint32_t>(first_lane(members));
        uint32_t* r = w.lanes<uint32_t>(i.slots[1]);
        for (int l = 0; l < kLanes; ++l)
          if (w.active >> l & 1) r[l] = leader;
        uint32_t& p = w.predicate(i.slots[2]);
        p = (p & ~w.active) | (1u << leader & w.active);
      },
      {r, p}, d.source(1, Type::kB32));
}

}  // namespace

void register_warp(InstructionTable& t) {
  t["vote"] = vote;
  t["shfl"] = shuffle;
  t["match"] = match;
  t["redux"] = reduce;
  t["activemask"] = active_mask;
  t["elect"] = elect;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
