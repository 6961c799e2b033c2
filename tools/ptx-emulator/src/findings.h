// What the checks found: structured records, kept until they are asked for, and printed once.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace ptx_emulator {

// A place in a running kernel. line 0: none.
struct Spot {
  std::string kernel;
  int line = 0;      // of the PTX
  std::string text;  // of the statement
  std::string source;
  int source_line = 0;  // from -lineinfo, 0 without
  uint32_t block[3] = {0, 0, 0}, thread[3] = {0, 0, 0};
};

struct Finding {
  std::string rule, message;
  Spot spot;
  uint64_t address = 0;
  std::string space, allocation;
  std::string second_role;  // what the second party did; empty: there is none
  Spot second;
  uint64_t count = 1;  // of the same at these lines
};

class Findings {
 public:
  static Findings& instance();
  void add(Finding finding);
  void clear();
  size_t size() const;
  std::string json() const;  // a list of objects
  std::string text() const;

 private:
  mutable std::mutex mutex_;
  std::vector<Finding> findings_;
};

std::string quoted(const std::string& text);  // as JSON

}  // namespace ptx_emulator
