// Launches of kernels.
#pragma once

#include "runtime/state.h"

namespace ptx_emulator {

// Checks a launch and copies its arguments; `work` then does it.
cudaError_t prepare_launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                           std::function<cudaError_t()>& work, bool cooperative = false);

}  // namespace ptx_emulator
