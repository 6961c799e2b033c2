// The history of counted launches.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "counts/launch_counts.h"

namespace ptx_emulator {

struct Line {
  int line, source_line;
  std::string text, source, function;
  Class counted;
  uint64_t operations;
  Counter counter;
};

struct Loop {
  size_t header, back;  // instructions of the record
  std::vector<size_t> body;
  uint64_t trips = 0;  // of warps
  int depth = 0;
  bool main = false;
};

struct LaunchRecord {
  uint64_t launch;
  std::string kernel;
  Dim3 grid, block;
  uint32_t static_shared, dynamic_shared;
  size_t module;
  std::vector<Line> lines;
  std::vector<Loop> loops;
  std::vector<AllocationCount> allocations;
};

struct History {
  std::mutex mutex;
  std::vector<LaunchRecord> launches;
  std::vector<std::shared_ptr<const std::string>> modules;  // PTX texts
  uint64_t next = 1;
  static History& instance() {
    static History* history = new History;
    return *history;
  }
};

// Natural loops, by their back edges; those with one header are one loop.
std::vector<Loop> find_loops(const Code& code);

// The PTX text of the history's module of that number; null: there is none.
std::shared_ptr<const std::string> counted_module(size_t number);
void clear_counts();

}  // namespace ptx_emulator
