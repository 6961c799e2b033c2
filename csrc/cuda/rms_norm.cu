// Bound by reading x (and the residual) and writing y once: a row of up to 8,192 stays in registers in between.

#include "cuda/rows.h"
#include "cuda/sums.h"
#include "pop/rms_norm.h"

namespace pop::cuda {
namespace {

template <typename T>
__global__ __launch_bounds__(kMaxRowThreads) void rms_norm_kernel(const __grid_constant__ RmsNorm p) {
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool present = token < p.tokens;
  const T* const x = static_cast<const T*>(p.x) + (present ? token : 0) * p.x_stride;
  Vector first;
  const float scale = reciprocal_rms(x, p.hidden, p.eps, first);
  if (!present) return;
  const auto finish = [&](const Vector& vector, int64_t i) {
    float v[8], gains[8];
    unpack<T>(vector, v);
    unpack(load_floats(p.weight + 8 * i), gains);
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] *= scale * gains[e];
    if (p.residual) {
      const T* const residual = static_cast<const T*>(p.residual) + token * p.residual_stride;
      add<T>(v, *reinterpret_cast<const Vector*>(residual + 8 * i));
    }
    *reinterpret_cast<Vector*>(static_cast<T*>(p.y) + token * p.hidden + 8 * i) = pack<T>(v);
  };
  if (threadIdx.x * 8 < p.hidden) finish(first, threadIdx.x);
  for (int64_t i = threadIdx.x + blockDim.x; i * 8 < p.hidden; i += blockDim.x)
    finish(*reinterpret_cast<const Vector*>(x + 8 * i), i);
}

}  // namespace

void rms_norm(const RmsNorm& a, Stream stream) {
  if (a.tokens == 0) return;
  const RowLaunch l = row_launch(a.tokens, a.hidden);
  if (a.dtype == DType::kBFloat16)
    launch<&rms_norm_kernel<bf16>>("rms_norm", l.grid, l.block, 0, stream, a);
  else
    launch<&rms_norm_kernel<fp16>>("rms_norm", l.grid, l.block, 0, stream, a);
}

}  // namespace pop::cuda
