// Who runs when in a block: groups of lanes, and warps.
#include "schedule/block.h"

#include <utility>

namespace ptx_emulator {

namespace {

constexpr uint64_t kSlice = 20000;  // warp instructions after which a loop lets others run
constexpr uint32_t kPollsPerSlice = 32;

}  // namespace

// Runs lanes until they wait, exit, or have had their turn.
template <bool kChecked>
void Block::run_group(Warp& w, ConvergenceGroup f) {
  uint32_t pc = f.pc, mask = f.mask;
  Frame* frame = f.frame;
  Join* join = f.join;
  const Instruction* code;
  uint32_t end, stop;
  const auto enter = [&](Frame* to) {
    frame = to;
    w.frame = to;
    w.registers = to->registers;
    code = to->code->instructions.data();
    end = static_cast<uint32_t>(to->code->instructions.size());
  };
  const auto join_at = [&](Join* to) {
    join = to;
    stop = to && to->frame == frame ? to->pc : kNever;
  };
  // The rest of the mask waits behind the instruction for the active lanes.
  const auto set_aside = [&](uint32_t active) {
    if (active == mask) return;
    join_at(make_join(w, frame, pc + 1, mask, mask & ~active, join));
    mask = active;
  };
  enter(frame);
  join_at(join);
  const uint64_t began = w.issued;

  for (;;) {
    if (pc == stop) return arrive(w, join, mask);
    if (pc >= end) {
      if (!frame->caller) return exit_lanes(w, mask, join, frame);
      Frame* callee = frame;
      return_results(w, *callee, mask);
      pc = callee->return_pc;
      callee->lanes &= ~mask;
      enter(callee->caller);
      if (callee->lanes == 0) drop_frame(w, callee);
      join_at(join);
      continue;
    }
    const Instruction& i = code[pc];
    if constexpr (kChecked) {
      if (w.slice == 0) {  // another warp's turn
        w.ready.push_front({pc, mask, frame, join});
        return;
      }
      --w.slice;
    }
    const uint32_t active = mask & (w.predicate(i.guard) ^ i.guard_flip);
    ++w.issued;
    if constexpr (kChecked) {
      w.active = active;
      w.current = &i;
      if (const InstructionEffects& effects = frame->code->effects[pc]; effects.last) {
        grid->checker->issued(w, effects, mask, active);
        w.shadow->parted = !join && active == mask;
        // What lanes do together is checked once they have come together.
        if (active && i.kind != Kind::kWarpSync && !grid->checker->before(w, i, effects)) {
          if (shadow.woken) shadow.woken = false, wake();
          ++pc;
          continue;
        }
      }
    }
    if (active == 0) {
      ++pc;
      continue;
    }
    if constexpr (!kChecked) w.active = active;
    w.current = &i;
    if (i.kind == Kind::kPlain) [[likely]] {
      i.run(w, i);
      ++pc;
      continue;
    }
    switch (i.kind) {
      case Kind::kBranch:
      case Kind::kReturn: {
        const uint32_t target = i.kind == Kind::kReturn ? end : i.target;
        if (active == mask) {
          const bool backward = target <= pc;
          pc = target;
          if (!backward) break;
          // A loop: it may be a spin, and others must have their turn.
          bool turn = w.issued - began > kSlice;
          if (w.polls) {
            w.polls = 0;
            if (++w.spins >= kPollsPerSlice) w.spins = 0, w.spinning = turn = true;
          }
          if (!turn) break;
          w.ready.push_back({pc, mask, frame, join});
          if (w.spinning && stalled(w) && release_joins(w)) w.stalls = 0;
          return;
        }
        const uint32_t rest = mask & ~active;
        const bool leaves = i.reconverge >= end && !frame->caller;
        if (!leaves && stop != i.reconverge) join_at(make_join(w, frame, i.reconverge, mask, 0, join));
        mask = rest;
        if (!leaves && target == i.reconverge)
          join->arrived |= active;  // the rest has yet to come
        else
          w.ready.push_front({target, active, frame, join});
        ++pc;
        break;
      }
      case Kind::kBranchIndirect: {
        const auto& table = frame->code->tables[i.target];
        const uint32_t* index = w.lanes<uint32_t>(i.slots[0]);
        set_aside(active);
        const uint32_t chosen = index[std::countr_zero(active)];
        if (chosen >= table.size())
          throw KernelFault{kInvalidPc, "branch index " + std::to_string(chosen) + " is beyond its table"};
        uint32_t same = 0;
        for (uint32_t m = active; m; m &= m - 1)
          same |= static_cast<uint32_t>(index[std::countr_zero(m)] == chosen) << std::countr_zero(m);
        if (same != mask) {
          const bool leaves = i.reconverge >= end && !frame->caller;
          if (!leaves && stop != i.reconverge) join_at(make_join(w, frame, i.reconverge, mask, 0, join));
          w.ready.push_front({pc, mask & ~same, frame, join});
          mask = same;
        }
        pc = table[chosen];
        break;
      }
      case Kind::kExit: {
        exit_lanes(w, active, join, frame);
        mask &= ~active;
        if (mask == 0) return;
        ++pc;
        break;
      }
      case Kind::kCall: {
        const Call& call = frame->code->calls[i.target];
        set_aside(active);
        if (call.builtin != Builtin::kNone) {
          call_builtin(w, call, frame, mask);
          ++pc;
          break;
        }
        const Code* callee = call.callee;
        if (!callee) {
          const uint64_t* pointers = w.lanes<uint64_t>(call.pointer_slot);
          const uint64_t chosen = pointers[std::countr_zero(mask)];
          uint32_t same = 0;
          for (uint32_t m = mask; m; m &= m - 1)
            same |= static_cast<uint32_t>(pointers[std::countr_zero(m)] == chosen) << std::countr_zero(m);
          callee = &function_at(chosen, call);
          if (same != mask) {
            join_at(make_join(w, frame, pc + 1, mask, 0, join));
            w.ready.push_front({pc, mask & ~same, frame, join});
            mask = same;
          }
        }
        Frame* const next = begin_call(w, call, *callee, frame, mask);
        next->return_pc = pc + 1;
        enter(next);
        join_at(join);
        pc = 0;
        break;
      }
      case Kind::kBarrier: {
        set_aside(active);
        return barrier(w, i, {pc, mask, frame, join}, mask);
      }
      case Kind::kWarpSync: {
        const uint32_t members = w.lanes<uint32_t>(i.slots[0])[std::countr_zero(active)] & w.live;
        if ((members & ~active) == 0) {
          bool runs = true;
          if constexpr (kChecked) runs = grid->checker->before(w, i, frame->code->effects[pc]);
          if (runs) i.run(w, i);
          ++pc;
          break;
        }
        set_aside(active);
        w.parked.push_back({pc, mask, frame, join});
        return release_parked(w);
      }
      case Kind::kSleep: {
        w.spinning = true;
        w.ready.push_back({pc + 1, mask, frame, join});
        if (stalled(w) && release_joins(w)) w.stalls = 0;
        return;
      }
      case Kind::kSignal:
        i.run(w, i);
        if (w.phases) w.phases = 0, wake();
        ++pc;
        break;
      case Kind::kWait:
        i.run(w, i);
        // A try_wait may give up before its phase is over: now and then, unless the order is the plain one.
        if ((w.predicate(i.slots[1]) & active) || (kChecked && gives_up(i))) {
          ++pc;
          break;
        }
        set_aside(active);
        return wait(w, i, {pc, mask, frame, join});
      case Kind::kRegisters:
        if (set_registers(w, i)) {
          ++pc;
          break;
        }
        set_aside(active);
        return wait(w, i, {pc, mask, frame, join});
      case Kind::kPlain:
        break;
    }
  }
}

void Block::run_warp(Warp& w) {
  running = &w;
  w.spinning = false;
  const uint64_t began = w.issued;
  LaunchChecker* const checker = grid->checker.get();
  if (!checker) {
    while (!w.ready.empty() && !w.spinning && w.issued - began < kSlice) {
      const ConvergenceGroup f = w.ready.front();
      w.ready.pop_front();
      run_group<false>(w, f);
    }
    return;
  }
  const bool random = checker->settings.schedule == Schedule::kRandom;
  w.slice = random ? 1 + checker->random() % (checker->random() % 4 ? 16 : 256) : kSlice;
  while (!w.ready.empty() && !w.spinning && w.slice) {
    const size_t at = random ? checker->random() % w.ready.size() : 0;
    const ConvergenceGroup f = w.ready[at];
    w.ready.erase(w.ready.begin() + static_cast<long>(at));
    run_group<true>(w, f);
  }
  grid->useful_turns += !w.spinning;
}

// Of a checked launch, the warp whose turn it is: any, or always the one that the seed puts first, which then
// runs ahead of all others until it has to wait. Warps that spin let the others go first.
Warp* Block::choose_warp() {
  LaunchChecker& checker = *grid->checker;
  Warp* best = nullptr;
  uint32_t count = 0;
  for (auto& w : warps) {
    if (w->ready.empty()) continue;
    if (checker.settings.schedule == Schedule::kRandom) {
      if (checker.random() % ++count == 0) best = w.get();
    } else {
      const auto rank = [](const Warp& x) { return std::pair(x.turns_spun, x.shadow->priority); };
      if (!best || rank(*w) < rank(*best)) best = w.get();
    }
  }
  return best;
}

bool Block::run() {
  uint64_t before = 0, slices = 0;
  for (auto& w : warps) before += w->issued;
  const auto account = [&] {
    uint64_t after = 0;
    for (auto& w : warps) after += w->issued;
    grid->instructions += after - before;
    before = after;
  };
  const bool in_order = !grid->checker || grid->checker->settings.schedule == Schedule::kRoundRobin;
  for (;;) {
    bool any = false, spinning = false;
    if (in_order) {
      for (auto& w : warps) {
        if (w->ready.empty()) continue;
        any = true;
        run_warp(*w);
        spinning |= w->spinning;
      }
    } else if (Warp* const w = choose_warp()) {
      any = true;
      run_warp(*w);
      w->turns_spun = w->spinning ? w->turns_spun + 1 : 0;
      spinning = w->spinning;
    }
    if (live == 0) {
      if (grid->checker) grid->checker->end_block(shadow);
      account();
      return true;
    }
    if (grid->checker && land_copies(!any, spinning)) continue;
    if (!any) {
      bool released = false;
      for (auto& w : warps) released |= release_joins(*w);
      if (!released && !time_out())
        throw KernelFault{kLaunchTimeout, "deadlock: no thread of the block can run" + where()};
    }
    if (spinning) ++fruitless;
    if (spinning || (++slices & 7) == 0) {
      account();
      if (!spinning) fruitless = 0;
      return false;
    }
  }
}

// Of a checked launch, bulk copies in flight: they land where nothing else goes on, at random before. True: the block
// has to go on with what that woke.
bool Block::land_copies(bool idle, bool spinning) {
  LaunchChecker& checker = *grid->checker;
  const bool random = checker.settings.schedule == Schedule::kRandom;
  if (idle || spinning || (random && checker.random() % 4 == 0)) {
    const bool landed = checker.land_bulk(shadow);
    if (shadow.woken) shadow.woken = false, wake();
    return landed && idle;
  }
  return false;
}

bool Block::gives_up(const Instruction& i) {
  LaunchChecker& checker = *grid->checker;
  return i.count == static_cast<uint16_t>(MbarrierUse::kTry) && checker.settings.schedule != Schedule::kRoundRobin &&
         checker.random() % 8 == 0;
}

}  // namespace ptx_emulator
