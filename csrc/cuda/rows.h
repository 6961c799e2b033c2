#pragma once

// Mean squares of rows of hidden states. A row belongs to as many whole warps as it has use for, short rows several to
// a block.

#include <algorithm>

#include "cuda/device.h"
#include "cuda/numbers.h"

namespace pop::cuda {

inline constexpr int kMaxRowThreads = 1024, kMinBlockThreads = 128;

struct RowLaunch {
  dim3 grid, block;  // block.x threads a row, block.y rows a block
};
inline RowLaunch row_launch(int64_t tokens, int64_t hidden) {
  const int64_t threads = std::min<int64_t>(ceil_div(hidden / 8, 32) * 32, kMaxRowThreads);
  const int64_t rows = std::max<int64_t>(1, kMinBlockThreads / threads);
  return {dim3(static_cast<unsigned>(ceil_div(tokens, rows))),
          dim3(static_cast<unsigned>(threads), static_cast<unsigned>(rows))};
}

/// 1 / sqrt(mean(row^2) + eps), for every thread of the row; all threads of the block call it. `first` becomes the
/// thread's first vector of eight, number threadIdx.x.
template <typename T>
__device__ inline float reciprocal_rms(const T* row, int64_t hidden, float eps, Vector& first) {
  float sum = 0;
  const auto add_squares = [&](const Vector& vector) {
    float v[8];
    unpack<T>(vector, v);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += v[e] * v[e];
  };
  first = {};
  if (threadIdx.x * 8 < hidden) first = *reinterpret_cast<const Vector*>(row + 8 * threadIdx.x);
  add_squares(first);
  for (int64_t i = threadIdx.x + blockDim.x; i * 8 < hidden; i += blockDim.x)
    add_squares(*reinterpret_cast<const Vector*>(row + 8 * i));
#pragma unroll
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  const int warps = blockDim.x / 32;
  if (warps > 1) {
    __shared__ float sums[kMaxRowThreads / 32];
    if (threadIdx.x % 32 == 0) sums[threadIdx.y * warps + threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warps; ++w) sum += sums[threadIdx.y * warps + w];
  }
  return rsqrtf(sum / static_cast<float>(hidden) + eps);
}

}  // namespace pop::cuda
