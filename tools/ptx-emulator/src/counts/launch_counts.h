// Counts of a launch: for each PTX instruction, loop and allocation. They are a model: docs in README.md.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "machine.h"
#include "memory.h"

namespace ptx_emulator {

struct Counter {
  uint64_t issued = 0;    // warp instructions, those with no lane left by their guard included
  uint64_t off = 0;       // of them, without a lane
  uint64_t lanes = 0;     // that executed it
  uint64_t requests = 0;  // global: warp instructions that touch it
  uint64_t sectors = 0;   // of 32 bytes
  uint64_t bytes = 0;     // distinct in each request
  uint64_t shared_requests = 0;
  uint64_t groups = 0;      // of lanes that shared memory serves together
  uint64_t wavefronts = 0;  // conflicts are these less the groups

  void add(const Counter& other);
};

struct AllocationCount {
  std::string name;
  uint64_t bytes = 0;  // its size
  uint64_t requests = 0, sectors = 0, read_bytes = 0, written_bytes = 0;
  uint64_t distinct_read = 0, distinct_written = 0;  // over the whole launch
};

class LaunchCounts {
 public:
  LaunchCounts(const Kernel& kernel, Dim3 grid, Dim3 block, uint32_t dynamic_shared);
  Counter& at(uint32_t instruction) { return counters_[instruction]; }
  // One request of global memory: addresses of the lanes, and how many bytes each touches.
  void global(Counter& counter, const uint64_t* address, Region* const* region, const uint32_t* sizes, uint32_t bytes,
              uint32_t lanes, bool write, bool read);
  // A bulk copy: bytes of global memory, in one request.
  void bulk(Counter& counter, const std::vector<std::pair<uint64_t, uint32_t>>& pieces, Region* region, bool write);
  // Shared memory: `rows`: each of the first 8 * rows lanes is a row of a matrix.
  void shared(Counter& counter, const uint64_t* address, uint32_t bytes, uint32_t lanes, bool matrix);
  void finish();  // to the history

 private:
  AllocationCount& allocation(Region& region);

  const Kernel& kernel_;
  Dim3 grid_, block_;
  uint32_t dynamic_shared_;
  uint64_t launch_;
  std::vector<Counter> counters_;
  std::map<uint64_t, AllocationCount> allocations_;
  std::map<uint64_t, Region*> regions_;
};

}  // namespace ptx_emulator
