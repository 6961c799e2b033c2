#pragma once

#include "pop/types.h"

namespace pop {

/// [q; k; v] = x weight^T (+ bias); per-head RMS norm of q and k where gains are given; RoPE (rotate-half) of q and k;
/// q to `query`, k and v to their slots of the paged caches (slot -1: not written).
struct QkvProject {
  DType dtype;
  int64_t tokens, in, query_heads;
  const void* x;  // [tokens, in]
  int64_t x_stride;
  const void* weight;   // [(query_heads + 2 * kv heads) * head_size, in], contiguous
  const void* bias;     // or null
  const float* q_norm;  // [head_size] or null
  const float* k_norm;  // [head_size] or null
  float eps;
  const float *cos, *sin;    // [tokens, head_size / 2], contiguous
  SlotMapping slot_mapping;  // [tokens]
  PagedCache key_cache, value_cache;
  void* query;  // [tokens, query_heads, head_size], contiguous
};

namespace cpu {
void qkv_project(const QkvProject&, const Threads&);
}

namespace cuda {
void qkv_project(const QkvProject&, Stream);
}

}  // namespace pop
