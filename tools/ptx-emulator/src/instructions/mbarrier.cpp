// mbarriers (PTX ISA 9.7.13.15): objects in shared memory that count arrivals and the bytes of asynchronous copies.
#include "mbarrier.h"

#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

[[noreturn]] void fault(const char* what, uint64_t at, int lane, int code = kIllegalInstruction) {
  char text[160];
  std::snprintf(text, sizeof(text), "%s at shared address %llu (lane %d)", what, static_cast<unsigned long long>(at),
                lane);
  throw KernelFault{code, text};
}

// slots: address, destination (or the address again), operand (count, bytes, state or parity)
enum : uint32_t { kAddress, kResult, kOperand, kExpected };

uint8_t* object(const Warp& w, const Instruction& i, int lane, uint32_t& at) {
  uint64_t address = w.lanes<uint64_t>(i.slots[kAddress])[lane] + static_cast<uint64_t>(i.immediate);
  if ((address & kWindowMask) == kSharedWindow) address -= kSharedWindow;
  if (address % 8) fault("a misaligned mbarrier", address, lane, kMisalignedAddress);
  if (address + 8 > w.shared_bytes) fault("an mbarrier out of range", address, lane, kIllegalAddress);
  at = static_cast<uint32_t>(address);
  return w.shared + at;
}

Mbarrier load(const uint8_t* at) {
  uint64_t bits;
  std::memcpy(&bits, at, 8);
  return Mbarrier(bits);
}
void store(uint8_t* at, Mbarrier b) {
  const uint64_t bits = b.bits();
  std::memcpy(at, &bits, 8);
}

void initialise_run(Warp& w, const Instruction& i) {
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    uint32_t at;
    uint8_t* const p = object(w, i, l, at);
    const uint32_t count = w.lanes<uint32_t>(i.slots[kOperand])[l];
    if (w.observer && !w.observer->mbarrier(w, l, at, MbarrierUse::kInit, {count, 0, 0})) continue;
    if (count == 0 || count > Mbarrier::kMost) fault("an mbarrier with a count that is not 1 to 2^20 - 1", at, l);
    store(p, Mbarrier::initial(count));
  }
  ++w.writes;
}

void invalidate_run(Warp& w, const Instruction& i) {
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    uint32_t at;
    uint8_t* const p = object(w, i, l, at);
    if (w.observer && !w.observer->mbarrier(w, l, at, MbarrierUse::kInvalidate, {})) continue;
    if (!load(p).valid()) fault("an mbarrier that was not initialised", at, l);
    store(p, Mbarrier(0));
  }
}

// Arrivals, and bytes to expect or that came. How many arrive: Instruction::target; 0x100: drop, 0x200: with bytes.
template <MbarrierUse kUse>
void count_run(Warp& w, const Instruction& i) {
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    uint32_t at;
    uint8_t* const p = object(w, i, l, at);
    const uint32_t operand = w.lanes<uint32_t>(i.slots[kOperand])[l], bytes = w.lanes<uint32_t>(i.slots[kExpected])[l];
    MbarrierChange change;
    if (kUse == MbarrierUse::kArrive) change = {operand, bytes, i.target ? operand : 0};
    if (kUse == MbarrierUse::kExpect) change = {0, operand, 0};
    if (kUse == MbarrierUse::kComplete) change = {0, -int64_t{operand}, 0};
    if (kUse == MbarrierUse::kCopiesArrive) change = {1, 0, 0};
    if (w.observer && !w.observer->mbarrier(w, l, at, kUse, change)) continue;
    Mbarrier b = load(p);
    if (!b.valid()) fault("an mbarrier that was not initialised", at, l);
    const uint64_t before = b.bits();
    // Without .noinc, the phase waits for one arrival more, which is this one.
    const bool counted = kUse != MbarrierUse::kCopiesArrive || i.target;
    const auto outcome =
        b.apply(counted ? change.arrivals : 0, change.bytes, change.dropped, kUse != MbarrierUse::kExpect);
    if (outcome == Mbarrier::Outcome::kTooManyArrivals)
      fault("more arrivals than the phase waits for, mbarrier", at, l);
    if (outcome == Mbarrier::Outcome::kTooManyBytes) fault("more bytes than an mbarrier counts", at, l);
    store(p, b);
    ++w.writes;
    if (outcome == Mbarrier::Outcome::kCompleted) {
      ++w.phases;
      if (w.observer) w.observer->phase_completed(w, at);
    }
    if (kUse == MbarrierUse::kArrive) w.lanes<uint64_t>(i.slots[kResult])[l] = before;
  }
}

