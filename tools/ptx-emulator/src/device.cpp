// The device that is modelled: by PTX_EMULATOR_SM at first.
#include "device.h"

#include <cstdio>
#include <cstdlib>

#include "machine.h"

namespace ptx_emulator {

namespace {

bool choose_limits(int sm, DeviceLimits& limits) {
  DeviceLimits d;
  if (sm == 86) {
    d.sm_count = 84, d.capability_minor = 6, d.shared_per_block_optin = 99 * 1024, d.shared_per_sm = 100 * 1024,
    d.threads_per_sm = 1536, d.blocks_per_sm = 16;
    d.name = "PTX emulator (sm_86 model)";
  } else if (sm == 90) {
    d.sm_count = 132, d.capability_major = 9, d.shared_per_block_optin = 227 * 1024, d.shared_per_sm = 228 * 1024;
    d.name = "PTX emulator (sm_90 model)";
  } else if (sm != 80) {
    return false;
  }
  limits = d;
  return true;
}

DeviceLimits& current() {
  static DeviceLimits limits = [] {
    DeviceLimits d;
    const char* text = std::getenv("PTX_EMULATOR_SM");
    if (text && !choose_limits(std::atoi(text), d))
      std::fprintf(stderr, "PTX emulator: PTX_EMULATOR_SM is '%s': expected 80, 86 or 90\n", text);
    return d;
  }();
  return limits;
}

}  // namespace

const DeviceLimits& device_limits() { return current(); }

bool set_device(int sm) { return choose_limits(sm, current()); }

}  // namespace ptx_emulator
