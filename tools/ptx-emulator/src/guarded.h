// Runs code that may touch memory that is not there.
#pragma once

#include <functional>

namespace ptx_emulator {

// Runs `access`; false, and the address in `where`, if it touched memory that is not there: it is then left as it
// stands, without destructors.
bool guarded(const std::function<void()>& access, void** where = nullptr);

}  // namespace ptx_emulator
