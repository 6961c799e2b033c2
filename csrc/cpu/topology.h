#pragma once

#include "pop/types.h"

namespace pop::cpu {

/// Cores that this process may run on. Processors of one core (hyperthreads) share its tile unit.
int cores();

/// For work on tiles: as many of the threads as there are cores.
Threads one_thread_per_core(const Threads&);

}  // namespace pop::cpu
