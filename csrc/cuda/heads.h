#pragma once

// Projection into heads, for `qkv_project` and `project_kv`: bias, per-head RMS norm, RoPE, and each head to its place.

#include "cuda/device.h"
#include "pop/types.h"

namespace pop::cuda {

/// Layers of heads, one after another as rows of the weight: of each layer query_heads queries, then the keys' heads,
/// then as many values. Pointers are null for what a caller does not have.
struct Heads {
  int layers, query_heads, kv_heads, head_size;
  const void* bias;        // [layers, heads of a layer, head_size]
  const float* row_scale;  // [tokens], multiplies the sums
  const float* q_norm;     // [head_size]
  const float* k_norm;     // [layers, head_size]
  float eps;
  const float *cos, *sin;     // [ropes, tokens, head_size / 2]
  const int32_t* rope_index;  // [layers]; null: rope 0
  SlotMapping slot_mapping;   // [tokens], -1: not written
  void* query;                // [tokens, query_heads, head_size]
  PagedCache keys, values;    // of the first layer
  int64_t key_layer_stride, value_layer_stride;
};

/// Multiplies x [tokens, k] by the weight [heads * head_size, k], contiguous, and hands the heads on.
void project_heads(const char* operation, DType dtype, int64_t tokens, int64_t k, const void* x, int64_t x_stride,
                   const void* weight, const Heads&, Stream);

}  // namespace pop::cuda
