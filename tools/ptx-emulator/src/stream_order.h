// Which launches and copies nothing orders: work runs when it is enqueued, so order between streams is kept in vector
// clocks.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace ptx_emulator {

// What is known to have been done: for each stream, by number, how much of its work.
using StreamClock = std::map<uint64_t, uint64_t>;

// Memory that a copy or a fill touches: rows of `width` bytes, `pitch` apart.
struct Extent {
  uintptr_t base;
  size_t width, pitch, height;
  bool write;
};

// A launch (its warps, by which the checks know them), or a copy or fill (its extents).
struct Work {
  std::string name;
  std::pair<uint32_t, uint32_t> warps{0, 0};
  const Kernel* kernel = nullptr;  // while the module is there
  std::weak_ptr<const bool> module;
  Dim3 grid, block;
  std::vector<Extent> extents;
  uint64_t stream = 0, number = 0;
};

class StreamOrder {
 public:
  static StreamOrder& instance();

  // Work was put on a stream. Stream 0 is the legacy default stream, which blocking streams wait for and it for them.
  void enqueue(uint64_t stream, bool blocking);
  StreamClock at(uint64_t stream);                       // what an event recorded there stands for
  void wait(uint64_t stream, const StreamClock& event);  // cudaStreamWaitEvent
  void host_waits(const StreamClock& event);             // and with it what the host enqueues later
  void host_waits_for_all();
  // What the work at hand was, and earlier work that may run beside it.
  void done(Work work);
  std::vector<std::shared_ptr<const Work>> concurrent();

 private:
  std::mutex mutex_;
  std::map<uint64_t, StreamClock> streams_;
  std::map<uint64_t, bool> blocking_;
  StreamClock host_;
  std::vector<std::shared_ptr<const Work>> works_;  // that the host has not waited for
  uint64_t current_ = 0;
};

}  // namespace ptx_emulator
