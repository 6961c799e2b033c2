// Checks a launch as it runs: memory, never-written values, races, barriers; and counts on the way. A launch that is
// checked runs on one host thread, in an order that a seed decides.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "checks/settings.h"
#include "checks/shadow.h"
#include "counts/launch_counts.h"
#include "findings.h"
#include "stream_order.h"

namespace ptx_emulator {

class LaunchChecker : public MbarrierObserver {
 public:
  LaunchChecker(const LaunchRequest& request, uint32_t warps, const LaunchSettings& settings);
  LaunchChecker(const LaunchChecker&) = delete;
  ~LaunchChecker() override;

  const LaunchSettings settings;

  void begin_block(BlockShadow& block, uint64_t index, Dim3 id, std::vector<std::unique_ptr<Warp>>& warps,
                   uint8_t* shared, uint32_t shared_bytes);
  // Before an instruction runs in w.active: takes away lanes that must not run it. False: it is done with.
  bool before(Warp& w, const Instruction& i, const InstructionEffects& effects);
  // An instruction was issued for `mask`, and its guard left `active`.
  void issued(Warp& w, const InstructionEffects& effects, uint32_t mask, uint32_t active);
  void arrive(Warp& w, const InstructionEffects& effects, uint32_t barrier, uint32_t count, uint32_t lanes);
  // Lanes that waited at a barrier go on: they know what all that arrived knew.
  void pass(Warp& w, uint32_t lanes, const ClockRef& clock);
  ClockRef complete(BlockShadow& block, uint32_t barrier);
  void exit(Warp& w, uint32_t lanes);
  // A bulk copy of the block lands now, the oldest or any; false: there is none in flight.
  bool land_bulk(BlockShadow& block);
  void end_block(BlockShadow& block);
  bool mbarrier(Warp& w, int lane, uint32_t at, MbarrierUse use, const MbarrierChange& change) override;
  void phase_completed(Warp& w, uint32_t at) override;
  // Registers and local memory of a new frame are never written.
  void new_frame(Warp& w, Frame& frame, uint32_t lanes);
  void copy_local(Warp& w, uint32_t lane, uint32_t to, uint32_t from, uint32_t bytes);
  void write_local(Warp& w, uint32_t lane, uint32_t at, uint32_t bytes);
  // The system (printf, say) uses these bytes of a thread, given by a generic address.
  void system_reads(Warp& w, uint32_t lane, uint64_t address, uint32_t bytes);
  void deadlock(const std::string& message, const Warp& w, const ConvergenceGroup& f);
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

  bool before_matrix(Warp& w, const InstructionEffects& effects);
  bool before_access(Warp& w, const Instruction& i, const InstructionEffects& effects);

  Region* find_region(uintptr_t address);
  void refresh();
  Spot spot(const Warp& w, const InstructionEffects& effects, uint32_t lane) const;
  Spot spot_of(uint32_t warp, uint32_t instruction, uint32_t lane) const;
  bool once(uint32_t rule, uint32_t instruction, uint32_t other);
  void report(const char* rule, std::string message, const Warp& w, const InstructionEffects& effects, uint32_t lane,
              uint64_t address, const char* space, const Region* region);

  // Never-written values.
  uint32_t* shadow(const Warp& w, uint32_t slot, int which) const;
  uint32_t bad(const Warp& w, const LaneSlot& s) const;
  void set(Warp& w, const LaneSlot& s, uint32_t lanes, uint32_t bad, uint32_t origin, uint32_t loaded);
  void observe(Warp& w, const InstructionEffects& effects, const LaneSlot& s, uint32_t lanes, const char* what,
               bool copies = false);
  void flow(Warp& w, const Instruction& i, const InstructionEffects& effects);
  void flow_multiply(Warp& w, const InstructionEffects& effects);
  void flow_load(Warp& w, const InstructionEffects& effects, const Access& a);
  void flow_store(Warp& w, const InstructionEffects& effects, const Access& a);
  void flow_matrix(Warp& w, const InstructionEffects& effects, const Access& a);
  uint8_t* unwritten(Warp& w, const Access& a, uint32_t lane, int64_t delta) const;

  // Memory.
  void locate(Warp& w, const InstructionEffects& effects, uint32_t slot, bool narrow, int64_t offset, Space space,
              uint32_t bytes, uint32_t lanes, const uint32_t* sizes, Access& a, uint32_t alignment);
  void locate_rows(Warp& w, const InstructionEffects& effects, Access& a);
  bool in_frame(const Warp& w, uint32_t lane, uint64_t offset, uint32_t bytes) const;
  bool async_copy(Warp& w, const Instruction& i, const InstructionEffects& effects);
  void async_wait(Warp& w, uint32_t lanes, int64_t groups);
  void land(WarpShadow& l, const PendingCopy& landing);
  void land_early(WarpShadow& l);

