#pragma once

// Prefill's attention for sm_90a: see attention_hopper.cu.

#include "cuda/attention_tiles.h"
#include "pop/attention.h"

namespace pop::cuda {

inline constexpr int kHopperRows = 128;  // of a block

/// Whether the current device runs this kernel, and it serves such a call (if that is prefill's).
bool hopper_attention_serves(const Attention&);

/// Launches a block for each of `blocks` parts of the rows, key/value head and split.
void launch_hopper_attention(const Attention&, const AttentionParameters&, int64_t blocks, Stream);

}  // namespace pop::cuda
