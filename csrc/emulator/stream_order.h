// Which launches nothing orders: work runs when it is enqueued, so order between streams is kept in vector clocks.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace pop::emulator {

// What is known to have been done: for each stream, by number, how much of its work.
using StreamClock = std::map<uint64_t, uint64_t>;

class StreamOrder {
 public:
  static StreamOrder& instance();

  // Work was put on a stream. Stream 0 is the legacy default stream, which blocking streams wait for and it for them.
  void enqueue(uint64_t stream, bool blocking);
  StreamClock at(uint64_t stream);                       // what an event recorded there stands for
  void wait(uint64_t stream, const StreamClock& event);  // cudaStreamWaitEvent
  void host_waits(const StreamClock& event);             // and with it what the host enqueues later
  void host_waits_for_all();
  // Warps (by which looking knows them) of the work at hand, and those of earlier launches that may run beside it.
  void launched(std::pair<uint32_t, uint32_t> warps);
  std::vector<std::pair<uint32_t, uint32_t>> concurrent();

 private:
  struct Launch {
    uint64_t stream, number;
    std::pair<uint32_t, uint32_t> warps;
  };
  std::mutex mutex_;
  std::map<uint64_t, StreamClock> streams_;
  std::map<uint64_t, bool> blocking_;
  StreamClock host_;
  std::vector<Launch> launches_;  // that the host has not waited for
  uint64_t current_ = 0;
};

}  // namespace pop::emulator
