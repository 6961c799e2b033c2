// Blocks of a grid over the host's cores, in an order that lets those that spin wait for others.
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cstdio>
#include <cstring>
#include <thread>

#include "guarded.h"
#include "schedule/block.h"
#include "schedule/stack.h"

namespace ptx_emulator {

namespace {

constexpr uint64_t kHopeless = 200;  // turns in a row that a block has spent in spins
// PTX frames are larger than the hardware's, which keeps arguments in registers: the stack limit is scaled by this.
constexpr uint32_t kFrameRoom = 16;

std::atomic<uint32_t> current_stack_limit{1024};

std::string fault_place(const Block& block, const Warp* w) {
  if (!w || !w->current || !w->frame) return "";
  return place(block, *w, w->active) + ", " + describe(*w->frame->code, *w->current);
}

// Runs one block for a turn; true when it is done.
bool run_turn(Grid& grid, Block& block) {
  bool done = true;
  void* address = nullptr;
  try {
    if (!guarded([&] { done = block.run(); }, &address)) {
      char text[80];
      std::snprintf(text, sizeof(text), "illegal memory access at 0x%llx",
                    static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(address)));
      grid.fail(kIllegalAddress, std::string(text) + ": " + fault_place(block, block.running));
      return true;
    }
    return done;
  } catch (const KernelFault& fault) {
    const bool deadlock = fault.message.starts_with("deadlock");
    const std::string at = deadlock ? "" : ": " + fault_place(block, block.running);
    if (deadlock && grid.checker) block.report_deadlock(fault.message);
    grid.fail(fault.code, fault.message + at);
  } catch (const std::exception& error) {
    grid.fail(kLaunchFailure, std::string("out of resources: ") + error.what());
  }
  return true;
}

double deadlock_seconds() {
  static const double seconds = [] {
    const char* text = std::getenv("PTX_EMULATOR_DEADLOCK_SECONDS");
    return text ? std::atof(text) : 5.0;
  }();
  return seconds;
}

void work(Grid& grid) {
  std::unique_lock lock(grid.mutex);
  for (;;) {
    if (grid.failed || grid.finished == grid.total) break;
    std::unique_ptr<Block> block;
    const bool can_admit = grid.next < grid.total && grid.resident < grid.limit;
    if (can_admit && (grid.suspended.empty() || grid.admits())) {
      const uint64_t index = grid.next++;
      ++grid.resident;
      grid.admit_next = false;
      grid.last_change = std::chrono::steady_clock::now();
      if (!grid.spare.empty()) {
        block = std::move(grid.spare.back());
        grid.spare.pop_back();
      }
      lock.unlock();
      try {
        if (!block) block = std::make_unique<Block>(grid);
        block->reset(index);
      } catch (const std::exception& error) {
        grid.fail(kLaunchFailure, std::string("out of resources: ") + error.what());
        lock.lock();
        break;
      }
    } else if (!grid.suspended.empty()) {
      const size_t at = grid.choose_suspended();
      block = std::move(grid.suspended[at]);
      grid.suspended.erase(grid.suspended.begin() + static_cast<long>(at));
      grid.admit_next = true;
      lock.unlock();
    } else {
      grid.changed.wait(lock);
      continue;
    }
    lock.lock();
    grid.running.push_back(block.get());
    lock.unlock();
    const bool done = run_turn(grid, *block);
    lock.lock();
    std::erase(grid.running, block.get());
    if (done) {
      ++grid.finished;
      --grid.resident;
      grid.last_change = std::chrono::steady_clock::now();
      grid.spare.push_back(std::move(block));
    } else {
      const uint64_t writes = block->writes();
      if (writes != block->seen_writes || block->fruitless == 0)
        grid.last_change = std::chrono::steady_clock::now(), block->seen_writes = writes;
      Block* spinner = block.get();
      grid.suspended.push_back(std::move(block));
      // Every resident block spins, nothing has been written, and no block came or went for a long time: no store can
      // end these spins.
      bool all_spin = spinner->fruitless > kHopeless;
      for (const auto& other : grid.suspended) all_spin &= other->fruitless > kHopeless;
      for (const Block* other : grid.running) all_spin &= other->fruitless > kHopeless;
      if (all_spin && std::chrono::duration<double>(std::chrono::steady_clock::now() - grid.last_change).count() >
                          deadlock_seconds()) {
        std::string text = "deadlock: every resident block spins and none writes";
        for (const auto& other : grid.suspended) text += text.size() < 4000 ? other->where() : "";
        if (grid.checker && !grid.suspended.empty()) grid.suspended.front()->report_deadlock(text);
        if (!grid.failed.exchange(true)) grid.code = kLaunchTimeout, grid.message = text;
      }
    }
    grid.changed.notify_all();
  }
  grid.changed.notify_all();
}

// Threads that wait for grids, one for each core.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: kernels may run in static destructors
    return *pool;
  }

  void run(Grid& grid, uint64_t most = ~uint64_t{0}) {
    const std::lock_guard one_at_a_time(run_mutex_);
    ensure_started();
    const size_t wanted = static_cast<size_t>(std::min<uint64_t>({threads_.size(), grid.total, most}));
    std::unique_lock lock(mutex_);
    grid_ = &grid;
    wanted_ = busy_ = wanted;
    wake_.notify_all();
    done_.wait(lock, [&] { return busy_ == 0; });
    grid_ = nullptr;
  }

 private:
  void ensure_started() {
    // A child of fork has none of its parent's threads.
    if (!threads_.empty() && owner_ == getpid()) return;
    owner_ = getpid();
    threads_.clear();
    const char* text = std::getenv("PTX_EMULATOR_THREADS");
    const int count =
        std::clamp(text ? std::atoi(text) : static_cast<int>(std::thread::hardware_concurrency()), 1, 256);
    for (int k = 0; k < count; ++k) {
      threads_.push_back(new std::thread([this] { loop(); }));
      threads_.back()->detach();
    }
  }

  void loop() {
    std::fesetenv(FE_DFL_ENV);
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return grid_ && wanted_ > 0; });
      --wanted_;
      Grid* grid = grid_;
      lock.unlock();
      work(*grid);
      lock.lock();
      if (--busy_ == 0) done_.notify_all();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread*> threads_;
  Grid* grid_ = nullptr;
  size_t wanted_ = 0, busy_ = 0;
  pid_t owner_ = 0;
};

}  // namespace

