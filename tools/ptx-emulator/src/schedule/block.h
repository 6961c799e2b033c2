// A grid and its resident blocks as they run.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "checks/launch_checker.h"
#include "machine.h"

namespace ptx_emulator {

inline constexpr uint32_t kNever = ~0u;

struct Waiting {
  Warp* warp;
  ConvergenceGroup group;
  const Instruction* instruction;
};

struct Barrier {
  uint32_t arrived = 0;   // threads
  uint32_t expected = 0;  // 0: all that live
  uint32_t population = 0;
  bool all = true, any = false;
  std::vector<Waiting> waiting;
};

struct Grid;

// Of a grid: its warps, who runs, who waits where.
struct Block {
  Grid* grid = nullptr;
  uint64_t index = 0;
  Dim3 id;
  std::vector<std::unique_ptr<Warp>> warps;
  AlignedBytes shared;
  uint32_t shared_bytes = 0;
  std::array<Barrier, 16> barriers;
  std::vector<Waiting> waits;            // for an mbarrier's phase, or registers
  uint64_t timed_out = 0;                // writes() + 1 when they last waited for too long
  std::vector<int64_t> multiplications;  // groups of wgmma that each warp has committed
  uint32_t free_registers = 0;           // of a thread of a warp, that setmaxnreg gave back
  uint32_t live = 0;
  uint64_t fruitless = 0;  // slices spent in spins since the grid last changed
  uint64_t seen_writes = 0;
  Warp* running = nullptr;
  BlockShadow shadow;  // of a checked launch

  explicit Block(Grid& grid);
  void reset(uint64_t index);
  bool run();  // true: done; false: it spins, and others should run
  uint64_t writes() const;
  std::string where() const;
  void report_deadlock(const std::string& message) const;

 private:
  void run_warp(Warp& w);
  template <bool kChecked>
  void run_group(Warp& w, ConvergenceGroup f);
  Warp* choose_warp();

  void fill_presets(Warp& w, Frame& frame);
  Frame* make_frame(Warp& w, const Code& code);
  Join* make_join(Warp& w, Frame* frame, uint32_t pc, uint32_t expected, uint32_t arrived, Join* parent);
  void drop_join(Warp& w, Join* join);
  void drop_frame(Warp& w, Frame* frame);
  void arrive(Warp& w, Join* join, uint32_t mask);
  void exit_lanes(Warp& w, uint32_t mask, Join* join, Frame* frame);
  void release_parked(Warp& w);
  bool release_joins(Warp& w);
  bool stalled(Warp& w);
  void make_ready(Warp& w, ConvergenceGroup f);
  void barrier(Warp& w, const Instruction& i, ConvergenceGroup f, uint32_t active);
  void check_barriers();
  void complete(Barrier& b);
  void wait(Warp& w, const Instruction& i, ConvergenceGroup f);
  void wake();
  bool time_out();
  bool gives_up(const Instruction& i);
  bool land_copies(bool idle, bool spinning);
  bool set_registers(Warp& w, const Instruction& i);
  const Code& function_at(uint64_t pointer, const Call& call) const;
  Frame* begin_call(Warp& w, const Call& call, const Code& callee, Frame* caller, uint32_t lanes);
  void return_results(Warp& w, const Frame& callee, uint32_t lanes);
  void copy_local(Warp& w, uint32_t lanes, uint32_t to, uint32_t from, uint64_t bytes);
  void call_builtin(Warp& w, const Call& call, Frame* frame, uint32_t mask);
  uint8_t* resolve(Warp& w, int lane, uint64_t address);
};

// Registers of a thread at the launch of a kernel that uses setmaxnreg.
uint32_t launch_registers(const Kernel& kernel, uint32_t threads);

struct Grid {
  LaunchRequest request;
  AlignedBytes parameters;  // a tensor map among them lies on 64 bytes
  uint64_t total = 0, limit = 1;
  uint32_t threads = 0, warps = 0;
  uint32_t local_stride = 0;
  uint64_t id = 0;
  alignas(8) uint32_t workspace[2] = {8, 0};  // of a cooperative launch: its size, and the grid's barrier

  std::mutex mutex;
  std::unique_ptr<LaunchChecker> checker;
  std::condition_variable changed;
  std::deque<std::unique_ptr<Block>> suspended;
  std::vector<std::unique_ptr<Block>> spare;
  std::vector<const Block*> running;
  uint64_t next = 0, resident = 0, finished = 0;
  bool admit_next = true;
  std::atomic<uint64_t> instructions{0};
  uint64_t useful_turns = 0;  // of warps that did not spin, in a checked launch
  std::atomic<bool> failed{false};
  int code = 0;
  std::string message;
  std::chrono::steady_clock::time_point last_change = std::chrono::steady_clock::now();

  // In a checked launch, the seed decides which block comes next; adversarially, all that can be resident are
  // first, and then the one that it puts first runs ahead, unless it spins.
  bool admits() {
    if (!checker || checker->settings.schedule == Schedule::kRoundRobin) return admit_next;
    return checker->settings.schedule == Schedule::kAdversarial || checker->random() % 3 == 0;
  }
  size_t choose_suspended() {
    if (!checker || checker->settings.schedule == Schedule::kRoundRobin) return 0;
    if (checker->settings.schedule == Schedule::kRandom) return checker->random() % suspended.size();
    size_t best = 0;
    const auto rank = [&](size_t k) { return std::pair(suspended[k]->fruitless, suspended[k]->shadow.priority); };
    for (size_t k = 1; k < suspended.size(); ++k)
      if (rank(k) < rank(best)) best = k;
    return best;
  }

  void fail(int fault_code, std::string text) {
    const std::lock_guard lock(mutex);
    if (!failed.exchange(true)) code = fault_code, message = std::move(text);
    changed.notify_all();
  }
};

std::string place(const Block& block, const Warp& w, uint32_t lanes);  // block, warp, lanes, for messages

}  // namespace ptx_emulator
