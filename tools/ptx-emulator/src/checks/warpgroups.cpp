// wgmma: registers that it owns from its issue to its wait, matrices in shared memory, and four warps that go together.
#include <algorithm>
#include <bitset>

#include "checks/launch_checker.h"
#include "checks/places.h"
#include "wgmma.h"

namespace ptx_emulator {

// Every instruction: it must leave registers alone that a wgmma has. The entry's own frame only.
void LaunchChecker::check_in_flight(Warp& w, const InstructionEffects& k) {
  WarpShadow& l = *w.shadow;
  if (w.frame != w.entry || k.touch == Touch::kMultiplyAsync) return;
  if (!l.in_flight.empty()) {
    const auto look = [&](const LaneSlot& s, bool writes) {
      const auto found = s.slot == kNever ? l.in_flight.end() : l.in_flight.find(s.slot);
      if (found == l.in_flight.end() || (!writes && !found->second.accumulator)) return;
      if (!once(kAccumulator, k.id, 0)) return;
      report("wgmma-registers",
             std::string(found->second.accumulator ? "an accumulator" : "a register of A") +
                 " of a wgmma in flight is " + (writes ? "written" : "read") + " before its wgmma.wait_group",
             w, k, first(w.active), 0, "register", nullptr);
    };
    for (const LaneSlot& s : k.sources) look(s, false);
    for (const LaneSlot& d : k.destinations) look(d, true);
  }
  l.written.resize(w.frame->code->frame_bytes / 64 + 1);
  for (const LaneSlot& d : k.destinations)
    if (d.slot != kNever && d.bytes) l.written[d.slot / 64] = l.multiply_fences;
}

// The warps of a warpgroup execute the same wgmma instructions in the same order.
void LaunchChecker::follow_warpgroup(Warp& w, const InstructionEffects& k) {
  if (!(settings.checks & kCheckBarrier)) return;
  BlockShadow& b = *w.shadow->block;
  WarpgroupShadow& group = b.warpgroups[w.index / 4];
  uint32_t& done = group.done[w.index % 4];
  std::string problem;
  if (w.index / 4 * 4 + 4 > real_warps_)
    problem = "wgmma is executed by a warpgroup that has not four warps";
  else if (done == group.instructions.size())
    group.instructions.push_back(k.id);
  else if (group.instructions[done] != k.id)
    problem = "the warps of a warpgroup execute different wgmma instructions";
  ++done;
  if (!problem.empty() && once(kWarpgroup, 0, 0)) report("divergent-warpgroup", problem, w, k, 0, 0, "", nullptr);
}

bool LaunchChecker::multiply(Warp& w, const Instruction& i, const InstructionEffects& k) {
  WarpShadow& l = *w.shadow;
  BlockShadow& b = *l.block;
  const WgmmaForm form = WgmmaForm::of(i.immediate);
  const bool races = settings.checks & kCheckRace;
  const uint32_t lane = first(w.active);
  follow_warpgroup(w, k);
  if (settings.checks & kCheckInit)
    for (size_t s = 0; s < k.sources.size(); ++s)
      if (!form.a_in_registers || s >= 4) observe(w, k, k.sources[s], w.active, "a descriptor, or scales by, a wgmma");
  // Registers.
  if (races && w.frame == w.entry) {
    l.written.resize(w.frame->code->frame_bytes / 64 + 1);
    const auto claim = [&](const LaneSlot& s, bool accumulator) {
      if (s.slot == kNever) return;
      if ((l.multiply_fences == 1 || l.written[s.slot / 64] == l.multiply_fences) && once(kAccumulator, k.id, 1))
        report("wgmma-registers",
               std::string(accumulator ? "an accumulator" : "a register of A") +
                   " was written, and no wgmma.fence came before this wgmma",
               w, k, lane, 0, "register", nullptr);
      const auto [at, fresh] = l.in_flight.try_emplace(s.slot, WarpShadow::InFlight{0, accumulator});
      if (!fresh && at->second.accumulator != accumulator && once(kAccumulator, k.id, 2))
        report("wgmma-registers", "A and the accumulators of wgmma in flight share a register", w, k, lane, 0,
               "register", nullptr);
      at->second.group = l.multiply_committed;
    };
    for (size_t s = 0; form.a_in_registers && s < 4 && s < k.sources.size(); ++s) claim(k.sources[s], false);
    for (const LaneSlot& d : k.destinations) claim(d, true);
  }
  // Matrices in shared memory.
  std::vector<uint32_t> chunks;
  bool inside = true;
  const auto collect = [&](uint32_t slot, const char* name, uint32_t from, uint32_t rows, bool transposed) {
    const MatrixDescriptor d(w.lanes<uint64_t>(slot)[lane]);
    for_each_chunk(d, from, rows, transposed, [&](uint32_t at, uint32_t, uint32_t) {
      if (at + 16 > w.shared_bytes) {
        if (inside && (settings.checks & kCheckMemory) && once(kBounds, k.id, 0))
          report("out-of-bounds",
                 std::string("the descriptor of ") + name + " leads to shared address " + std::to_string(at) +
                     "; the block has " + std::to_string(w.shared_bytes) + " bytes",
                 w, k, lane, at, "shared", nullptr);
        inside = false;
      } else {
        chunks.push_back(at);
      }
    });
  };
  const uint32_t* const slots = i.slots + 1;
  if (!form.a_in_registers) collect(slots[0], "A", w.index % 4 * 16, 16, form.a_transposed);
  collect(slots[form.a_slots()], "B", 0, form.columns, form.b_transposed);
  if (!inside) {
    if (settings.checks & kCheckInit)
      for (const LaneSlot& d : k.destinations) set(w, d, w.active, 0, 0, 0);
    return false;
  }
  if (races) {
    const Proxy proxy{real_warps_ + kMultiplications, w.index % kLanes, issue(b, w.index * kLanes)};
    for (const uint32_t at : chunks) touch_proxy(w, k, w.active, at, 16, nullptr, false, proxy);
    l.multiplications.push_back({l.multiply_committed, proxy.epoch});
  }
  if (settings.checks & kCheckInit) flow_warpgroup(w, i, k);
  return true;
}

void LaunchChecker::multiply_wait(Warp& w, const InstructionEffects& k) {
  WarpShadow& l = *w.shadow;
  const auto over = [&](uint32_t group) { return int64_t{group} < int64_t{l.multiply_committed} - k.groups; };
  std::erase_if(l.in_flight, [&](const auto& entry) { return over(entry.second.group); });
  if (!(settings.checks & kCheckRace)) return;
  // The whole warpgroup's are over: this comes again when the other warps have come so far.
  const uint32_t group = w.index / 4 * 4;
  for (uint32_t k = group; k < std::min(group + 4, real_warps_); ++k) {
    uint32_t epoch = 0;
    for (const auto& [number, at] : l.block->warps[k]->multiplications)
      if (over(number)) epoch = std::max(epoch, at);
    if (epoch) learn(l, w.active, kMultiplications, k % kLanes, epoch);
  }
  constexpr size_t kKept = 256;
  if (auto& all = l.multiplications; all.size() > 2 * kKept) all.erase(all.begin(), all.end() - kKept);
}

// Never-written elements spoil the rows of A and the columns of B that they lie in, accumulators themselves.
void LaunchChecker::flow_warpgroup(Warp& w, const Instruction& i, const InstructionEffects& k) {
  const WgmmaForm form = WgmmaForm::of(i.immediate);
  const uint8_t* const unwritten = w.shadow->block->unwritten.data();
  std::bitset<16> rows;
  std::bitset<256> columns;
  uint32_t origin = 0, loaded = 0;
  const auto spoilt = [&](uint32_t at) {
    return std::any_of(unwritten + at, unwritten + at + 16, [](uint8_t b) { return b != 0; });
  };
  const auto matrix = [&](uint32_t slot, uint32_t from, uint32_t count, bool transposed, auto& out) {
    const MatrixDescriptor d(w.lanes<uint64_t>(slot)[first(w.active)]);
    for_each_chunk(d, from, count, transposed, [&](uint32_t at, uint32_t row, uint32_t) {
      if (spoilt(at))
        for (uint32_t e = 0; e < (transposed ? 8u : 1u); ++e) out.set(row + e);
    });
  };
  if (form.a_in_registers) {
    for (size_t r = 0; r < 4 && r < k.sources.size(); ++r) {
      const uint32_t lanes = bad(w, k.sources[r]);
      if (!lanes) continue;
      origin = *shadow(w, k.sources[r].slot, 1), loaded = *shadow(w, k.sources[r].slot, 2);
      for (uint32_t l = 0; l < kLanes; ++l)
        if (lanes >> l & 1) rows.set(r % 2 * 8 + l / 4);
    }
  } else {
    matrix(i.slots[1], w.index % 4 * 16, 16, form.a_transposed, rows);
  }
  matrix(i.slots[1 + form.a_slots()], 0, form.columns, form.b_transposed, columns);
  if (!origin) origin = k.id + 1;
  const bool keeps = w.predicate(i.slots[0]) >> first(w.active) & 1, any = rows.any() || columns.any();
  const bool packed = k.destinations.size() == form.columns / 4u;
  for (size_t r = 0; r < k.destinations.size(); ++r) {
    const LaneSlot& d = k.destinations[r];
    if (d.slot == kNever) continue;
    const uint32_t before = keeps ? bad(w, d) : 0;
    if (!any && before == 0) {
      set(w, d, w.active, 0, 0, 0);
      continue;
    }
    const size_t tile = r / (packed ? 2 : 4), half = packed ? r % 2 : r / 2 % 2, odd = packed ? 0 : r % 2;
    uint32_t lanes = before;
    for (uint32_t l = 0; l < kLanes; ++l) {
      const size_t column = tile * 8 + l % 4 * 2 + odd;
      if (rows[half * 8 + l / 4] || columns[column] || (packed && columns[column + 1])) lanes |= 1u << l;
    }
    if (lanes != before) set(w, d, w.active, lanes, origin, loaded);
  }
}

}  // namespace ptx_emulator
