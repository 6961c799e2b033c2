
#include "counts/history.h"

#include <algorithm>

namespace ptx_emulator {

std::vector<Loop> find_loops(const Code& code) {
  const auto& ins = code.instructions;
  const size_t n = ins.size();
  std::vector<std::vector<uint32_t>> before(n + 1);
  const auto ends = [](Kind k) { return k == Kind::kReturn || k == Kind::kExit; };
  for (uint32_t pc = 0; pc < n; ++pc) {
    const bool guarded = code.effects[pc].guard != ~0u;
    if (ins[pc].kind == Kind::kBranch) before[ins[pc].target].push_back(pc);
    if (ins[pc].kind == Kind::kBranchIndirect)
      for (const uint32_t t : code.tables[ins[pc].target]) before[t].push_back(pc);
    if (guarded || !(ins[pc].kind == Kind::kBranch || ins[pc].kind == Kind::kBranchIndirect || ends(ins[pc].kind)))
      before[pc + 1].push_back(pc);
  }
  std::map<size_t, std::vector<bool>> bodies;
  std::map<size_t, size_t> backs;
  for (uint32_t pc = 0; pc < n; ++pc) {
    if (ins[pc].kind != Kind::kBranch || ins[pc].target > pc) continue;
    const uint32_t header = ins[pc].target;
    std::vector<bool> body(n);
    body[header] = true;
    std::vector<uint32_t> stack{pc};
    bool natural = true;
    while (!stack.empty() && natural) {
      const uint32_t at = stack.back();
      stack.pop_back();
      if (body[at]) continue;
      body[at] = true;
      natural = at != 0;
      for (const uint32_t p : before[at]) stack.push_back(p);
    }
    if (!natural) continue;
    auto& all = bodies[header];
    all.resize(n);
    for (size_t k = 0; k < n; ++k) all[k] = all[k] || body[k];
    backs[header] = std::max<size_t>(backs[header], pc);
  }
  std::vector<Loop> loops;
  for (const auto& [header, body] : bodies) {
    Loop loop;
    loop.header = header, loop.back = backs[header];
    for (size_t k = 0; k < n; ++k)
      if (body[k]) loop.body.push_back(k);
    for (const auto& [other, outer] : bodies) loop.depth += outer[header];
    loops.push_back(std::move(loop));
  }
  return loops;
}

std::shared_ptr<const std::string> counted_module(size_t number) {
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  return number < h.modules.size() ? h.modules[number] : nullptr;
}

void clear_counts() {
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  h.launches.clear(), h.modules.clear();
}

}  // namespace ptx_emulator
