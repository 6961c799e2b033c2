#pragma once

#include "pop/types.h"

namespace pop {

/// The skipped layers' keys and values from one hidden state, all layers in one multiplication:
/// [k_l; v_l] = rsqrt(mean(hidden^2) + eps) * (hidden weight_l^T) (+ bias_l), then K-norm, RoPE, and the paged cache
/// write.
struct ProjectKv {
  DType dtype;
  int64_t tokens, in, layers;
  const void* hidden;  // [tokens, in], before any norm
  int64_t hidden_stride;
  const void* weight;   // [layers * 2 * kv heads * head_size, in], each layer's K rows then V rows, the input norm's
                        // gain folded in
  const void* bias;     // [layers, 2 * kv heads * head_size] or null
  const float* k_norm;  // [layers, head_size] or null
  float eps;
  const float *cos, *sin;               // [ropes, tokens, head_size / 2], contiguous
  const int32_t* rope_index;            // [layers]
  SlotMapping slot_mapping;             // [tokens], -1: not written
  PagedCache key_caches, value_caches;  // of the first layer
  int64_t key_layer_stride, value_layer_stride;
};

namespace cpu {
void project_kv(const ProjectKv&, const Threads&);
}

namespace cuda {
/// Bytes of device memory that `project_kv` uses while it runs, on the current device; 0 for none.
int64_t project_kv_workspace(const ProjectKv&);
void project_kv(const ProjectKv&, void* workspace, Stream);
}  // namespace cuda

}  // namespace pop
