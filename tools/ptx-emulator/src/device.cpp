// The device that is modelled, by PTX_EMULATOR_SM.
#include <cstdlib>

#include "machine.h"

namespace ptx_emulator {

namespace {

DeviceLimits choose_limits() {
  DeviceLimits d;
  const char* text = std::getenv("PTX_EMULATOR_SM");
  const int sm = text ? std::atoi(text) : 80;
  if (sm == 86) {
    d.sm_count = 84, d.capability_minor = 6, d.shared_per_block_optin = 99 * 1024, d.shared_per_sm = 100 * 1024,
    d.threads_per_sm = 1536, d.blocks_per_sm = 16;
    d.name = "PTX emulator (sm_86 model)";
  } else if (sm == 90) {
    d.sm_count = 132, d.capability_major = 9, d.shared_per_block_optin = 227 * 1024, d.shared_per_sm = 228 * 1024;
    d.name = "PTX emulator (sm_90 model)";
  }
  return d;
}

}  // namespace

const DeviceLimits& device_limits() {
  static const DeviceLimits limits = choose_limits();
  return limits;
}

}  // namespace ptx_emulator
