// Looking at a launch as it runs: memory, never-written values, races, barriers; and the counts on the way. A launch
// that is looked at runs on one host thread, in an order that a seed decides.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "counts.h"
#include "findings.h"
#include "machine.h"
#include "memory.h"
#include "stream_order.h"

namespace pop::emulator {

enum Check : uint32_t { kCheckMemory = 1, kCheckInit = 2, kCheckRace = 4, kCheckBarrier = 8, kCheckAll = 15 };
enum class Schedule : uint8_t { kRoundRobin, kRandom, kAdversarial };

// What the next launches are looked at for; from the environment at first.
struct LookSettings {
  uint32_t checks = 0;
  Schedule schedule = Schedule::kRoundRobin;
  uint64_t seed = 0;
  bool count = false;
  bool any() const { return checks || schedule != Schedule::kRoundRobin || count; }
};
LookSettings& look_settings();
// False for unknown names. `names`: "memory,init,race,barrier", "all", or nothing.
bool parse_checks(const char* names, uint32_t& checks);
bool parse_schedule(const char* name, Schedule& schedule);

// The host reads device memory: a finding, and false, where a byte was never written.
bool host_reads(const void* base, size_t bytes, const char* who);

// The runtime copies or fills memory, on the stream at hand: a finding where other streams' work races with it.
void look_at_copy(const std::string& what, std::vector<Extent> extents);

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

struct BlockLook;
class Looks;

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

struct Landing {
  uint32_t ticket;
  uint8_t lane, bytes, size;
  bool early;  // may land before the wait
  uint8_t* target;
  const uint8_t* source;
};

struct WarpLook {
  BlockLook* block = nullptr;
  Warp* warp = nullptr;
  uint32_t id = 0;     // unique in the process
  uint32_t clock = 1;  // epoch of all lanes
  ClockRef clocks[kLanes];
  std::unique_ptr<std::array<LaneSync, kLanes>> syncs;
  AlignedBytes local_unwritten;
  uint32_t committed[kLanes] = {};
  std::vector<uint32_t> pending;  // tickets
  std::vector<Landing> landings;
  uint64_t priority = 0;
  uint64_t useful_turns = 0;  // of the grid, when this warp last stalled
  // A branch led the other live lanes away from these for good: at a barrier, that is right if they go to the exit.
  bool parted = false;
  struct Parted {
    const Look* look;
    uint32_t missing, arrived;
  };
  std::vector<Parted> barriers;  // that were reached so
};

struct BarrierLook {
  std::shared_ptr<Clock> clock;   // of all that arrived
  const Clock* joined = nullptr;  // the last that went into it
  uint32_t instruction = ~0u;
  uint32_t count = 0;
  Spot first;
};

struct BlockLook {
  Looks* launch = nullptr;
  uint32_t index = 0;
  uint32_t first_warp = 0;  // id
  Dim3 id;
  uint8_t* shared = nullptr;
  uint32_t shared_bytes = 0;
  Pages unwritten;  // of shared memory: a byte of ones each
  Pages cells;
  std::vector<std::vector<Stamp>> more;
  std::unordered_map<uint64_t, SyncVariable> variables;  // in shared memory
  std::array<BarrierLook, 16> barriers;
  std::vector<std::unique_ptr<WarpLook>> warps;
  uint64_t priority = 0;
};

class Looks {
 public:
  Looks(const LaunchRequest& request, uint32_t warps, const LookSettings& settings);
  Looks(const Looks&) = delete;
  ~Looks();

  const LookSettings settings;

  void begin_block(BlockLook& block, uint64_t index, Dim3 id, std::vector<std::unique_ptr<Warp>>& warps,
                   uint8_t* shared, uint32_t shared_bytes);
  // Before an instruction runs in w.active: takes away lanes that must not run it. False: it is done with.
  bool before(Warp& w, const Instruction& i, const Look& look);
  // An instruction was issued for `mask`, and its guard left `active`.
  void issued(Warp& w, const Look& look, uint32_t mask, uint32_t active);
  void arrive(Warp& w, const Instruction& i, const Look& look, uint32_t barrier, uint32_t count, uint32_t lanes);
  // Lanes that waited at a barrier go on: they know what all that arrived knew.
  void pass(Warp& w, uint32_t lanes, const ClockRef& clock);
  ClockRef complete(BlockLook& block, uint32_t barrier);
  void exit(Warp& w, uint32_t lanes);
  // Registers and local memory of a new frame are never written.
  void new_frame(Warp& w, Frame& frame, uint32_t lanes);
  void copy_local(Warp& w, uint32_t lane, uint32_t to, uint32_t from, uint32_t bytes);
  void write_local(Warp& w, uint32_t lane, uint32_t at, uint32_t bytes);
  // The system (printf, say) uses these bytes of a thread, given by a generic address.
  void system_reads(Warp& w, uint32_t lane, uint64_t address, uint32_t bytes);
  void deadlock(const std::string& message, const Warp& w, const Fragment& f);
  uint64_t random() { return random_(); }

  // Memory that every launch may touch: its parameters, and a cooperative one's barrier.
  void set_memory(const void* parameters, size_t parameter_bytes, const void* workspace, size_t workspace_bytes);
  std::pair<uint32_t, uint32_t> warps() const {
    return {first_warp_, first_warp_ + static_cast<uint32_t>(grid_.count()) * warps_};
  }

