
#include "guarded.h"

#include <setjmp.h>
#include <signal.h>

#include <mutex>

namespace ptx_emulator {

namespace {

// A wild pointer in a kernel is a fault of that kernel, not of the process.
thread_local sigjmp_buf* fault_return = nullptr;
thread_local void* fault_address = nullptr;
struct sigaction previous_segv, previous_bus;

void on_fault(int number, siginfo_t* info, void* context) {
  if (fault_return) {
    fault_address = info->si_addr;
    siglongjmp(*fault_return, 1);
  }
  const struct sigaction& previous = number == SIGSEGV ? previous_segv : previous_bus;
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(number, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(number);
  signal(number, SIG_DFL);
  raise(number);
}

void install_fault_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
  });
}

}  // namespace

bool guarded(const std::function<void()>& access, void** where) {
  install_fault_handler();
  sigjmp_buf here;
  sigjmp_buf* const outer = fault_return;
  if (sigsetjmp(here, 0)) {
    fault_return = outer;
    if (where) *where = fault_address;
    return false;
  }
  fault_return = &here;
  try {
    access();
  } catch (...) {
    fault_return = outer;
    throw;
  }
  fault_return = outer;
  return true;
}

}  // namespace ptx_emulator
