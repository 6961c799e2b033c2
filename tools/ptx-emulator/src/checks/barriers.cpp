// Barriers and other instructions that threads execute together.
#include <algorithm>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

void LaunchChecker::divergent(Warp& w, const InstructionEffects& k, uint32_t missing, uint32_t arrived) {
  if (!once(kAligned, k.id, 0)) return;
  const bool barrier = k.counted == Class::kBarrier;
  report(barrier ? "divergent-barrier" : "divergent-aligned",
         std::string(barrier ? "a barrier" : "an .aligned instruction") + " is reached by " +
             std::to_string(std::popcount(arrived)) + " of the " + std::to_string(std::popcount(arrived | missing)) +
             " live threads of its warp",
         w, k, first(missing), 0, "", nullptr);
}

// .aligned instructions are executed by the whole live warp, .sync ones by threads that their masks name.
void LaunchChecker::check_convergence(Warp& w, const Instruction& i, const InstructionEffects& k) {
  if (k.aligned) {
    const bool barrier = k.counted == Class::kBarrier;
    if (barrier)  // lanes that left others at a barrier, and now come to one
      std::erase_if(w.shadow->barriers, [&](const WarpShadow::Parted& p) {
        if (!(p.missing & w.active)) return false;
        divergent(w, *p.effects, p.missing, p.arrived);
        return true;
      });
    if (const uint32_t missing = w.live & ~w.active) {
      if (barrier && w.shadow->parted)
        w.shadow->barriers.push_back({&k, missing, w.active});
      else
        divergent(w, k, missing, w.active);
    }
  }
  if (i.kind == Kind::kWarpSync) {
    const uint32_t* members = w.lanes<uint32_t>(i.slots[0]);
    for (uint32_t m = w.active; m; m &= m - 1)
      if (!(members[first(m)] >> first(m) & 1) && once(kMembers, k.id, 0))
        report(
            "warp-mask",
            "a thread executes a .sync instruction whose member mask " + hex(members[first(m)]) + " does not name it",
            w, k, first(m), 0, "", nullptr);
  }
}

// Threads that meet at one barrier do so with one count, and at one place where all are meant.
void LaunchChecker::check_match(const Warp& w, const InstructionEffects& k, uint32_t barrier, uint32_t count,
                                uint32_t lanes) {
  BarrierShadow& state = w.shadow->block->barriers[barrier];
  const Spot here = spot(w, k, first(lanes));
  if (lanes != w.live) {
    // Said already: only a part of the warp is here.
  } else if (state.instruction == kNoInstruction) {
    state.instruction = k.id, state.count = count, state.first = here;
  } else if (state.count != count || (state.instruction != k.id && count == 0)) {
    if (once(kMismatch, k.id, state.instruction)) {
      Finding f;
      f.rule = "mismatched-barrier";
      f.message = state.count != count
                      ? "threads wait at barrier " + std::to_string(barrier) + " for different numbers of threads (" +
                            std::to_string(count) + " and " + std::to_string(state.count) + "; 0: all)"
                      : "threads of a block meet at barrier " + std::to_string(barrier) + " in different places";
      f.spot = here;
      f.second_role = "the other place", f.second = state.first;
      Findings::instance().add(std::move(f));
    }
  }
}

void LaunchChecker::deadlock(const std::string& message, const Warp& w, const ConvergenceGroup& group) {
  if (!(settings.checks & kCheckBarrier)) return;
  for (const WarpShadow::Parted& p : w.shadow->barriers)
    divergent(const_cast<Warp&>(w), *p.effects, p.missing, p.arrived);
  Finding f;
  f.rule = "deadlock", f.message = message;
  const auto& effects = group.frame->code->effects;
  f.spot.kernel = kernel_.name;
  if (group.pc < effects.size()) f.spot = spot(w, effects[group.pc], first(group.mask));
  Findings::instance().add(std::move(f));
}

}  // namespace ptx_emulator
