// What the next launches are checked for, and the order that they run in.
#pragma once

#include <cstdint>

namespace ptx_emulator {

enum Check : uint32_t { kCheckMemory = 1, kCheckInit = 2, kCheckRace = 4, kCheckBarrier = 8, kCheckAll = 15 };
enum class Schedule : uint8_t { kRoundRobin, kRandom, kAdversarial };

// What the next launches are checked for, and in which order they run; from the environment at first.
struct LaunchSettings {
  uint32_t checks = 0;
  Schedule schedule = Schedule::kRoundRobin;
  uint64_t seed = 0;
  bool count = false;
  bool any() const { return checks || schedule != Schedule::kRoundRobin || count; }
};
LaunchSettings& launch_settings();
// False for unknown names. `names`: "memory,init,race,barrier", "all", or nothing.
bool parse_checks(const char* names, uint32_t& checks);
bool parse_schedule(const char* name, Schedule& schedule);

}  // namespace ptx_emulator
