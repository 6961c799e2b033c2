// Copies, fills and reads by the host: work of the runtime that kernels' work may race with.
#pragma once

#include <string>
#include <vector>

#include "stream_order.h"

namespace ptx_emulator {

// The host reads device memory: a finding, and false, where a byte was never written.
bool host_reads(const void* base, size_t bytes, const char* who);

// The runtime copies or fills memory, on the stream at hand: a finding where other streams' work races with it.
void check_transfer(const std::string& what, std::vector<Extent> extents);

}  // namespace ptx_emulator
