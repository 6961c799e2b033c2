// Kernels and variables of the programs that were registered or loaded.
#pragma once

#include "runtime/state.h"

namespace ptx_emulator {

KernelHandle* find_kernel(const void* function);  // by host stub or handle; null for neither
cudaError_t symbol_address(const void* symbol, uint8_t** address, size_t* bytes);

}  // namespace ptx_emulator
