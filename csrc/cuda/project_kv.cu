// All skipped layers' keys and values in one multiplication. The norm of x commutes with it: each row's 1 / rms, from a
// small kernel before, scales the sums.

#include "cuda/heads.h"
#include "cuda/rows.h"
#include "pop/project_kv.h"

namespace pop::cuda {
namespace {

constexpr const char* kName = "project_kv";

struct RowScales {
  const void* x;
  int64_t x_stride, tokens, hidden;
  float eps;
  float* scales;
};

template <typename T>
__global__ __launch_bounds__(kMaxRowThreads) void row_scales(const __grid_constant__ RowScales p) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  Vector unused;
  const T* const x = static_cast<const T*>(p.x) + (token < p.tokens ? token : 0) * p.x_stride;
  const float scale = reciprocal_rms(x, p.hidden, p.eps, unused);
  if (token < p.tokens && threadIdx.x == 0) p.scales[token] = scale;
}

}  // namespace

int64_t project_kv_workspace(const ProjectKv& a) { return a.tokens * int64_t{sizeof(float)}; }

void project_kv(const ProjectKv& a, void* workspace, Stream stream) {
  if (a.tokens == 0 || a.layers == 0) return;
  const RowScales rows{a.hidden, a.hidden_stride, a.tokens, a.in, a.eps, static_cast<float*>(workspace)};
  const RowLaunch l = row_launch(a.tokens, a.in);
  if (a.dtype == DType::kBFloat16)
    launch<&row_scales<bf16>>(kName, l.grid, l.block, 0, stream, rows);
  else
    launch<&row_scales<fp16>>(kName, l.grid, l.block, 0, stream, rows);
  const Heads heads{.layers = static_cast<int>(a.layers),
                    .query_heads = 0,
                    .kv_heads = static_cast<int>(a.key_caches.heads),
                    .head_size = static_cast<int>(a.key_caches.head_size),
                    .bias = a.bias,
                    .row_scale = rows.scales,
                    .q_norm = nullptr,
                    .k_norm = a.k_norm,
                    .eps = a.eps,
                    .cos = a.cos,
                    .sin = a.sin,
                    .rope_index = a.rope_index,
                    .slot_mapping = a.slot_mapping,
                    .query = nullptr,
                    .keys = a.key_caches,
                    .values = a.value_caches,
                    .key_layer_stride = a.key_layer_stride,
                    .value_layer_stride = a.value_layer_stride};
  project_heads(kName, a.dtype, a.tokens, a.in, a.hidden, a.hidden_stride, a.weight, heads, stream);
}

}  // namespace pop::cuda
