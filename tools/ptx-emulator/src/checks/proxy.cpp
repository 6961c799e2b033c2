// The asynchronous proxy: whose accesses are ordered as if threads of their own made them (checks/shadow.h).
#include <algorithm>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

ClockRef LaunchChecker::start_of(const BlockShadow& b) const {
  auto clock = std::make_shared<Clock>();
  clock->parts[b.index] = nothing_;
  clock->own = nothing_.get();
  return clock;
}

// The epoch of accesses to come, on behalf of a thread of the block.
uint32_t LaunchChecker::issue(BlockShadow& b, uint32_t thread) {
  b.issuers.push_back(thread);
  return static_cast<uint32_t>(b.issuers.size() - 1);
}

void LaunchChecker::touch_proxy(Warp& w, const InstructionEffects& k, uint32_t lanes, uint64_t at, uint32_t bytes,
                                Region* region, bool write, const Proxy& proxy) {
  const bool shared = region == nullptr;
  Cell* const cells = shared ? reinterpret_cast<Cell*>(w.shadow->block->cells.data())
                             : reinterpret_cast<Cell*>(region->cells.reserve((region->bytes + 10) / 4 * sizeof(Cell)));
  const uint64_t base = shared ? 0 : region->base & ~uintptr_t{3};
  proxy_ = &proxy;
  for (uint64_t word = at & ~uint64_t{3}; word < at + bytes; word += 4) {
    const uint64_t low = std::max(word, at), high = std::min(word + 4, at + bytes);
    const auto mask = static_cast<uint8_t>(((1u << (high - low)) - 1) << (low - word));
    touch_word(w, k, {word, lanes, 0, cells + (word - base) / 4, mask, region}, write, Strength::kWeak, false, 0,
               shared);
  }
  proxy_ = nullptr;
}

namespace {

// A copy of a clock, and its part of its own block to change.
std::pair<ClockRef, ClockPart*> own_copy(const Clock& clock, uint32_t block) {
  auto copy = std::make_shared<Clock>(clock);
  auto part = std::make_shared<ClockPart>(*clock.parts.at(block));
  ClockPart* const raw = part.get();
  copy->parts[block] = part, copy->own = raw;
  return {std::move(copy), raw};
}

void lower_bound_of(ClockPart& part, size_t warp) {
  part.floors[warp] = *std::min_element(part.epochs.begin() + static_cast<long>(warp * kLanes),
                                        part.epochs.begin() + static_cast<long>((warp + 1) * kLanes));
}

}  // namespace

// These lanes know that the proxy's thread has come to an epoch.
void LaunchChecker::learn(WarpShadow& l, uint32_t lanes, uint32_t proxy_warp, uint32_t thread, uint32_t epoch) {
  ClockRef before, after;
  const size_t index = size_t{real_warps_ + proxy_warp} * kLanes + thread;
  for (uint32_t m = lanes; m; m &= m - 1) {
    ClockRef& mine = l.clocks[first(m)];
    if (mine->own->epochs[index] >= epoch) continue;
    if (mine != before) {
      before = mine;
      auto [clock, part] = own_copy(*mine, l.block->index);
      part->epochs[index] = epoch;
      lower_bound_of(*part, real_warps_ + proxy_warp);
      after = std::move(clock);
    }
    mine = after;
  }
}

void LaunchChecker::learn(WarpShadow& l, uint32_t lanes, const ClockRef& clock) {
  ClockRef before, after;
  for (uint32_t m = lanes; m; m &= m - 1) {
    ClockRef& mine = l.clocks[first(m)];
    if (mine != before) {
      before = after = mine;
      join(after, clock, l.block->index);
    }
    mine = after;
  }
}

// What these lanes know, the asynchronous proxy may know from now on.
void LaunchChecker::proxy_fence(Warp& w) {
  WarpShadow& l = *w.shadow;
  const size_t half = size_t{warps_} * kLanes, local = l.id - l.block->first_warp;
  for (uint32_t m = w.active; m; m &= m - 1) {
    auto [clock, part] = own_copy(*l.clocks[first(m)], l.block->index);
    part->epochs[local * kLanes + first(m)] = l.clock;
    for (size_t k = 0; k < half; ++k) part->epochs[half + k] = std::max(part->epochs[half + k], part->epochs[k]);
    for (size_t k = 0; k < warps_; ++k) lower_bound_of(*part, warps_ + k);
    // Other blocks' writes, too.
    for (auto& [index, other] : clock->parts) {
      if (index == l.block->index) continue;
      auto copy = std::make_shared<ClockPart>(*other);
      for (size_t k = 0; k < half; ++k) copy->epochs[half + k] = std::max(copy->epochs[half + k], copy->epochs[k]);
      const_cast<Clock&>(*clock).parts[index] = std::move(copy);
    }
    l.clocks[first(m)] = std::move(clock);
  }
  ++l.clock;
}

void LaunchChecker::finding(const char* rule, std::string message, const Warp& w, int lane, uint64_t at) {
  const Code& code = *w.frame->code;
  const InstructionEffects& k = code.effects[static_cast<size_t>(w.current - code.instructions.data())];
  report(rule, std::move(message), w, k, static_cast<uint32_t>(lane), at, "shared", nullptr);
}

}  // namespace ptx_emulator
