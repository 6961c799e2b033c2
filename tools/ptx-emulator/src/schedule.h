// Settings of the scheduler.
#pragma once

#include <cstdint>
#include <functional>

namespace pop::emulator {

uint32_t stack_limit();  // bytes of local memory a thread has for calls beyond what is known when a kernel is decoded
void set_stack_limit(uint32_t bytes);

// Runs `access`; false where it touched memory that is not there.
bool guarded(const std::function<void()>& access);

}  // namespace pop::emulator
