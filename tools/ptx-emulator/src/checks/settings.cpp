
#include "checks/settings.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "memory.h"

namespace ptx_emulator {

bool parse_checks(const char* names, uint32_t& checks) {
  checks = 0;
  std::string word;
  for (const char* p = names;; ++p) {
    if (*p && *p != ',' && *p != ' ') {
      word += *p;
      continue;
    }
    if (word == "all")
      checks |= kCheckAll;
    else if (word == "memory")
      checks |= kCheckMemory;
    else if (word == "init")
      checks |= kCheckInit;
    else if (word == "race")
      checks |= kCheckRace;
    else if (word == "barrier")
      checks |= kCheckBarrier;
    else if (!word.empty() && word != "none" && word != "0")
      return false;
    word.clear();
    if (!*p) return true;
  }
}

bool parse_schedule(const char* name, Schedule& schedule) {
  if (!std::strcmp(name, "roundrobin")) return schedule = Schedule::kRoundRobin, true;
  if (!std::strcmp(name, "random")) return schedule = Schedule::kRandom, true;
  if (!std::strcmp(name, "adversarial")) return schedule = Schedule::kAdversarial, true;
  return false;
}

LaunchSettings& launch_settings() {
  static LaunchSettings settings = [] {
    LaunchSettings s;
    const auto read = [](const char* name) -> const char* {
      const char* value = std::getenv(name);
      return value && *value ? value : nullptr;
    };
    if (const char* names = read("PTX_EMULATOR_CHECK"); names && !parse_checks(names, s.checks))
      std::fprintf(stderr, "PTX emulator: PTX_EMULATOR_CHECK is '%s': expected memory, init, race, barrier, or all\n",
                   names),
          s.checks = kCheckAll;
    if (const char* name = read("PTX_EMULATOR_SCHEDULE"); name && !parse_schedule(name, s.schedule))
      std::fprintf(stderr, "PTX emulator: PTX_EMULATOR_SCHEDULE is '%s': expected roundrobin, random or adversarial\n",
                   name);
    if (const char* seed = read("PTX_EMULATOR_SEED")) s.seed = std::strtoull(seed, nullptr, 0);
    s.count = read("PTX_EMULATOR_COUNT") != nullptr;
    if (s.checks) Memory::instance().track(true);
    return s;
  }();
  return settings;
}

namespace {
// From the environment before anything is allocated.
[[maybe_unused]] const bool settings_are_read = (launch_settings(), true);
}  // namespace

}  // namespace ptx_emulator