  // Bulk copies, mbarriers, and the asynchronous proxy's order.
  struct Proxy {
    uint32_t warp, thread, epoch;
  };
  bool before_mbarrier(Warp& w, const Instruction& i, const InstructionEffects& effects);
  bool bulk_copy(Warp& w, const Instruction& i, const InstructionEffects& effects);
  void touch_bulk(Warp& w, const InstructionEffects& effects, const BulkCopy& copy, uint32_t lane, uint32_t epoch);
  bool allow_bulk(Warp& w, const InstructionEffects& effects, const BulkCopy& copy, uint32_t lane);
  void count_bulk(const InstructionEffects& effects, const BulkCopy& copy);
  void bulk_wait(Warp& w, const InstructionEffects& effects);
  void land(BlockShadow& block, PendingBulk& bulk);
  void touch_proxy(Warp& w, const InstructionEffects& effects, uint32_t lanes, uint64_t at, uint32_t bytes,
                   Region* region, bool write, const Proxy& proxy);
  ClockRef start_of(const BlockShadow& block) const;  // what its threads know at first
  uint32_t issue(BlockShadow& block, uint32_t thread);
  void learn(WarpShadow& l, uint32_t lanes, uint32_t proxy_warp, uint32_t thread, uint32_t epoch);
  void learn(WarpShadow& l, uint32_t lanes, const ClockRef& clock);
  void proxy_fence(Warp& w);
  void finding(const char* rule, std::string message, const Warp& w, int lane, uint64_t at);

  // wgmma.
  bool multiply(Warp& w, const Instruction& i, const InstructionEffects& effects);
  void multiply_wait(Warp& w, const InstructionEffects& effects);
  void check_in_flight(Warp& w, const InstructionEffects& effects);
  void follow_warpgroup(Warp& w, const InstructionEffects& effects);
  void flow_warpgroup(Warp& w, const Instruction& i, const InstructionEffects& effects);

  // Barriers.
  void divergent(Warp& w, const InstructionEffects& effects, uint32_t missing, uint32_t arrived);
  void check_convergence(Warp& w, const Instruction& i, const InstructionEffects& effects);
  void check_match(const Warp& w, const InstructionEffects& effects, uint32_t barrier, uint32_t count, uint32_t lanes);

  // Races.
  void touch_rows(Warp& w, const InstructionEffects& effects, const Access& a, bool write);
  void touch(Warp& w, const InstructionEffects& effects, const Access& a, bool write, Strength strength, bool async,
             uint32_t ticket, const uint8_t (*data)[32], const uint32_t* sizes);
  void touch_word(Warp& w, const InstructionEffects& effects, const Word& word, bool write, Strength strength,
                  bool async, uint32_t ticket, bool shared);
  bool ordered(const Stamp& e, const WarpShadow& l, uint32_t lanes) const;
  const Work* concurrent(uint32_t warp) const;
  void race(Warp& w, const InstructionEffects& effects, const Word& word, const Stamp& e, bool write, bool async,
            bool shared);
  void race_with_copies(Warp& w, const InstructionEffects& effects, const Word& word, bool write);
  void race_with_readers(Warp& w, const InstructionEffects& effects, const Word& word);
  Clock& mutable_copy(ClockRef& ref, uint32_t block);
  void join(ClockRef& into, const ClockRef& other, uint32_t block);
  ClockRef published(const ClockRef& clock, const WarpShadow& l, uint32_t lane, uint32_t epoch);
  void fence(Warp& w, const InstructionEffects& effects);
  void synchronise(Warp& w, const InstructionEffects& effects, const Access& a, bool reads, bool writes, bool keeps);
  void sync_warp(Warp& w, uint32_t lanes);

  const Kernel& kernel_;
  Dim3 grid_, block_;
  uint32_t real_warps_, warps_, first_warp_;  // of a block, without and with the proxy's
  std::vector<std::shared_ptr<Region>> regions_;
  uint64_t version_ = 0;
  Region* last_region_ = nullptr;
  const Proxy* proxy_ = nullptr;  // who makes the accesses at hand, if no thread
  uint32_t refused_ = 0;          // lanes of the last access that may not be
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

}  // namespace ptx_emulator
