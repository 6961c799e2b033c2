// Lanes of a warp that part and meet again, and threads that meet at barriers.
#include <algorithm>

#include "schedule/block.h"

namespace ptx_emulator {

namespace {

constexpr uint32_t kStallsBeforeRelease = 4, kCheckedStallsBeforeRelease = 16;

}  // namespace

Join* Block::make_join(Warp& w, Frame* frame, uint32_t pc, uint32_t expected, uint32_t arrived, Join* parent) {
  if (w.free_joins.empty()) {
    w.join_storage.push_back(std::make_unique<Join>());
    w.free_joins.push_back(w.join_storage.back().get());
  }
  Join* join = w.free_joins.back();
  w.free_joins.pop_back();
  *join = {frame, pc, expected, arrived, parent};
  w.joins.push_back(join);
  return join;
}

void Block::drop_join(Warp& w, Join* join) {
  w.joins.erase(std::find(w.joins.begin(), w.joins.end(), join));
  w.free_joins.push_back(join);
}

void Block::drop_frame(Warp& w, Frame* frame) {
  if (frame != w.entry) w.free_frames[frame->code].push_back(frame);
}

void Block::arrive(Warp& w, Join* join, uint32_t mask) {
  join->arrived |= mask;
  if (join->arrived != join->expected) return;
  w.ready.push_front({join->pc, join->arrived, join->frame, join->parent});
  w.stalls = 0;
  drop_join(w, join);
}

// Groups that stand at the same place under the same join go on as one.
void Block::make_ready(Warp& w, ConvergenceGroup f) {
  for (ConvergenceGroup& other : w.ready)
    if (other.pc == f.pc && other.frame == f.frame && other.join == f.join) {
      other.mask |= f.mask;
      return;
    }
  w.ready.push_back(f);
}

void Block::exit_lanes(Warp& w, uint32_t mask, Join* join, Frame* frame) {
  if (grid->checker) grid->checker->exit(w, mask);
  w.live &= ~mask;
  live -= static_cast<uint32_t>(std::popcount(mask));
  for (Frame* f = frame; f;) {
    Frame* caller = f->caller;
    f->lanes &= ~mask;
    if (f->lanes == 0) drop_frame(w, f);
    f = caller;
  }
  for (Join* j = join; j;) {
    Join* parent = j->parent;
    j->expected &= ~mask;
    if (j->expected == 0)
      drop_join(w, j);
    else if (j->expected == j->arrived) {
      w.ready.push_back({j->pc, j->arrived, j->frame, j->parent});
      drop_join(w, j);
    }
    j = parent;
  }
  release_parked(w);
  check_barriers();
}

// Lanes that wait for others at a .sync instruction go on once all that live and are named have come.
void Block::release_parked(Warp& w) {
  for (size_t k = 0; k < w.parked.size(); ++k) {
    const ConvergenceGroup f = w.parked[k];
    const Instruction& i = f.frame->code->instructions[f.pc];
    const bool pure =
        i.slots[0] != kNever && f.frame->code->function->statements[i.statement].opcode.starts_with("bar");
    const auto meets = [&](const ConvergenceGroup& other) {
      if (other.frame == f.frame && other.pc == f.pc) return true;
      const Instruction& o = other.frame->code->instructions[other.pc];
      return pure && o.run == i.run;  // bar.warp.sync may be reached in different places
    };
    uint32_t together = 0;
    for (const ConvergenceGroup& other : w.parked)
      if (meets(other)) together |= other.mask;
    const uint32_t members =
        reinterpret_cast<const uint32_t*>(f.frame->registers + i.slots[0])[std::countr_zero(f.mask)] & w.live;
    if (members & ~together) continue;
    uint8_t* const kept = w.registers;
    const uint32_t active = w.active;
    const Instruction* const current = w.current;
    w.registers = f.frame->registers;
    w.active = together;
    w.current = &i;
    Frame* const frame = w.frame;
    w.frame = f.frame;
    if (!grid->checker || grid->checker->before(w, i, f.frame->code->effects[f.pc])) i.run(w, i);
    w.frame = frame;
    w.registers = kept;
    w.active = active;
    w.current = current;
    std::vector<ConvergenceGroup> stay;
    std::vector<ConvergenceGroup> go;
    for (const ConvergenceGroup& other : w.parked) (meets(other) ? go : stay).push_back(other);
    w.parked = std::move(stay);
    for (ConvergenceGroup g : go) {
      ++g.pc;
      make_ready(w, g);
    }
    w.stalls = 0;
    return release_parked(w);
  }
}

// Whether a spin seems to wait for lanes of its own warp. A checked launch is sure first that nothing else
// goes on anywhere: lanes that were let go too early would come to the next barrier alone, and that is a finding.
bool Block::stalled(Warp& w) {
  if (!grid->checker) return ++w.stalls >= kStallsBeforeRelease;
  if (w.shadow->useful_turns != grid->useful_turns) w.shadow->useful_turns = grid->useful_turns, w.stalls = 0;
  return ++w.stalls >= kCheckedStallsBeforeRelease;
}

// Every thread makes progress: lanes that wait for others that spin (perhaps on them) go on alone.
bool Block::release_joins(Warp& w) {
  bool released = false;
  for (Join* j : w.joins) {
    if (j->arrived == 0 || j->arrived == j->expected) continue;
    w.ready.push_back({j->pc, j->arrived, j->frame, j->parent});
    j->expected &= ~j->arrived;
    j->arrived = 0;
    released = true;
  }
  return released;
}

void Block::complete(Barrier& b) {
  std::vector<Waiting> waiting = std::move(b.waiting);
  const Barrier done{b.arrived, b.expected, b.population, b.all, b.any, {}};
  b = Barrier{};
  const ClockRef clock =
      grid->checker ? grid->checker->complete(shadow, static_cast<uint32_t>(&b - barriers.data())) : nullptr;
  for (const Waiting& entry : waiting) {
    if (clock) grid->checker->pass(*entry.warp, entry.group.mask, clock);
    const Instruction& i = *entry.instruction;
    uint8_t* registers = entry.group.frame->registers;
    const uint32_t mask = entry.group.mask;
    if (i.immediate == 1) {
      auto* r = reinterpret_cast<uint32_t*>(registers + i.slots[2]);
      for (int l = 0; l < kLanes; ++l)
        if (mask >> l & 1) r[l] = done.population;
    } else if (i.immediate) {
      auto& r = *reinterpret_cast<uint32_t*>(registers + i.slots[2]);
      r = (r & ~mask) | ((i.immediate == 2 ? done.all : done.any) ? mask : 0);
    }
    ConvergenceGroup f = entry.group;
    ++f.pc;
    make_ready(*entry.warp, f);
  }
}

void Block::check_barriers() {
  for (Barrier& b : barriers)
    if (!b.waiting.empty() && b.arrived >= (b.expected ? b.expected : live)) complete(b);
}

void Block::barrier(Warp& w, const Instruction& i, ConvergenceGroup f, uint32_t active) {
  const int lane = std::countr_zero(active);
  const uint32_t id = w.lanes<uint32_t>(i.slots[0])[lane];
  if (id >= 16) throw KernelFault{kIllegalInstruction, "barrier " + std::to_string(id) + " does not exist"};
  Barrier& b = barriers[id];
  if (i.count & 2) {
    const uint32_t count = w.lanes<uint32_t>(i.slots[1])[lane];
    if (count == 0 || count % kLanes)
      throw KernelFault{kIllegalInstruction, "a barrier's thread count must be a multiple of the warp size"};
    b.expected = count;
  }
  if (grid->checker) grid->checker->arrive(w, f.frame->code->effects[f.pc], id, b.expected, active);
  const uint32_t p = w.predicate(i.slots[3]);
  // Counts are in whole warps: the last warp of an uneven block counts as a full one.
  b.arrived += b.expected && active == w.live ? kLanes : static_cast<uint32_t>(std::popcount(active));
  b.population += static_cast<uint32_t>(std::popcount(p & active));
  b.all &= (p & active) == active;
  b.any |= (p & active) != 0;
  if (i.count & 1) {
    ++f.pc;
    f.mask = active;
    w.ready.push_front(f);
  } else {
    b.waiting.push_back({&w, f, &i});
  }
  if (b.arrived >= (b.expected ? b.expected : live)) complete(b);
}

}  // namespace ptx_emulator
