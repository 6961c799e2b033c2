// What the checks remember of a launch: clocks of warps, accesses of memory, pending copies, barriers.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "bulk_copy.h"
#include "findings.h"
#include "machine.h"
#include "memory.h"

namespace ptx_emulator {

// Knowledge of what has happened before: for each thread of a block, the last of its epochs that is ordered before.
struct ClockPart {
  std::vector<uint32_t> epochs;  // [warps x 32]
  std::vector<uint32_t> floors;  // of each warp, the least
};
struct Clock {
  std::map<uint32_t, std::shared_ptr<const ClockPart>> parts;  // by block of the grid
  const ClockPart* own = nullptr;
};
using ClockRef = std::shared_ptr<const Clock>;

// An access that later ones may race with.
struct Stamp {
  uint32_t warp = 0;   // unique in the process
  uint32_t clock = 0;  // of the warp; of an asynchronous copy: its ticket
  uint32_t lanes = 0;
  uint32_t info = 0;  // bytes of the word: 4 bits; write, strength: 2, asynchronous; the rest: instruction
};
struct Cell {
  Stamp stamps[3];
  uint32_t owner = 0, more = 0;  // further stamps, if the owner (a warp's id) is who asks: index + 1
  // Blocks, by their index modulo 32, whose reads found no place among the stamps; of the launch with that first warp.
  uint32_t readers_launch = 0, readers = 0;
};
static_assert(sizeof(Cell) == 64);

class LaunchChecker;
struct BlockShadow;
// What an address's strong accesses have published.
struct SyncVariable {
  ClockRef wide;    // at device scope
  ClockRef narrow;  // for one block
  uint32_t narrow_block = ~0u;
  uint32_t wide_block = ~0u;  // the only publisher's; ~0: several
};

struct LaneSync {
  ClockRef fence_wide, fence_narrow;  // what a relaxed write publishes after a fence
  ClockRef pending;                   // what relaxed reads saw, until a fence
  ClockRef pending_block;             // of it, what a fence of block scope suffices for
};

struct PendingCopy {
  uint32_t ticket;
  uint8_t lane, bytes, size;
  bool early;  // may land before the wait
  uint8_t* target;
  const uint8_t* source;
};

// The asynchronous proxy's accesses are ordered as if threads of three further warps of the block made them, each of
// which makes one after another: a thread for each mbarrier that loads land on, a thread for the reads and one for the
// writes of each thread's bulk stores, a thread for each warp's wgmma. Their epochs count through the block.
inline constexpr uint32_t kLoads = 0, kStores = 1, kMultiplications = 2, kProxyWarps = 3;

// A bulk copy in flight.
struct PendingBulk {
  BulkCopy copy;
  uint32_t warp, lane;  // that issued it, in the block
  uint32_t group;       // of a store
  uint32_t epoch;       // of its accesses of shared memory; a store's of global memory have the next
  uint32_t instruction;
  bool landed;
  bool read_waited;  // a store whose reads were waited for
};

struct MbarrierShadow {
  ClockRef gathering, completed;  // what those knew that arrived in this phase, and in the last
  uint32_t phase = 0;
  std::unordered_map<uint32_t, uint32_t> waiting;  // by thread: the phase that it found unfinished
};

// The order of a warpgroup's multiplications: its four warps execute the same.
struct WarpgroupShadow {
  std::vector<uint32_t> instructions;
  uint32_t done[4] = {};
};

struct WarpShadow {
  BlockShadow* block = nullptr;
  Warp* warp = nullptr;
  uint32_t id = 0;     // unique in the process
  uint32_t clock = 1;  // epoch of all lanes
  ClockRef clocks[kLanes];
  std::unique_ptr<std::array<LaneSync, kLanes>> syncs;
  AlignedBytes local_unwritten;
  uint32_t committed[kLanes] = {};
  std::vector<uint32_t> pending;  // tickets
  std::vector<PendingCopy> pending_copies;
  uint64_t priority = 0;
  uint64_t useful_turns = 0;  // of the grid, when this warp last stalled
  // A branch led the other live lanes away from these for good: at a barrier, that is right if they go to the exit.
  bool parted = false;
  struct Parted {
    const InstructionEffects* effects;
    uint32_t missing, arrived;
  };
  std::vector<Parted> barriers;  // that were reached so

  uint32_t bulk_committed[kLanes] = {};
  // wgmma: registers in flight, by slot; and of each 64 bytes of the frame, after how many fences
  // another instruction last wrote them.
  struct InFlight {
    uint32_t group;
    bool accumulator;
  };
  std::unordered_map<uint32_t, InFlight> in_flight;
  std::vector<uint32_t> written;
  uint32_t multiply_fences = 1, multiply_committed = 0;
  std::vector<std::pair<uint32_t, uint32_t>> multiplications;  // group, epoch
};

struct BarrierShadow {
  std::shared_ptr<Clock> clock;   // of all that arrived
  const Clock* joined = nullptr;  // the last that went into it
  uint32_t instruction = ~0u;
  uint32_t count = 0;
  Spot first;
};

struct BlockShadow {
  LaunchChecker* launch = nullptr;
  uint32_t index = 0;
  uint32_t first_warp = 0;  // id
  Dim3 id;
  uint8_t* shared = nullptr;
  uint32_t shared_bytes = 0;
  Pages unwritten;  // of shared memory: a byte of ones each
  Pages cells;
  std::vector<std::vector<Stamp>> more;
  std::unordered_map<uint64_t, SyncVariable> variables;  // in shared memory
  std::unordered_map<uint32_t, MbarrierShadow> mbarriers;
  std::vector<PendingBulk> bulk;
  std::vector<uint32_t> issuers;  // by the proxy's epoch: the thread
  std::vector<WarpgroupShadow> warpgroups;
  bool woken = false;  // a phase ended outside of an instruction
  std::array<BarrierShadow, 16> barriers;
  std::vector<std::unique_ptr<WarpShadow>> warps;
  uint64_t priority = 0;
};

}  // namespace ptx_emulator
