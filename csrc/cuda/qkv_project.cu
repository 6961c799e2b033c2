#include "cuda/heads.h"
#include "pop/qkv_project.h"

namespace pop::cuda {

void qkv_project(const QkvProject& a, Stream stream) {
  if (a.tokens == 0) return;
  const Heads heads{.layers = 1,
                    .query_heads = static_cast<int>(a.query_heads),
                    .kv_heads = static_cast<int>(a.key_cache.heads),
                    .head_size = static_cast<int>(a.key_cache.head_size),
                    .bias = a.bias,
                    .row_scale = nullptr,
                    .q_norm = a.q_norm,
                    .k_norm = a.k_norm,
                    .eps = a.eps,
                    .cos = a.cos,
                    .sin = a.sin,
                    .rope_index = nullptr,
                    .slot_mapping = a.slot_mapping,
                    .query = a.query,
                    .keys = a.key_cache,
                    .values = a.value_cache,
                    .key_layer_stride = 0,
                    .value_layer_stride = 0};
  project_heads("qkv_project", a.dtype, a.tokens, a.in, a.x, a.x_stride, a.weight, heads, stream);
}

}  // namespace pop::cuda
