// Where lanes that a branch parts meet again.
#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "decode.h"
#include "module.h"

namespace ptx_emulator {

// Immediate post-dominators over basic blocks (Cooper, Harvey and Kennedy's iteration on the reversed graph).
void Decoder::find_reconvergence() {
  auto& code = code_.instructions;
  const uint32_t exit = static_cast<uint32_t>(code.size());
  std::vector<bool> leader(exit + 1, false);
  leader[0] = leader[exit] = true;
  const auto ends_block = [](const Instruction& i) {
    return i.kind == Kind::kBranch || i.kind == Kind::kBranchIndirect || i.kind == Kind::kReturn ||
           i.kind == Kind::kExit;
  };
  for (uint32_t pc = 0; pc < exit; ++pc) {
    if (!ends_block(code[pc])) continue;
    leader[pc + 1] = true;
    if (code[pc].kind == Kind::kBranch) leader[code[pc].target] = true;
    if (code[pc].kind == Kind::kBranchIndirect)
      for (const uint32_t target : code_.tables[code[pc].target]) leader[target] = true;
  }
  std::vector<uint32_t> block_of(exit + 1), first, last;
  for (uint32_t pc = 0; pc <= exit; ++pc) {
    if (leader[pc]) first.push_back(pc), last.push_back(pc);
    block_of[pc] = static_cast<uint32_t>(first.size() - 1);
    last.back() = pc;
  }
  const uint32_t count = static_cast<uint32_t>(first.size()), exit_block = count - 1;
  std::vector<std::vector<uint32_t>> successors(count), predecessors(count);
  const auto edge = [&](uint32_t from, uint32_t to) {
    successors[from].push_back(to);
    predecessors[to].push_back(from);
  };
  const uint32_t always = constant(kAllLanes, 0);
  for (uint32_t block = 0; block < exit_block; ++block) {
    const Instruction& end = code[last[block]];
    const bool guarded = end.guard != always;
    if (end.kind == Kind::kBranch) edge(block, block_of[end.target]);
    if (end.kind == Kind::kBranchIndirect)
      for (const uint32_t target : code_.tables[end.target]) edge(block, block_of[target]);
    if (end.kind == Kind::kReturn || end.kind == Kind::kExit) edge(block, exit_block);
    if (!ends_block(end) || guarded) edge(block, block + 1);
  }
  // Reverse postorder of the reversed graph, from the exit.
  std::vector<uint32_t> order, number(count, ~0u);
  std::vector<std::pair<uint32_t, size_t>> stack{{exit_block, 0}};
  std::vector<bool> seen(count, false);
  seen[exit_block] = true;
  while (!stack.empty()) {
    auto& [block, next] = stack.back();
    if (next < predecessors[block].size()) {
      const uint32_t p = predecessors[block][next++];
      if (!seen[p]) seen[p] = true, stack.push_back({p, 0});
    } else {
      number[block] = static_cast<uint32_t>(order.size());
      order.push_back(block);
      stack.pop_back();
    }
  }
  std::reverse(order.begin(), order.end());
  std::vector<uint32_t> dominator(count, ~0u);
  dominator[exit_block] = exit_block;
  for (bool changed = true; changed;) {
    changed = false;
    for (const uint32_t block : order) {
      if (block == exit_block) continue;
      uint32_t best = ~0u;
      for (const uint32_t s : successors[block]) {
        if (dominator[s] == ~0u) continue;
        if (best == ~0u) {
          best = s;
          continue;
        }
        uint32_t a = s, b = best;
        while (a != b) {
          while (number[a] < number[b]) a = dominator[a];
          while (number[b] < number[a]) b = dominator[b];
        }
        best = a;
      }
      if (best != ~0u && dominator[block] != best) dominator[block] = best, changed = true;
    }
  }
  for (uint32_t pc = 0; pc < exit; ++pc) {
    if (!ends_block(code[pc])) continue;
    const uint32_t block = block_of[pc];
    code[pc].reconverge = dominator[block] == ~0u ? exit : first[dominator[block]];
  }
}

}  // namespace ptx_emulator
