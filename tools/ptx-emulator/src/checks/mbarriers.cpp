// mbarriers: used as what they are, and what their phases order.
#include <algorithm>
#include <cstring>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

bool LaunchChecker::before_mbarrier(Warp& w, const Instruction& i, const InstructionEffects& k) {
  Access a{};
  locate(w, k, k.address, k.narrow, k.offset, Space::kShared, 8, w.active, nullptr, a, 8);
  const auto use = static_cast<MbarrierUse>(i.count);
  if (refused_) {
    w.active &= ~refused_;
    if (use == MbarrierUse::kTry || use == MbarrierUse::kTest) w.predicate(i.slots[1]) |= refused_;  // no endless loop
  }
  if (settings.checks & kCheckInit) {
    for (const LaneSlot& s : k.sources) observe(w, k, s, w.active, "an operand of an mbarrier's instruction");
    for (const LaneSlot& d : k.destinations) set(w, d, w.active, 0, 0, 0);
    const bool init = use == MbarrierUse::kInit;
    for (uint32_t m = init ? w.active : 0; m; m &= m - 1)
      std::memset(w.shadow->block->unwritten.data() + a.address[first(m)], 0, 8);
  }
  return w.active != 0;
}

// Whether the operation may go on. What it orders is remembered before it happens.
bool LaunchChecker::mbarrier(Warp& w, int lane, uint32_t at, MbarrierUse use, const MbarrierChange& change) {
  WarpShadow& l = *w.shadow;
  BlockShadow& b = *l.block;
  const Code& code = *w.frame->code;
  const InstructionEffects& k = code.effects[static_cast<size_t>(w.current - code.instructions.data())];
  const bool check = settings.checks & kCheckBarrier, races = settings.checks & kCheckRace;
  const auto wrong = [&](std::string message) {
    if (check && once(kMbarrierUse, k.id, 0)) finding("mbarrier", std::move(message), w, lane, at);
    return false;
  };
  const std::string name = "the mbarrier at shared address " + std::to_string(at);
  const auto cell = [&](bool write, Strength strength) {
    if (!races) return;
    Cell* const cells = reinterpret_cast<Cell*>(b.cells.data()) + at / 4;
    for (uint32_t word = 0; word < 2; ++word)
      touch_word(w, k, {at + 4 * word, 1u << lane, 0, cells + word, 15, nullptr}, write, strength, false, 0, true);
  };
  const auto known = b.mbarriers.find(at);
  if (use == MbarrierUse::kInit) {
    if (change.arrivals == 0 || change.arrivals > Mbarrier::kMost)
      return wrong(name + " is initialised with a count of " + std::to_string(change.arrivals) + ", expected 1 to " +
                   std::to_string(Mbarrier::kMost));
    if (known != b.mbarriers.end() && !known->second.waiting.empty())
      return wrong(name + " is initialised again while threads wait at it");
    b.mbarriers[at] = {};
    cell(true, Strength::kWeak);
    return true;
  }
  if (known == b.mbarriers.end()) return wrong(name + " is used before it is initialised");
  MbarrierShadow& state = known->second;
  uint64_t bits;
  std::memcpy(&bits, w.shared + at, 8);
  if (!Mbarrier(bits).valid()) return wrong(name + " was overwritten");
  if (use == MbarrierUse::kInvalidate) {
    if (!state.waiting.empty()) return wrong(name + " is invalidated while threads wait at it");
    b.mbarriers.erase(known);
    cell(true, Strength::kWeak);
    return true;
  }
  cell(true, Strength::kBlock);
  const uint32_t thread = w.index * kLanes + static_cast<uint32_t>(lane);
  if (use == MbarrierUse::kTry || use == MbarrierUse::kTest) {
    const bool over = change.bytes != 0;
    const auto waited = state.waiting.find(thread);
    if (waited != state.waiting.end()) {
      // It found a phase unfinished, and comes back: the next one may be under way, but not be over, too.
      const bool behind = state.phase >= waited->second + 2;
      state.waiting.erase(waited);
      if (behind)
        wrong("a thread that waits for a phase of " + name + " is a whole phase behind: the next one is over, too");
    }
    if (over) {
      std::erase_if(b.bulk, [&](const PendingBulk& p) { return p.landed && !p.copy.store && p.copy.barrier == at; });
      if (races && k.acquire && state.completed) learn(l, 1u << lane, state.completed);
    } else {
      state.waiting[thread] = state.phase;
    }
    return true;
  }
  if (use == MbarrierUse::kCopiesArrive) async_wait(w, 1u << lane, -1);
  Mbarrier after(bits);
  const auto outcome = after.apply(change.arrivals, change.bytes, change.dropped, false);
  if (outcome == Mbarrier::Outcome::kTooManyArrivals && (use != MbarrierUse::kCopiesArrive || w.current->target))
    return wrong(std::to_string(change.arrivals) + " arrivals at " + name + ", whose phase waits for " +
                 std::to_string(Mbarrier(bits).pending()));
  if (outcome == Mbarrier::Outcome::kTooManyBytes)
    return wrong(name + " counts at most " + std::to_string(Mbarrier::kMost) + " bytes");
  if (races && k.release && use != MbarrierUse::kExpect) {
    join(state.gathering, published(l.clocks[lane], l, static_cast<uint32_t>(lane), l.clock), b.index);
    ++l.clock;
  }
  return true;
}

void LaunchChecker::phase_completed(Warp& w, uint32_t at) {
  MbarrierShadow& state = w.shadow->block->mbarriers[at];
  state.completed = std::move(state.gathering);
  state.gathering.reset();
  ++state.phase;
}

}  // namespace ptx_emulator