uint32_t stack_limit() { return current_stack_limit; }
void set_stack_limit(uint32_t bytes) { current_stack_limit = bytes; }

int occupancy(const Kernel& kernel, uint32_t threads, uint32_t dynamic_shared) {
  const DeviceLimits& d = device_limits();
  if (threads == 0 || threads > static_cast<uint32_t>(kernel.max_threads)) return 0;
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  const uint64_t shared = uint64_t{kernel.static_shared} + dynamic_shared;
  if (shared > static_cast<uint64_t>(d.shared_per_block_optin)) return 0;
  const int by_threads = d.threads_per_sm / static_cast<int>(warps * kLanes);
  const int by_shared = static_cast<int>(static_cast<uint64_t>(d.shared_per_sm) / (shared + 1024));
  const int by_registers = d.registers_per_sm / static_cast<int>(warps * kLanes) / kernel.registers;
  return std::min({d.blocks_per_sm, by_threads, by_shared, by_registers});
}

LaunchResult run_grid(const LaunchRequest& request) {
  static std::atomic<uint64_t> launches{0};
  Grid grid;
  grid.request = request;
  grid.request.parameters.resize(std::max<size_t>(request.parameters.size(), request.kernel->parameter_bytes) + 64);
  const size_t parameter_bytes = grid.request.parameters.size();
  grid.parameters = aligned_bytes(parameter_bytes);
  std::memcpy(grid.parameters.get(), grid.request.parameters.data(), parameter_bytes);
  grid.total = request.grid.count();
  grid.threads = static_cast<uint32_t>(request.block.count());
  grid.warps = (grid.threads + kLanes - 1) / kLanes;
  grid.id = ++launches;
  grid.limit = static_cast<uint64_t>(std::max(1, occupancy(*request.kernel, grid.threads, request.dynamic_shared))) *
               static_cast<uint64_t>(device_limits().sm_count);
  grid.local_stride =
      (request.kernel->local_bytes + (request.kernel->recursive ? kFrameRoom * stack_limit() : 0) + 63) / 64 * 64;
  if (!launch_settings().any()) {
    Pool::instance().run(grid);
    std::fflush(stdout);
    return {grid.code, grid.message, grid.instructions, {}};
  }
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  grid.checker = std::make_unique<LaunchChecker>(grid.request, grid.warps, launch_settings());
  grid.checker->set_memory(grid.parameters.get(), parameter_bytes, grid.workspace, sizeof(grid.workspace));
  const std::pair<uint32_t, uint32_t> warps = grid.checker->warps();
  Pool::instance().run(grid, 1);
  std::fflush(stdout);
  grid.suspended.clear(), grid.spare.clear();
  grid.checker.reset();
  return {grid.code, grid.message, grid.instructions, warps};
}

}  // namespace ptx_emulator