 private:
  struct Access {
    uint64_t address[kLanes];  // in its space
    uint8_t* host[kLanes];
    Region* region[kLanes];
    Space space[kLanes];
    uint32_t lanes = 0;
    uint32_t bytes = 0;
    bool any_shared = false, any_global = false;
  };
  struct Ticket {
    uint32_t lanes, done, clock, group;
  };
  struct Word {
    uintptr_t at;
    uint32_t lanes, value;
    Cell* cell;
    uint8_t bytes;
    Region* region;
  };

  Region* find_region(uintptr_t address);
  void refresh();
  Spot spot(const Warp& w, const Look& look, uint32_t lane) const;
  Spot spot_of(uint32_t warp, uint32_t instruction, uint32_t lane) const;
  bool once(uint32_t rule, uint32_t instruction, uint32_t other);
  void report(const char* rule, std::string message, const Warp& w, const Look& look, uint32_t lane, uint64_t address,
              const char* space, const Region* region);

  // Never-written values.
  uint32_t* shadow(const Warp& w, uint32_t slot, int which) const;
  uint32_t bad(const Warp& w, const LaneSlot& s) const;
  void set(Warp& w, const LaneSlot& s, uint32_t lanes, uint32_t bad, uint32_t origin, uint32_t loaded);
  void observe(Warp& w, const Look& look, const LaneSlot& s, uint32_t lanes, const char* what, bool copies = false);
  void flow(Warp& w, const Instruction& i, const Look& look);
  void flow_multiply(Warp& w, const Look& look);
  void flow_load(Warp& w, const Look& look, const Access& a);
  void flow_store(Warp& w, const Look& look, const Access& a);
  void flow_matrix(Warp& w, const Look& look, const Access& a);
  uint8_t* unwritten(Warp& w, const Access& a, uint32_t lane, int64_t delta) const;

  // Memory.
  void locate(Warp& w, const Look& look, uint32_t slot, bool narrow, int64_t offset, Space space, uint32_t bytes,
              uint32_t lanes, const uint32_t* sizes, Access& a, uint32_t alignment);
  void locate_rows(Warp& w, const Look& look, Access& a);
  bool in_frame(const Warp& w, uint32_t lane, uint64_t offset, uint32_t bytes) const;
  bool async_copy(Warp& w, const Instruction& i, const Look& look);
  void divergent(Warp& w, const Look& look, uint32_t missing, uint32_t arrived);
  void async_wait(Warp& w, uint32_t lanes, int64_t groups);
  void land(WarpLook& l, const Landing& landing);
  void land_early(WarpLook& l);

  // Races.
  void touch_rows(Warp& w, const Look& look, const Access& a, bool write);
  void touch(Warp& w, const Look& look, const Access& a, bool write, Strength strength, bool async, uint32_t ticket,
             const uint8_t (*data)[32], const uint32_t* sizes);
  void touch_word(Warp& w, const Look& look, const Word& word, bool write, Strength strength, bool async,
                  uint32_t ticket, bool shared);
  bool ordered(const Stamp& e, const WarpLook& l, uint32_t lanes) const;
  const Work* concurrent(uint32_t warp) const;
  void race(Warp& w, const Look& look, const Word& word, const Stamp& e, bool write, bool async, bool shared);
  void race_with_copies(Warp& w, const Look& look, const Word& word, bool write);
  void race_with_readers(Warp& w, const Look& look, const Word& word);
  Clock& mutable_copy(ClockRef& ref, uint32_t block);
  void join(ClockRef& into, const ClockRef& other, uint32_t block);
  ClockRef published(const ClockRef& clock, const WarpLook& l, uint32_t lane, uint32_t epoch);
  void fence(Warp& w, const Look& look);
  void synchronise(Warp& w, const Look& look, const Access& a, bool reads, bool writes, bool keeps);
  void sync_warp(Warp& w, uint32_t lanes);

  const Kernel& kernel_;
  Dim3 grid_, block_;
  uint32_t warps_, first_warp_;
  std::vector<std::shared_ptr<Region>> regions_;
  uint64_t version_ = 0;
  Region* last_region_ = nullptr;
  uint32_t refused_ = 0;  // lanes of the last access that may not be
  std::vector<Ticket> tickets_;
  std::vector<uint32_t> ticket_places_;                        // the instruction of each
  const std::vector<std::shared_ptr<const Work>> concurrent_;  // that no order is known to
  bool copies_ = false;                                        // some of it are copies
  std::vector<bool> begun_;                                    // blocks
  std::vector<std::vector<Stamp>> more_;
  std::unordered_map<uint64_t, SyncVariable> variables_;
  std::unordered_set<uint64_t> reported_;
  std::shared_ptr<const ClockPart> nothing_;
  ClockRef start_;  // of the block that begins
  std::unique_ptr<LaunchCounts> counts_;
  std::mt19937_64 random_;
  std::vector<Word> words_;
  std::vector<uint32_t> table_, table_used_;

  uintptr_t parameters_ = 0, workspace_ = 0;
  size_t parameter_bytes_ = 0, workspace_bytes_ = 0;
};

}  // namespace pop::emulator
