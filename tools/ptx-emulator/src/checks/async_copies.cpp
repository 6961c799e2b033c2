// Asynchronous copies: from their issue to their thread's wait they are pending, and complete when the schedule says.
#include <algorithm>
#include <cstring>

#include "checks/launch_checker.h"
#include "checks/places.h"
#include "guarded.h"

namespace ptx_emulator {

bool LaunchChecker::async_copy(Warp& w, const Instruction& i, const InstructionEffects& k) {
  WarpShadow& l = *w.shadow;
  Access to{}, from{};
  const uint32_t bytes = k.element;
  locate(w, k, k.address, k.narrow, k.offset, Space::kShared, bytes, w.active, nullptr, to, bytes);
  const uint32_t* given = w.lanes<uint32_t>(i.slots[2]);
  uint32_t sizes[kLanes], reads = 0;
  for (uint32_t m = to.lanes; m; m &= m - 1) {
    const uint32_t lane = first(m);
    sizes[lane] = std::min(given[lane], bytes);
    if (sizes[lane]) reads |= 1u << lane;
  }
  if (settings.checks & kCheckInit) {
    observe(w, k, {k.second_address, 8}, reads, "an address");
    for (const LaneSlot& s : k.sources) observe(w, k, s, to.lanes, "the size of a copy");
  }
  locate(w, k, k.second_address, false, k.second_offset, Space::kGlobal, bytes, reads, sizes, from, bytes);
  for (uint32_t m = reads & ~from.lanes; m; m &= m - 1) sizes[first(m)] = 0;
  if (counts_) {
    Counter& c = counts_->at(k.id);
    if (from.lanes) counts_->global(c, from.address, from.region, sizes, bytes, from.lanes, false, true);
    if (to.lanes) counts_->shared(c, to.address, bytes, to.lanes, false);
  }
  // Lanes whose next commit is the same group share a ticket.
  uint32_t left = to.lanes;
  const int landing = settings.schedule == Schedule::kRoundRobin    ? 0
                      : settings.schedule == Schedule::kAdversarial ? 1
                                                                    : static_cast<int>(random_() % 3);
  while (left) {
    const uint32_t group = l.committed[first(left)];
    uint32_t same = 0;
    for (uint32_t m = left; m; m &= m - 1) same |= uint32_t{l.committed[first(m)] == group} << first(m);
    left &= ~same;
    const uint32_t ticket = static_cast<uint32_t>(tickets_.size());
    tickets_.push_back({same, 0, 0, group});
    ticket_places_.push_back(k.id);
    l.pending.push_back(ticket);
    if (settings.checks & kCheckRace) {
      Access part = from;
      part.lanes &= same;
      if (part.lanes) touch(w, k, part, false, Strength::kWeak, true, ticket, nullptr, sizes);
      part = to;
      part.lanes &= same;
      touch(w, k, part, true, Strength::kWeak, true, ticket, nullptr, nullptr);
    }
    for (uint32_t m = same; m; m &= m - 1) {
      const uint32_t lane = first(m);
      const PendingCopy copy{ticket,
                             static_cast<uint8_t>(lane),
                             static_cast<uint8_t>(bytes),
                             static_cast<uint8_t>(sizes[lane]),
                             landing == 2,
                             to.host[lane],
                             from.host[lane]};
      if (settings.checks & kCheckInit) {
        uint8_t* target = unwritten(w, to, lane, 0);
        const uint8_t* source = sizes[lane] ? unwritten(w, from, lane, 0) : nullptr;
        std::memset(target, 0, bytes);
        if (source) std::memcpy(target, source, sizes[lane]);
      }
      if (landing == 0) {
        land(l, copy);
      } else {
        if (settings.schedule == Schedule::kAdversarial) std::memset(copy.target, 0xff, bytes);
        l.pending_copies.push_back(copy);
      }
    }
  }
  return false;
}

void LaunchChecker::land(WarpShadow&, const PendingCopy& c) {
  if (c.size && !guarded([&] { std::memcpy(c.target, c.source, c.size); })) std::memset(c.target, 0, c.size);
  std::memset(c.target + c.size, 0, c.bytes - c.size);
}

void LaunchChecker::land_early(WarpShadow& l) {
  if (l.pending_copies.empty()) return;
  std::erase_if(l.pending_copies, [&](const PendingCopy& c) {
    if (!c.early || (random_() & 1)) return false;
    land(l, c);
    return true;
  });
}

// Copies of these lanes that the wait is for are done. groups: the newest that may go on; -1: none, uncommitted
// neither.
void LaunchChecker::async_wait(Warp& w, uint32_t lanes, int64_t groups) {
  WarpShadow& l = *w.shadow;
  for (size_t p = 0; p < l.pending.size();) {
    const uint32_t number = l.pending[p];
    Ticket& t = tickets_[number];
    uint32_t done = 0;
    for (uint32_t m = t.lanes & lanes & ~t.done; m; m &= m - 1) {
      const uint32_t lane = first(m);
      if (groups < 0 || int64_t{t.group} < int64_t{l.committed[lane]} - groups) done |= 1u << lane;
    }
    if (done) {
      t.done |= done, t.clock = l.clock;
      std::erase_if(l.pending_copies, [&](const PendingCopy& c) {
        if (c.ticket != number || !(done >> c.lane & 1)) return false;
        land(l, c);
        return true;
      });
    }
    if (t.done == t.lanes)
      l.pending.erase(l.pending.begin() + static_cast<long>(p));
    else
      ++p;
  }
}

void LaunchChecker::exit(Warp& w, uint32_t lanes) {
  WarpShadow& l = *w.shadow;
  for (const uint32_t number : l.pending) {
    const Ticket& t = tickets_[number];
    const uint32_t left = t.lanes & lanes & ~t.done;
    if (!left || !(settings.checks & kCheckRace) || !once(kPending, ticket_places_[number], 0)) continue;
    Finding f;
    f.rule = "async-pending", f.message = "an asynchronous copy was not waited for when its thread exited";
    f.spot = spot_of(l.id, ticket_places_[number], first(left));
    f.space = "shared";
    Findings::instance().add(std::move(f));
  }
  async_wait(w, lanes, -1);
  std::erase_if(l.barriers, [&](WarpShadow::Parted& p) { return !(p.missing &= ~lanes); });
}

}  // namespace ptx_emulator
