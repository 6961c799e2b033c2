// What happened before what, in vector clocks: fences, strong accesses, barriers.
#include <algorithm>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

Clock& LaunchChecker::mutable_copy(ClockRef& ref, uint32_t block) {
  auto copy = std::make_shared<Clock>(*ref);
  copy->own = copy->parts.at(block).get();
  Clock& result = *copy;
  ref = std::move(copy);
  return result;
}

namespace {
std::shared_ptr<const ClockPart> merged(const std::shared_ptr<const ClockPart>& a,
                                        const std::shared_ptr<const ClockPart>& b) {
  if (a == b) return a;
  auto part = std::make_shared<ClockPart>(*a);
  for (size_t k = 0; k < part->epochs.size(); ++k) part->epochs[k] = std::max(part->epochs[k], b->epochs[k]);
  for (size_t k = 0; k < part->floors.size(); ++k)
    part->floors[k] = *std::min_element(part->epochs.begin() + static_cast<long>(k * kLanes),
                                        part->epochs.begin() + static_cast<long>((k + 1) * kLanes));
  return part;
}
}  // namespace

// `into` knows what `other` knows, too. Both may be null; `into` belongs to a thread of `block` or is a publication.
void LaunchChecker::join(ClockRef& into, const ClockRef& other, uint32_t block) {
  if (!other || into == other) return;
  if (!into) {
    into = other;
    return;
  }
  auto copy = std::make_shared<Clock>(*into);
  for (const auto& [index, part] : other->parts) {
    auto& mine = copy->parts[index];
    mine = mine ? merged(mine, part) : part;
  }
  const auto own = copy->parts.find(block);
  copy->own = own == copy->parts.end() ? nullptr : own->second.get();
  into = std::move(copy);
}

// What a lane knows, its own accesses up to `epoch` included.
ClockRef LaunchChecker::published(const ClockRef& clock, const WarpShadow& l, uint32_t lane, uint32_t epoch) {
  auto copy = std::make_shared<Clock>(*clock);
  auto& part = copy->parts[l.block->index];
  auto own = std::make_shared<ClockPart>(*part);
  own->epochs[(l.id - l.block->first_warp) * kLanes + lane] = epoch;
  part = own;
  copy->own = own.get();
  return copy;
}

void LaunchChecker::fence(Warp& w, const InstructionEffects& k) {
  WarpShadow& l = *w.shadow;
  if (!l.syncs) l.syncs = std::make_unique<std::array<LaneSync, kLanes>>();
  const bool wide = k.strength == Strength::kDevice;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const uint32_t lane = first(m);
    LaneSync& s = (*l.syncs)[lane];
    if (k.acquire) {
      join(l.clocks[lane], wide ? s.pending : s.pending_block, l.block->index);
      if (wide) s.pending.reset();
      s.pending_block.reset();
    }
    if (k.release) {
      s.fence_narrow = published(l.clocks[lane], l, lane, l.clock);
      if (wide) s.fence_wide = s.fence_narrow;
    }
  }
  if (k.release) ++l.clock;
}

// A strong access: what it publishes, and what it learns. keeps: an atomic, which adds to what is published.
void LaunchChecker::synchronise(Warp& w, const InstructionEffects& k, const Access& a, bool reads, bool writes,
                                bool keeps) {
  WarpShadow& l = *w.shadow;
  if (!l.syncs) l.syncs = std::make_unique<std::array<LaneSync, kLanes>>();
  const uint32_t block = l.block->index;
  bool released = false;
  for (uint32_t m = a.lanes; m; m &= m - 1) {
    const uint32_t lane = first(m);
    if (a.space[lane] == Space::kLocal) continue;
    LaneSync& s = (*l.syncs)[lane];
    auto& variables = a.space[lane] == Space::kShared ? l.block->variables : variables_;
    for (uint32_t e = 0; e < k.elements; ++e) {
      const uint64_t at = a.address[lane] + uint64_t{e} * k.element;
      const bool wide = k.strength == Strength::kDevice;
      if (reads) {
        if (const auto found = variables.find(at); found != variables.end()) {
          const SyncVariable& v = found->second;
          ClockRef near, far;
          if (v.narrow && v.narrow_block == block) near = v.narrow;
          if (v.wide && v.wide_block == block) join(near, v.wide, block);
          if (v.wide && v.wide_block != block && wide) far = v.wide;
          if (k.acquire) {
            join(l.clocks[lane], near, block), join(l.clocks[lane], far, block);
          } else {
            join(s.pending_block, near, block);
            join(s.pending, near, block), join(s.pending, far, block);
          }
        }
      }
      if (writes) {
        ClockRef wide_clock = wide ? s.fence_wide : nullptr, narrow_clock = s.fence_narrow;
        if (k.release) {
          released = true;
          narrow_clock = published(l.clocks[lane], l, lane, l.clock);
          if (wide) wide_clock = narrow_clock;
        }
        if (!keeps) variables.erase(at);
        if (!wide_clock && !narrow_clock) continue;
        SyncVariable& v = variables[at];
        if (wide_clock) {
          v.wide_block = v.wide && v.wide_block != block ? ~0u : block;
          join(v.wide, wide_clock, block);
        }
        if (narrow_clock) {
          if (v.narrow_block != block) v.narrow.reset();
          v.narrow_block = block;
          join(v.narrow, narrow_clock, block);
        }
      }
    }
  }
  if (released) ++l.clock;
}

