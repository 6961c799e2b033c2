#pragma once

// From the sums of a block's rows to the output, or to the workspace where blocks share a context.

#include "cuda/attention_softmax.h"

namespace pop::cuda {

/// Row `row` of the sequence among all rows of the output.
__device__ __forceinline__ int64_t out_row(const AttentionParameters& p, const Rows& rows, int kv_head, int row) {
  int token, head;
  p.group(token, head, row);
  return int64_t{rows.start + token} * p.query_heads + kv_head * p.group.divisor + head;
}

/// Decode: each warp has sums over its keys, which are merged through shared memory.
template <typename C>
__device__ __forceinline__ void store_decode(const AttentionParameters& p, const Rows& rows, int kv_head,
                                             const OnlineSoftmax<C>& s, unsigned char* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* const parts = reinterpret_cast<float*>(shared);
  float2* const stats = reinterpret_cast<float2*>(parts + C::kKeyWarps * C::kRows * C::kSumStride);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * C::kRows + 8 * half + lane / 4;
#pragma unroll
    for (int n = 0; n < C::kValueTiles; ++n)
      *reinterpret_cast<float2*>(parts + row * C::kSumStride + 8 * n + lane % 4 * 2) = {s.acc[0][n][2 * half],
                                                                                        s.acc[0][n][2 * half + 1]};
    if (lane % 4 == 0) stats[row] = {s.row_max[0][half], s.sum(0, half)};
  }
  __syncthreads();
  const int64_t split_row = blockIdx.z * p.rows;
  for (int i = threadIdx.x; i < (rows.end - rows.first) * C::kChunks; i += C::kThreads) {
    const int row = i / C::kChunks, element = i % C::kChunks * 8;
    const MergedRow merged(
        C::kKeyWarps, [&](int w) { return stats[w * C::kRows + row]; },
        [&](int w) { return parts + (w * C::kRows + row) * C::kSumStride + element; });
    const int64_t to = out_row(p, rows, kv_head, rows.first + row);
    if (p.splits == 1) {
      *reinterpret_cast<Vector*>(static_cast<typename C::T*>(p.out) + to * C::kHeadSize + element) =
          merged.template mean<typename C::T>();
    } else {
      store_floats(p.split_values + (split_row + to) * C::kHeadSize + element, merged.values);
      if (element == 0) p.split_stats[split_row + to] = {merged.top, merged.sum};
    }
  }
}

/// Prefill: a warp's rows go through the queries' place, which only this warp reads, to stores of 16 bytes.
template <typename C, typename Softmax>
__device__ __forceinline__ void store_prefill(const AttentionParameters& p, const Rows& rows, int kv_head, int warp_row,
                                              const Softmax& s, unsigned char* shared) {
  using T = typename C::T;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp * C::kWarpRows;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = s.sum(m, half), factor = sum == 0 ? 0.0f : 1.0f / sum;  // 0: no keys
#pragma unroll
      for (int n = 0; n < C::kValueTiles; ++n) {
        const int offset = C::QueryTile::offset(first + 16 * m + 8 * half + lane / 4, 8 * n + lane % 4 * 2);
        *reinterpret_cast<uint32_t*>(shared + offset) =
            pack<T>(s.acc[m][n][2 * half] * factor, s.acc[m][n][2 * half + 1] * factor);
      }
    }
  __syncwarp();
  const int chunk = lane % C::kChunks * 8, chunk_row = lane / C::kChunks;
#pragma unroll
  for (int i = 0; i < C::kWarpRows / C::kPassRows; ++i) {
    const int row = i * C::kPassRows + chunk_row;
    if (warp_row + row < rows.end)
      *reinterpret_cast<Vector*>(static_cast<T*>(p.out) + out_row(p, rows, kv_head, warp_row + row) * C::kHeadSize +
                                 chunk) =
          *reinterpret_cast<const Vector*>(shared + C::QueryTile::offset(first + row, chunk));
  }
}

/// Prefill with the context shared out: a warp's sums go to the workspace.
template <typename C, typename Softmax>
__device__ __forceinline__ void store_split(const AttentionParameters& p, const Rows& rows, int kv_head, int warp_row,
                                            const Softmax& s) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + lane / 4;
      if (row >= rows.end) continue;
      const int64_t to = blockIdx.z * p.rows + out_row(p, rows, kv_head, row);
#pragma unroll
      for (int n = 0; n < C::kValueTiles; ++n)
        *reinterpret_cast<float2*>(p.split_values + to * C::kHeadSize + 8 * n + lane % 4 * 2) = {
            s.acc[m][n][2 * half], s.acc[m][n][2 * half + 1]};
      if (lane % 4 == 0) p.split_stats[to] = {s.row_max[m][half], s.sum(m, half)};
    }
}

inline constexpr int kCombineThreads = 128;

/// The splits' sums to the output: a thread has 8 elements of a row.
template <typename T, int kHeadSize>
__global__ __launch_bounds__(kCombineThreads) void combine_kernel(const __grid_constant__ AttentionParameters p) {
  constexpr int kChunks = kHeadSize / 8;
  const int64_t i = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x, row = i / kChunks;
  // Rows beyond the last sequence's, if there are any, are nobody's.
  if (row >= int64_t{p.cu_seqlens_q[p.sequences]} * p.query_heads) return;
  const MergedRow merged(
      p.splits, [&](int s) { return p.split_stats[s * p.rows + row]; },
      [&](int s) { return p.split_values + (s * p.rows + row) * kHeadSize + i % kChunks * 8; });
  reinterpret_cast<Vector*>(p.out)[i] = merged.mean<T>();
}

}  // namespace pop::cuda