// Whether a phase is over: given by its parity (Instruction::target), or by the state that an arrival returned.
template <MbarrierUse kUse>
void wait_run(Warp& w, const Instruction& i) {
  uint32_t& p = w.predicate(i.slots[kResult]);
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    uint32_t at;
    const Mbarrier b = load(object(w, i, l, at));
    const uint32_t parity =
        i.target ? w.lanes<uint32_t>(i.slots[kOperand])[l] : Mbarrier(w.lanes<uint64_t>(i.slots[kOperand])[l]).parity();
    if (!b.valid() && !w.observer) fault("an mbarrier that was not initialised", at, l);
    const bool over = b.parity() != (parity & 1);
    if (w.observer && !w.observer->mbarrier(w, l, at, kUse, {0, over, parity})) {  // goes on as if the phase were over
      p |= 1u << l;
      continue;
    }
    p = (p & ~(1u << l)) | uint32_t{over} << l;
    if (!over && kUse == MbarrierUse::kTest) ++w.polls;
  }
}

uint32_t wide(Decoder& d, const Decoder::Address& a) {
  if (!a.narrow) return a.base;
  const uint32_t slot = d.temporary(8);
  d.emit(map<uint64_t, uint32_t>([](uint32_t x) { return uint64_t{x}; }), {slot, a.base});
  return slot;
}

void take_shared(Decoder& d) {
  auto& m = d.modifiers();
  m.take_one({"shared", "shared::cta", "shared::cluster"});  // a cluster is one block
}

void take_semantics(Decoder& d) {
  d.modifiers().take_one({"acquire", "release", "relaxed"});
  d.modifiers().take_one({"cta", "cluster"});
}

