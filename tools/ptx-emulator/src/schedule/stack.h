// The stack limit: bytes of local memory that a thread has for calls beyond what is known when a kernel is decoded.
#pragma once

#include <cstdint>

namespace ptx_emulator {

uint32_t stack_limit();
void set_stack_limit(uint32_t bytes);

}  // namespace ptx_emulator
