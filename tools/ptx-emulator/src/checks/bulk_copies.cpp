// Bulk copies: from their issue to a wait they are in flight, and land when the schedule says.
#include <algorithm>
#include <cstring>

#include "bulk_copy.h"
#include "checks/launch_checker.h"
#include "checks/places.h"
#include "guarded.h"

namespace ptx_emulator {

namespace {

// The proxy's threads.
uint32_t of_mbarrier(uint32_t at) { return at / 8 % kLanes; }
uint32_t of_reads(uint32_t thread) { return thread / kLanes % 16; }
uint32_t of_writes(uint32_t thread) { return 16 + of_reads(thread); }

}  // namespace

// Whether every byte may be touched: of known memory, on an mbarrier.
bool LaunchChecker::allow_bulk(Warp& w, const InstructionEffects& k, const BulkCopy& c, uint32_t lane) {
  if (!c.store) {
    uint64_t bits;
    std::memcpy(&bits, w.shared + c.barrier, 8);
    if (!w.shadow->block->mbarriers.contains(c.barrier) || !Mbarrier(bits).valid()) {
      if ((settings.checks & kCheckBarrier) && once(kMbarrierUse, k.id, 0))
        report("mbarrier",
               "the mbarrier at shared address " + std::to_string(c.barrier) + " is used before it is initialised", w,
               k, lane, c.barrier, "shared", nullptr);
      return false;
    }
  }
  bool allowed = true;
  for_each_piece(c, [&](uint32_t, uint64_t at, uint32_t bytes) {
    if (!at || !allowed || !bytes) return;
    Region* const region = find_region(at);
    if (region && region->holds(at, bytes)) return;
    if (!(settings.checks & kCheckMemory)) return;
    allowed = false;
    if (once(kBounds, k.id, 0))
      report("out-of-bounds",
             "a bulk copy of " + std::to_string(c.bytes) + " bytes touches " + hex(at) + ", in no allocation" +
                 (region ? ": across the end of '" + region_name(*region) + "'" : ""),
             w, k, lane, at, "global", region);
  });
  return allowed;
}

void LaunchChecker::touch_bulk(Warp& w, const InstructionEffects& k, const BulkCopy& c, uint32_t lane, uint32_t epoch) {
  const uint32_t thread = w.index * kLanes + lane, lanes = 1u << lane;
  const Proxy shared{real_warps_ + (c.store ? kStores : kLoads), c.store ? of_reads(thread) : of_mbarrier(c.barrier),
                     epoch};
  const Proxy global{shared.warp, c.store ? of_writes(thread) : shared.thread, epoch + (c.store ? 1 : 0)};
  for_each_piece(c, [&](uint32_t at, uint64_t address, uint32_t bytes) {
    touch_proxy(w, k, lanes, at, bytes, nullptr, !c.store, shared);
    Region* const region = address ? find_region(address) : nullptr;
    if (region) touch_proxy(w, k, lanes, address, bytes, region, c.store, global);
  });
}

void LaunchChecker::count_bulk(const InstructionEffects& k, const BulkCopy& c) {
  std::vector<std::pair<uint64_t, uint32_t>> pieces;
  Region* region = nullptr;
  for_each_piece(c, [&](uint32_t, uint64_t at, uint32_t bytes) {
    if (!at) return;
    if (!region) region = find_region(at);
    if (!pieces.empty() && pieces.back().first + pieces.back().second == at)
      pieces.back().second += bytes;
    else
      pieces.push_back({at, bytes});
  });
  counts_->bulk(counts_->at(k.id), pieces, region, c.store);
}

bool LaunchChecker::bulk_copy(Warp& w, const Instruction& i, const InstructionEffects& k) {
  WarpShadow& l = *w.shadow;
  BlockShadow& b = *l.block;
  if (settings.checks & kCheckInit)
    for (const LaneSlot& s : k.sources) observe(w, k, s, w.active, "an operand of a bulk copy");
  for (uint32_t m = w.active; m; m &= m - 1) {
    const uint32_t lane = first(m), thread = w.index * kLanes + lane;
    PendingBulk bulk{};
    if (const BulkProblem p = find_bulk_copy(w, i, static_cast<int>(lane), bulk.copy); p.code) {
      if (once(kMap, k.id, 0)) report(p.rule, p.text, w, k, lane, p.address, "shared", nullptr);
      continue;
    }
    const BulkCopy& c = bulk.copy;
    bulk.warp = w.index, bulk.lane = lane, bulk.group = l.bulk_committed[lane], bulk.instruction = k.id;
    // Lanes that store one box are as one; the wait is each lane's own.
    if (c.store && !b.bulk.empty() && m != w.active) {
      const PendingBulk& last = b.bulk.back();
      if (last.warp == w.index && last.instruction == k.id && same_store(last.copy, c)) {
        bulk.epoch = last.epoch, bulk.landed = true;
        b.bulk.push_back(bulk);
        continue;
      }
    }
    if (!allow_bulk(w, k, c, lane)) continue;
    if (counts_) count_bulk(k, c);
    bulk.epoch = issue(b, thread);
    if (c.store) issue(b, thread);
    if (settings.checks & kCheckRace) touch_bulk(w, k, c, lane, bulk.epoch);
    if (settings.checks & kCheckInit)
      for_each_piece(c, [&](uint32_t at, uint64_t address, uint32_t bytes) {
        uint8_t* const here = b.unwritten.data() + at;
        Region* const region = address ? find_region(address) : nullptr;
        uint8_t* const there =
            region && region->unwritten.data() ? region->unwritten.data() + (address - region->base) : nullptr;
        if (!c.store)
          there ? std::memcpy(here, there, bytes) : std::memset(here, 0, bytes);
        else if (there)
          std::memcpy(there, here, bytes);
      });
    const bool now =
        settings.schedule == Schedule::kRoundRobin || (settings.schedule == Schedule::kRandom && random_() % 3 == 0);
    if (!now && !c.store && settings.schedule == Schedule::kAdversarial)
      for_each_piece(c, [&](uint32_t at, uint64_t, uint32_t bytes) { std::memset(w.shared + at, 0xff, bytes); });
    b.bulk.push_back(bulk);
    if (now) land(b, b.bulk.back());
  }
  return false;
}

void LaunchChecker::land(BlockShadow& b, PendingBulk& bulk) {
  if (bulk.landed) return;
  bulk.landed = true;
  const BulkCopy& c = bulk.copy;
  guarded([&] { carry_out(c, b.shared); });
  ++b.warps[bulk.warp]->warp->writes;
  if (c.store) return;
  const auto known = b.mbarriers.find(c.barrier);
  uint64_t bits;
  std::memcpy(&bits, b.shared + c.barrier, 8);
  Mbarrier barrier(bits);
  if (known == b.mbarriers.end() || !barrier.valid()) return;
  if (settings.checks & kCheckRace) {
    if (!known->second.gathering) known->second.gathering = start_of(b);
    auto copy = std::make_shared<Clock>(*known->second.gathering);
    auto part = std::make_shared<ClockPart>(*copy->parts.at(b.index));
    uint32_t& epoch = part->epochs[size_t{real_warps_ + kLoads} * kLanes + of_mbarrier(c.barrier)];
    epoch = std::max(epoch, bulk.epoch);
    copy->parts[b.index] = part, copy->own = part.get();
    known->second.gathering = std::move(copy);
  }
  const auto outcome = barrier.apply(0, -int64_t{c.bytes}, 0, true);
  if (outcome == Mbarrier::Outcome::kTooManyBytes) {
    if ((settings.checks & kCheckBarrier) && once(kMbarrierUse, bulk.instruction, 0)) {
      Finding f;
      f.rule = "mbarrier", f.message = "bulk copies bring more bytes than their mbarrier counts";
      f.spot = spot_of(b.first_warp + bulk.warp, bulk.instruction, bulk.lane), f.space = "shared";
      f.address = c.barrier;
      Findings::instance().add(std::move(f));
    }
    return;
  }
  bits = barrier.bits();
  std::memcpy(b.shared + c.barrier, &bits, 8);
  if (outcome != Mbarrier::Outcome::kCompleted) return;
  phase_completed(*b.warps[bulk.warp]->warp, c.barrier);
  b.woken = true;
}

bool LaunchChecker::land_bulk(BlockShadow& b) {
  std::vector<PendingBulk*> flying;
  for (PendingBulk& bulk : b.bulk)
    if (!bulk.landed) flying.push_back(&bulk);
  if (flying.empty()) return false;
  land(b, *flying[settings.schedule == Schedule::kRandom ? random_() % flying.size() : 0]);
  return true;
}

void LaunchChecker::bulk_wait(Warp& w, const InstructionEffects& k) {
  WarpShadow& l = *w.shadow;
  BlockShadow& b = *l.block;
  for (PendingBulk& bulk : b.bulk) {
    if (!bulk.copy.store || bulk.warp != w.index || !(w.active >> bulk.lane & 1)) continue;
    if (int64_t{bulk.group} >= int64_t{l.bulk_committed[bulk.lane]} - k.groups) continue;
    land(b, bulk);
    bulk.read_waited = true;
    if (!(settings.checks & kCheckRace)) continue;
    const uint32_t thread = bulk.warp * kLanes + bulk.lane;
    learn(l, 1u << bulk.lane, kStores, of_reads(thread), bulk.epoch);
    if (!k.reads) learn(l, 1u << bulk.lane, kStores, of_writes(thread), bulk.epoch + 1);
  }
  if (!k.reads)
    std::erase_if(b.bulk, [&](const PendingBulk& bulk) {
      return bulk.read_waited && bulk.warp == w.index && (w.active >> bulk.lane & 1);
    });
}

// What is left when the block is over: a store must have read shared memory by then, and someone must have seen the
// phase end that a load belongs to.
void LaunchChecker::end_block(BlockShadow& b) {
  for (PendingBulk& bulk : b.bulk) {
    if (!bulk.read_waited && (settings.checks & kCheckRace) && once(kPending, bulk.instruction, 0)) {
      Finding f;
      f.rule = "async-pending", f.message = "a bulk copy was not waited for when its block ended";
      f.spot = spot_of(b.first_warp + bulk.warp, bulk.instruction, bulk.lane), f.space = "shared";
      Findings::instance().add(std::move(f));
    }
    land(b, bulk);
  }
  b.bulk.clear();
  b.woken = false;
  for (size_t g = 0; g < b.warpgroups.size(); ++g) {
    const WarpgroupShadow& group = b.warpgroups[g];
    const auto [least, most] = std::minmax_element(std::begin(group.done), std::end(group.done));
    if (*least == *most || *least >= group.instructions.size() || !once(kWarpgroup, 0, 0)) continue;
    Finding f;
    f.rule = "divergent-warpgroup", f.message = "the warps of a warpgroup execute different wgmma instructions";
    f.spot = spot_of(b.first_warp + static_cast<uint32_t>(g * 4 + static_cast<size_t>(most - group.done)),
                     group.instructions[*least], 0);
    Findings::instance().add(std::move(f));
  }
}

}  // namespace ptx_emulator
