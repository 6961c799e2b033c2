
#include "checks/places.h"

#include <cstdio>

namespace ptx_emulator {

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

std::string region_name(const Region& r) {
  return r.name.empty() ? "allocation " + std::to_string(r.id) + " of " + std::to_string(r.bytes) + " bytes" : r.name;
}

const char* space_name(Space s) { return s == Space::kShared ? "shared" : s == Space::kLocal ? "local" : "global"; }

bool meets(const Extent& e, uintptr_t at, size_t bytes) {
  if (!e.width || !e.height || at + bytes <= e.base) return false;
  const size_t row = at < e.base || e.height == 1 ? 0 : std::min((at - e.base) / e.pitch, e.height - 1);
  for (size_t r = row; r < std::min(row + 2, e.height); ++r)
    if (at < e.base + r * e.pitch + e.width && e.base + r * e.pitch < at + bytes) return true;
  return false;
}

namespace {

const InstructionEffects* effects_in(const Kernel& kernel, uint32_t instruction, const Code** code) {
  for (const Code* c : kernel.ordered_codes)
    if (instruction - c->first_id < c->effects.size()) return *code = c, &c->effects[instruction - c->first_id];
  return nullptr;
}

}  // namespace

Spot spot_in(const Kernel& kernel, Dim3 grid, Dim3 block, uint32_t warp, uint32_t instruction, uint32_t lane) {
  Spot s;
  s.kernel = kernel.name;
  const Code* code = nullptr;
  const InstructionEffects* effects = instruction == kNoInstruction ? nullptr : effects_in(kernel, instruction, &code);
  if (effects) {
    const Statement& st = code->function->statements[code->instructions[effects->id - code->first_id].statement];
    s.line = st.line, s.text = st.text, s.source_line = st.source_line;
    if (st.source_line) s.source = source_file(kernel, st.source_file);
  }
  const uint32_t warps =
      static_cast<uint32_t>((block.count() + kLanes - 1) / kLanes) + (kernel.asynchronous ? kProxyWarps : 0);
  const uint64_t index = warp / warps;
  const uint32_t thread = warp % warps * kLanes + lane;
  s.block[0] = static_cast<uint32_t>(index % grid.x), s.block[1] = static_cast<uint32_t>(index / grid.x % grid.y),
  s.block[2] = static_cast<uint32_t>(index / grid.x / grid.y);
  s.thread[0] = thread % block.x, s.thread[1] = thread / block.x % block.y, s.thread[2] = thread / block.x / block.y;
  return s;
}

Spot spot_of_work(const Work& work, uint32_t warp, uint32_t instruction, uint32_t lane) {
  if (!work.kernel || work.module.expired()) {
    Spot s;
    s.kernel = work.name;
    return s;
  }
  return spot_in(*work.kernel, work.grid, work.block, warp - work.warps.first, instruction, lane);
}

}  // namespace ptx_emulator
