// Where the threads of a block stand, for messages: one place, or that of each thread that waits.
#include <cstdio>

#include "schedule/block.h"

namespace ptx_emulator {

std::string place(const Block& block, const Warp& w, uint32_t lanes) {
  char text[160];
  const Dim3& b = block.id;
  std::snprintf(text, sizeof(text), "kernel '%s', block (%u, %u, %u), warp %u, lanes 0x%08x",
                block.grid->request.kernel->name.substr(0, 60).c_str(), b.x, b.y, b.z, w.index, lanes);
  return text;
}

// The finding names a thread that waits, and where.
void Block::report_deadlock(const std::string& message) const {
  for (const Barrier& b : barriers)
    for (const Waiting& entry : b.waiting) return grid->checker->deadlock(message, *entry.warp, entry.group);
  for (const Waiting& entry : waits) return grid->checker->deadlock(message, *entry.warp, entry.group);
  for (const auto& w : warps)
    for (const ConvergenceGroup& f : w->parked) return grid->checker->deadlock(message, *w, f);
  for (const auto& w : warps)
    for (const ConvergenceGroup& f : w->ready) return grid->checker->deadlock(message, *w, f);
  for (const auto& w : warps)
    for (const Join* j : w->joins)
      if (j->arrived) return grid->checker->deadlock(message, *w, {j->pc, j->arrived, j->frame, nullptr});
}

std::string Block::where() const {
  std::string text;
  for (const auto& w : warps) {
    const auto add = [&](const char* state, const ConvergenceGroup& f) {
      if (text.size() > 3000) return;
      const auto& code = *f.frame->code;
      text += "\n  " + place(*this, *w, f.mask) + " " + state + " at " +
              (f.pc < code.instructions.size() ? describe(code, code.instructions[f.pc]) : std::string("its end"));
    };
    for (const ConvergenceGroup& f : w->ready) add("runs", f);
    for (const ConvergenceGroup& f : w->parked) add("waits for other lanes", f);
    for (const Join* j : w->joins)
      if (j->arrived) add("waits to reconverge", {j->pc, j->arrived, j->frame, nullptr});
    for (const Waiting& entry : waits)
      if (entry.warp == w.get())
        add(entry.instruction->kind == Kind::kWait
                ? "waits for a phase of an mbarrier"
                : ("waits for registers (" + std::to_string(free_registers) + " are free)").c_str(),
            entry.group);
    for (size_t k = 0; k < barriers.size(); ++k)
      for (const Waiting& entry : barriers[k].waiting)
        if (entry.warp == w.get())
          add(("waits at barrier " + std::to_string(k) + " (" + std::to_string(barriers[k].arrived) + " threads of " +
               std::to_string(barriers[k].expected ? barriers[k].expected : live) + ")")
                  .c_str(),
              entry.group);
  }
  return text;
}

}  // namespace ptx_emulator
