// Blocks and frames as they begin: memory, registers, and what these hold from the start.
#include <algorithm>
#include <cstring>

#include "schedule/block.h"

namespace ptx_emulator {

namespace {

constexpr uint32_t kReservedShared = 1024;

}  // namespace

Block::Block(Grid& g) : grid(&g) {
  const Kernel& kernel = *g.request.kernel;
  shared_bytes = kernel.static_shared + g.request.dynamic_shared;
  if (kernel.reserved_shared) shared_bytes = (shared_bytes + 15) / 16 * 16 + kReservedShared;
  shared = aligned_bytes(shared_bytes);
  for (uint32_t k = 0; k < g.warps; ++k) {
    auto w = std::make_unique<Warp>();
    w->index = k;
    w->block = this;
    w->parameters = g.parameters.get();
    w->shared = shared.get();
    w->shared_bytes = shared_bytes;
    w->local_stride = g.local_stride;
    if (g.local_stride) w->local_storage = aligned_bytes(size_t{g.local_stride} * kLanes);
    w->local = w->local_storage.get();
    w->entry = make_frame(*w, *kernel.entry);
    warps.push_back(std::move(w));
  }
}

void Block::reset(uint64_t new_index) {
  index = new_index;
  const Dim3& grid_size = grid->request.grid;
  id = {static_cast<uint32_t>(index % grid_size.x), static_cast<uint32_t>(index / grid_size.x % grid_size.y),
        static_cast<uint32_t>(index / grid_size.x / grid_size.y)};
  live = grid->threads;
  fruitless = 0;
  for (Barrier& b : barriers) b = Barrier{};
  waits.clear();
  timed_out = 0;
  multiplications.assign(grid->warps, 0);
  free_registers = 0;
  const uint32_t registers =
      grid->request.kernel->sets_registers ? launch_registers(*grid->request.kernel, grid->threads) : 0;
  for (auto& w : warps) {
    const uint32_t count = std::min<uint32_t>(kLanes, grid->threads - w->index * kLanes);
    w->present = w->live = count == kLanes ? kAllLanes : (1u << count) - 1;
    w->spins = w->stalls = 0;
    w->turns_spun = 0;
    w->polls = 0;
    w->phases = 0;
    w->held = registers;
    w->ready.clear();
    w->parked.clear();
    while (!w->joins.empty()) drop_join(*w, w->joins.back());
    w->entry->lanes = w->live;
    fill_presets(*w, *w->entry);
    w->ready.push_back({0, w->live, w->entry, nullptr});
  }
  if (grid->checker) grid->checker->begin_block(shadow, index, id, warps, shared.get(), shared_bytes);
}

uint64_t Block::writes() const {
  uint64_t sum = 0;
  for (const auto& w : warps) sum += w->writes;
  return sum;
}

Frame* Block::make_frame(Warp& w, const Code& code) {
  auto& free = w.free_frames[&code];
  if (!free.empty()) {
    Frame* frame = free.back();
    free.pop_back();
    return frame;
  }
  w.storage.push_back(aligned_bytes(code.frame_bytes));
  w.frames.push_back(std::make_unique<Frame>());
  Frame* frame = w.frames.back().get();
  frame->code = &code;
  frame->registers = w.storage.back().get();
  for (const Constant& c : code.constants) {
    uint8_t* at = frame->registers + c.slot;
    if (c.bytes == 0)
      std::memcpy(at, &c.bits, 4);
    else
      for (int l = 0; l < kLanes; ++l) std::memcpy(at + l * c.bytes, &c.bits, c.bytes);
  }
  return frame;
}

void Block::fill_presets(Warp& w, Frame& frame) {
  const Dim3 &threads = grid->request.block, &blocks = grid->request.grid;
  for (const Preset& preset : frame.code->presets) {
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t thread = w.index * kLanes + l;
      uint64_t v = 0;
      switch (preset.special) {
        case Special::kTidX:
          v = thread % threads.x;
          break;
        case Special::kTidY:
          v = thread / threads.x % threads.y;
          break;
        case Special::kTidZ:
          v = thread / threads.x / threads.y;
          break;
        case Special::kNtidX:
          v = threads.x;
          break;
        case Special::kNtidY:
          v = threads.y;
          break;
        case Special::kNtidZ:
          v = threads.z;
          break;
        case Special::kCtaidX:
          v = id.x;
          break;
        case Special::kCtaidY:
          v = id.y;
          break;
        case Special::kCtaidZ:
          v = id.z;
          break;
        case Special::kNctaidX:
          v = blocks.x;
          break;
        case Special::kNctaidY:
          v = blocks.y;
          break;
        case Special::kNctaidZ:
          v = blocks.z;
          break;
        case Special::kLaneId:
          v = l;
          break;
        case Special::kWarpId:
          v = w.index;
          break;
        case Special::kNwarpId:
          v = grid->warps;
          break;
        case Special::kSmId:
          v = index % static_cast<uint64_t>(device_limits().sm_count);
          break;
        case Special::kNsmId:
          v = static_cast<uint64_t>(device_limits().sm_count);
          break;
        case Special::kGridId:
          v = grid->id;
          break;
        case Special::kLanemaskEq:
          v = 1u << l;
          break;
        case Special::kLanemaskLt:
          v = (1u << l) - 1;
          break;
        case Special::kLanemaskLe:
          v = (1u << l) | ((1u << l) - 1);
          break;
        case Special::kLanemaskGe:
          v = ~((1u << l) - 1);
          break;
        case Special::kLanemaskGt:
          v = ~((1u << l) | ((1u << l) - 1));
          break;
        case Special::kDynamicShared:
          v = grid->request.dynamic_shared;
          break;
        case Special::kTotalShared:
          v = shared_bytes;
          break;
        case Special::kZero:
          v = 0;
          break;
        case Special::kOne:
          v = 1;
          break;
        case Special::kParameterBase:
          v = reinterpret_cast<uint64_t>(w.parameters);
          break;
        case Special::kReservedBegin:
          v = shared_bytes - kReservedShared;
          break;
        case Special::kReservedEnd:
          v = shared_bytes;
          break;
        case Special::kWorkspaceHigh:
          v = grid->request.cooperative ? reinterpret_cast<uint64_t>(grid->workspace) >> 32 : 0;
          break;
        case Special::kWorkspaceLow:
          v = grid->request.cooperative ? reinterpret_cast<uint64_t>(grid->workspace) & 0xffffffff : 0;
          break;
        case Special::kLocalBase:
          v = frame.local_base;
          break;
      }
      if (preset.bytes == 0) {
        const uint32_t mask = v ? kAllLanes : 0;
        std::memcpy(frame.registers + preset.slot, &mask, 4);
        break;
      }
      std::memcpy(frame.registers + preset.slot + l * preset.bytes, &v, preset.bytes);
    }
  }
}

}  // namespace ptx_emulator
