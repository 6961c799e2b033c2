// Which device is modelled.
#pragma once

namespace ptx_emulator {

// 80, 86 or 90, from now on; false, and nothing changes, for another.
bool set_device(int sm);

}  // namespace ptx_emulator