// bar.warp.sync: all these lanes know what each knew.
void LaunchChecker::sync_warp(Warp& w, uint32_t lanes) {
  WarpShadow& l = *w.shadow;
  ClockRef all;
  for (uint32_t m = lanes; m; m &= m - 1) join(all, l.clocks[first(m)], l.block->index);
  Clock& clock = mutable_copy(all, l.block->index);
  auto own = std::make_shared<ClockPart>(*clock.parts[l.block->index]);
  const uint32_t local = l.id - l.block->first_warp;
  for (uint32_t m = lanes; m; m &= m - 1) own->epochs[local * kLanes + first(m)] = l.clock;
  own->floors[local] =
      *std::min_element(own->epochs.begin() + local * kLanes, own->epochs.begin() + (local + 1) * kLanes);
  clock.parts[l.block->index] = own, clock.own = own.get();
  ++l.clock;
  for (uint32_t m = lanes; m; m &= m - 1) l.clocks[first(m)] = all;
}

void LaunchChecker::arrive(Warp& w, const InstructionEffects& k, uint32_t barrier, uint32_t count, uint32_t lanes) {
  WarpShadow& l = *w.shadow;
  BlockShadow& b = *l.block;
  BarrierShadow& state = b.barriers[barrier];
  if (settings.checks & kCheckBarrier) check_match(w, k, barrier, count, lanes);
  land_early(l);
  if (!(settings.checks & kCheckRace)) return;
  if (!state.clock) {
    state.clock = std::make_shared<Clock>(*l.clocks[first(lanes)]);
    auto own = std::make_shared<ClockPart>(*state.clock->parts.at(b.index));
    state.clock->parts[b.index] = own;
    state.joined = l.clocks[first(lanes)].get();
  }
  auto& own = const_cast<ClockPart&>(*state.clock->parts[b.index]);
  for (uint32_t m = lanes; m; m &= m - 1) {
    const ClockRef& mine = l.clocks[first(m)];
    if (mine.get() == state.joined) continue;
    state.joined = mine.get();
    for (const auto& [index, part] : mine->parts) {
      if (index == b.index) {
        for (size_t n = 0; n < own.epochs.size(); ++n) own.epochs[n] = std::max(own.epochs[n], part->epochs[n]);
      } else {
        auto& other = state.clock->parts[index];
        other = other ? merged(other, part) : part;
      }
    }
  }
  const uint32_t local = l.id - b.first_warp;
  for (uint32_t m = lanes; m; m &= m - 1) own.epochs[local * kLanes + first(m)] = l.clock;
  ++l.clock;
}

ClockRef LaunchChecker::complete(BlockShadow& block, uint32_t barrier) {
  BarrierShadow& state = block.barriers[barrier];
  std::shared_ptr<Clock> clock = std::move(state.clock);
  if (clock) {
    auto& own = const_cast<ClockPart&>(*clock->parts[block.index]);
    for (size_t k = 0; k < own.floors.size(); ++k)
      own.floors[k] = *std::min_element(own.epochs.begin() + static_cast<long>(k * kLanes),
                                        own.epochs.begin() + static_cast<long>((k + 1) * kLanes));
    clock->own = &own;
  }
  state = {};
  return clock;
}

void LaunchChecker::pass(Warp& w, uint32_t lanes, const ClockRef& clock) {
  if (!clock) return;
  for (uint32_t m = lanes; m; m &= m - 1) w.shadow->clocks[first(m)] = clock;
}

}  // namespace ptx_emulator
