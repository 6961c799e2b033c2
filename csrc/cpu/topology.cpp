#include "cpu/topology.h"

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace pop::cpu {
namespace {

int count_cores() {
  const int processors = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return processors;  // more than CPU_SETSIZE processors
  std::set<std::string> cores;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (!CPU_ISSET(i, &allowed)) continue;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(i) + "/topology/thread_siblings_list");
    std::string siblings;
    if (!std::getline(file, siblings)) siblings = std::to_string(i);  // no such file: a core of its own
    cores.insert(siblings);
  }
  return std::max<int>(1, cores.size());
#else
  return processors;
#endif
}

}  // namespace

int cores() {
  static const int count = count_cores();
  return count;
}

Threads one_thread_per_core(const Threads& threads) { return {std::min(threads.count, cores()), threads.run}; }

}  // namespace pop::cpu
