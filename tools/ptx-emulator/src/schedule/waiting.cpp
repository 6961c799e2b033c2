// Warps that wait for a phase of an mbarrier, or for registers: until something changes in their block.
#include <algorithm>

#include "schedule/block.h"
#include "wgmma.h"

namespace ptx_emulator {

void Block::wait(Warp& w, const Instruction& i, ConvergenceGroup f) { waits.push_back({&w, f, &i}); }

// All that wait try again, at the instruction that they wait at.
void Block::wake() {
  std::vector<Waiting> woken = std::move(waits);
  waits.clear();
  for (const Waiting& entry : woken) make_ready(*entry.warp, entry.group), entry.warp->stalls = 0;
}

// A try_wait may come back empty-handed after a while: it does where nothing else goes on. False: it has before, and
// nothing was written since.
bool Block::time_out() {
  if (timed_out == writes() + 1) return false;
  timed_out = writes() + 1;
  bool any = false;
  std::vector<Waiting> stay;
  for (Waiting& entry : waits) {
    if (entry.instruction->kind != Kind::kWait ||
        entry.instruction->count != static_cast<uint16_t>(MbarrierUse::kTry)) {
      stay.push_back(entry);
      continue;
    }
    ++entry.group.pc;
    make_ready(*entry.warp, entry.group);
    any = true;
  }
  waits = std::move(stay);
  return any;
}

bool commit_multiplications(Warp& w) {
  ++w.block->multiplications[w.index];
  return !w.block->waits.empty();
}

bool multiplications_over(const Warp& w, int64_t newest) {
  const Block& b = *w.block;
  const size_t first = w.index / 4 * 4;
  for (size_t k = first; k < std::min(first + 4, b.warps.size()); ++k)
    if (b.warps[k]->live && b.multiplications[k] < b.multiplications[w.index] - newest) return false;
  return true;
}

// setmaxnreg: gives registers back to the block, or takes them from what others gave back. False: there are too few.
bool Block::set_registers(Warp& w, const Instruction& i) {
  const auto wanted = static_cast<uint32_t>(i.immediate);
  const bool more = i.count == 1;
  if (more ? wanted < w.held : wanted > w.held)
    throw KernelFault{kIllegalInstruction, "setmaxnreg to " + std::to_string(wanted) + " registers, the warp has " +
                                               std::to_string(w.held) + " of them a thread"};
  if (more && wanted - w.held > free_registers) return false;
  free_registers += w.held;
  free_registers -= wanted;
  w.held = wanted;
  if (!more) wake();
  return true;
}

// Registers of a thread at the launch, as ptxas chooses them for kernels that use setmaxnreg: as many as there are.
uint32_t launch_registers(const Kernel& kernel, uint32_t threads) {
  const Function& f = *kernel.function;
  if (f.most_registers) return f.most_registers / 8 * 8;
  uint64_t most = uint64_t{f.max_threads[0]} * f.max_threads[1] * f.max_threads[2];
  if (!most) most = uint64_t{f.required_threads[0]} * f.required_threads[1] * f.required_threads[2];
  if (!most) most = threads;
  const uint64_t warps = (most + kLanes - 1) / kLanes;
  const uint64_t share = static_cast<uint64_t>(device_limits().registers_per_sm) /
                         (warps * kLanes * std::max(f.blocks_per_sm, 1u)) / 8 * 8;
  return static_cast<uint32_t>(std::min<uint64_t>(share, 248));
}

}  // namespace ptx_emulator