void mbarrier(Decoder& d) {
  auto& m = d.modifiers();
  const uint32_t none = d.constant(0, 4);
  const int what = m.take_one(
      {"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait", "pending_count"});
  if (what == 8) {  // of the state before an arrival
    if (!m.take("b64")) d.fail("mbarrier needs .b64");
    d.expect_operands(2, 2);
    d.emit(map<uint32_t, uint64_t>([](uint64_t state) { return Mbarrier(state).pending(); }),
           {d.destination(0, Type::kB32), d.source(1, Type::kB64)});
    return;
  }
  if (what < 0) d.fail("an mbarrier operation is missing or unknown");
  const auto emit = [&](Handler handler, const Operand& at, MbarrierUse use, Kind kind,
                        std::initializer_list<uint32_t> rest) -> Instruction& {
    const Decoder::Address a = d.address(at, Space::kShared);
    std::vector<uint32_t> slots{wide(d, a)};
    slots.insert(slots.end(), rest);
    Instruction& i = d.emit(handler, slots, a.offset);
    i.kind = kind, i.count = static_cast<uint16_t>(use);
    return i;
  };
  if (what == 2 || what == 3) {
    const bool expects = m.take("expect_tx");
    if (m.take("noComplete")) d.fail("mbarrier.arrive.noComplete is not supported");
    take_semantics(d), take_shared(d);
    if (d.require_type() != Type::kB64) d.fail("mbarrier needs .b64");
    d.expect_operands(expects ? 3 : 2, 3);
    const bool given = d.operand_count() == 3;
    const uint32_t count = given && !expects ? d.source(2, Type::kU32) : d.constant(1, 4);
    const uint32_t bytes = expects ? d.source(2, Type::kU32) : none;
    emit(count_run<MbarrierUse::kArrive>, d.operand(1), MbarrierUse::kArrive, Kind::kSignal,
         {d.destination(0, Type::kB64), count, bytes})
        .target = what == 3;
    return;
  }
  if (what == 6 || what == 7) {
    const bool parity = m.take("parity");
    take_semantics(d), take_shared(d);
    if (d.require_type() != Type::kB64) d.fail("mbarrier needs .b64");
    d.expect_operands(3, what == 7 ? 4 : 3);
    if (d.operand_count() == 4) d.source(3, Type::kU32);  // how long to wait at most
    const uint32_t operand = d.source(2, parity ? Type::kU32 : Type::kB64), p = d.destination(d.operand(0), 0);
    (what == 7 ? emit(wait_run<MbarrierUse::kTry>, d.operand(1), MbarrierUse::kTry, Kind::kWait, {p, operand})
               : emit(wait_run<MbarrierUse::kTest>, d.operand(1), MbarrierUse::kTest, Kind::kPlain, {p, operand}))
        .target = parity;
    return;
  }
  take_semantics(d), take_shared(d);
  if (d.require_type() != Type::kB64) d.fail("mbarrier needs .b64");
  d.expect_operands(what == 1 ? 1 : 2, what == 1 ? 1 : 2);
  const uint32_t operand = what == 1 ? none : d.source(1, Type::kU32);
  switch (what) {
    case 0:
      emit(initialise_run, d.operand(0), MbarrierUse::kInit, Kind::kPlain, {none, operand});
      return;
    case 1:
      emit(invalidate_run, d.operand(0), MbarrierUse::kInvalidate, Kind::kPlain, {none, operand});
      return;
    case 4:
      emit(count_run<MbarrierUse::kExpect>, d.operand(0), MbarrierUse::kExpect, Kind::kPlain, {none, operand, none});
      return;
    default:
      emit(count_run<MbarrierUse::kComplete>, d.operand(0), MbarrierUse::kComplete, Kind::kSignal,
           {none, operand, none});
  }
}

// A block's own shared memory is all of a cluster of one.
void map_address(Decoder& d) {
  auto& m = d.modifiers();
  m.take("shared::cluster");
  const Type type = d.require_type();
  if (type != Type::kU32 && type != Type::kU64) d.fail("mapa needs .u32 or .u64");
  d.expect_operands(3, 3);
  const uint32_t rank = d.source(2, Type::kU32), address = d.source(1, type), to = d.destination(0, type);
  const auto run = [&]<class T>(T) {
    d.emit(
        [](Warp& w, const Instruction& i) {
          for (uint32_t m = w.active; m; m &= m - 1) {
            const int l = first_lane(m);
            if (const uint32_t rank = w.lanes<uint32_t>(i.slots[2])[l])
              throw KernelFault{kIllegalAddress, "mapa of block " + std::to_string(rank) + " in a cluster of one"};
            w.lanes<T>(i.slots[0])[l] = w.lanes<T>(i.slots[1])[l];
          }
        },
        {to, address, rank});
  };
  type == Type::kU32 ? run(uint32_t{}) : run(uint64_t{});
}

}  // namespace

// cp.async.mbarrier.arrive: arrives when the thread's earlier copies have landed, which they have.
void copies_arrive(Decoder& d) {
  auto& m = d.modifiers();
  const bool counted = m.take("noinc");
  take_shared(d);
  if (d.require_type() != Type::kB64) d.fail("cp.async.mbarrier.arrive needs .b64");
  d.expect_operands(1, 1);
  const Decoder::Address a = d.address(d.operand(0), Space::kShared);
  const uint32_t none = d.constant(0, 4);
  Instruction& i =
      d.emit(count_run<MbarrierUse::kCopiesArrive>, std::vector<uint32_t>{wide(d, a), none, none, none}, a.offset);
  i.kind = Kind::kSignal, i.count = static_cast<uint16_t>(MbarrierUse::kCopiesArrive), i.target = counted;
}

void register_mbarrier(InstructionTable& t) {
  t["mbarrier"] = mbarrier;
  t["mapa"] = map_address;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
