// Names and places for findings, and small words that the checks share.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "checks/shadow.h"
#include "stream_order.h"

namespace ptx_emulator {

inline constexpr uint32_t kNoInstruction = ~0u;
// Stamp::info
inline constexpr uint32_t kWrite = 16, kStrengthShift = 5, kAsync = 128, kIdShift = 8;
inline constexpr uint32_t kNever = ~0u;

inline uint32_t first(uint32_t lanes) { return static_cast<uint32_t>(std::countr_zero(lanes)); }

// Rules, for reporting each once at a pair of instructions.
enum Rule : uint32_t {
  kBounds = 1,
  kFreed,
  kMisaligned,
  kUninit,
  kRace,
  kDivergent,
  kAligned,
  kMembers,
  kMismatch,
  kPending,
  kProxy,
  kMbarrierUse,
  kAccumulator,
  kMap,
  kWarpgroup,
};

std::string hex(uint64_t v);
std::string region_name(const Region& r);
const char* space_name(Space s);

// `warp`: counted through the grid.
Spot spot_in(const Kernel& kernel, Dim3 grid, Dim3 block, uint32_t warp, uint32_t instruction, uint32_t lane);
// Of a warp of earlier work.
Spot spot_of_work(const Work& work, uint32_t warp, uint32_t instruction, uint32_t lane);

// Whether bytes lie in a row of an extent.
bool meets(const Extent& e, uintptr_t at, size_t bytes);

}  // namespace ptx_emulator
