#pragma once

// The multiplication of gemm.h for at most 64 tokens (decode, boundary), bound by reading the weight once.
//
// Here the weight is the operand of 16 rows and tokens are the 8 columns of mma.m16n8k16, so few tokens waste little. A
// multiplication does not care in which order it takes K, as long as both operands agree: lane q of four takes
// elements 8 q to 8 q + 7 of every 32, so all reads are 16 bytes wide, straight from global memory to registers.
// Warps share a block's rows and divide K; their sums meet in shared memory, added in order.

#include "cuda/gemm.h"

namespace pop::cuda {

template <int kTokens_, int kColumns_>
struct SkinnyTile {
  static constexpr int kTokens = kTokens_, kColumns = kColumns_, kWarps = 8, kThreads = 32 * kWarps;
  // Sixteen rows of the weight at a time in a warp, or twice that so that tokens are read half as often.
  static constexpr int kRowBlocks = kColumns / 16;
  static constexpr int kBlocksPerWarp = std::max(kRowBlocks / kWarps, kTokens >= 32 && kRowBlocks >= 2 ? 2 : 1);
  static constexpr int kRowGroups = kRowBlocks / kBlocksPerWarp, kKGroups = kWarps / kRowGroups;
  static constexpr int kStride = kColumns + kSumsPadding;
  template <typename Epilogue>
  static constexpr int kOutColumns = Epilogue::kPaired ? kColumns / 2 : kColumns;
  template <typename Epilogue>
  static constexpr int shared_bytes() {
    return 4 * kTokens * (kKGroups * kStride + (Epilogue::kPaired ? kOutColumns<Epilogue> + kSumsPadding : 0));
  }
};

/// 16 bytes that are read once: past L1.
template <int kOffset>
__device__ inline Vector load_streaming(const void* from) {
  Vector v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.pairs[0]), "=r"(v.pairs[1]), "=r"(v.pairs[2]), "=r"(v.pairs[3])
               : "l"(from), "n"(kOffset));
  return v;
}

template <typename T, typename Shape, typename Epilogue>
__global__ __launch_bounds__(Shape::kThreads) void skinny_gemm(const __grid_constant__ GemmParameters<Epilogue> p) {
  constexpr int kM = Shape::kBlocksPerWarp, kN = Shape::kTokens / 8, kStep = 32 * Shape::kKGroups;
  constexpr int kUnroll = kM * 2 + kN > 8 ? 2 : 4;
  extern __shared__ __align__(128) unsigned char shared[];
  float* const partial = reinterpret_cast<float*>(shared);  // [K groups][tokens][kStride]
  // Where columns stay what they are, the sum over the K groups takes the first one's place.
  float* const out = partial + (Epilogue::kPaired ? Shape::kKGroups * Shape::kTokens * Shape::kStride : 0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int k_group = warp / Shape::kRowGroups, first_row = warp % Shape::kRowGroups * kM * 16;
  const int k0 = k_group * 32 + lane % 4 * 8;
  // Where there is no such row or token it may be any: its sums go nowhere.
  const T *weight[kM][2], *x[kN];
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = p.epilogue.weight_row(blockIdx.x, Shape::kColumns, first_row + 16 * i + 8 * half + lane / 4);
      weight[i][half] = static_cast<const T*>(p.weight) + max(row, int64_t{0}) * p.weight_stride + k0;
    }
#pragma unroll
  for (int j = 0; j < kN; ++j)
    x[j] = static_cast<const T*>(p.x) + int64_t{min(8 * j + lane / 4, p.tokens - 1)} * p.x_stride + k0;

  float acc[kM][kN][4] = {};
  const auto multiply = [&](const Vector(&w)[kM][2], const Vector(&v)[kN]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        const uint32_t a[4] = {w[i][0].pairs[2 * half], w[i][1].pairs[2 * half], w[i][0].pairs[2 * half + 1],
                               w[i][1].pairs[2 * half + 1]};
#pragma unroll
        for (int j = 0; j < kN; ++j) multiply_add<T>(acc[i][j], a, v[j].pairs[2 * half], v[j].pairs[2 * half + 1]);
      }
  };
  // A group of steps, whose reads are all on their way before the first is multiplied; lanes beyond K have
  // zeros.
  int left = p.k - k0;  // of this lane's columns
  const auto advance = [&]<bool kWhole>(std::bool_constant<kWhole>) {
    Vector w[kUnroll][kM][2], v[kUnroll][kN];
    unrolled<kUnroll>([&](auto n) {
      const bool inside = kWhole || left > n * kStep;
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          w[n][i][half] = {};
          if (inside) w[n][i][half] = load_streaming<n * kStep * 2>(weight[i][half]);
        }
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        v[n][j] = {};
        if (inside) v[n][j] = *reinterpret_cast<const Vector*>(x[j] + n * kStep);
      }
    });
#pragma unroll
    for (int n = 0; n < kUnroll; ++n) multiply(w[n], v[n]);
#pragma unroll
    for (int i = 0; i < kM; ++i) weight[i][0] += kUnroll * kStep, weight[i][1] += kUnroll * kStep;
#pragma unroll
    for (int j = 0; j < kN; ++j) x[j] += kUnroll * kStep;
    left -= kUnroll * kStep;
  };
  // The same number of groups in every lane of a warp: by the K left to its first.
  int warp_left = p.k - k_group * 32;
  for (; warp_left > (kUnroll - 1) * kStep + 24; warp_left -= kUnroll * kStep) advance(std::true_type{});
  for (; warp_left > 0; warp_left -= kUnroll * kStep) advance(std::false_type{});

  // Rows of the weight become columns of the sums.
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = 8 * j + lane % 4 * 2 + e % 2, column = first_row + 16 * i + e / 2 * 8 + lane / 4;
        partial[(k_group * Shape::kTokens + token) * Shape::kStride + column] = acc[i][j][e];
      }
  __syncthreads();
  constexpr int kOut = Shape::template kOutColumns<Epilogue>;
  for (int i = threadIdx.x; i < Shape::kTokens * kOut; i += Shape::kThreads) {
    const int token = i / kOut, c = i % kOut;
    const auto total = [&](int column) {
      float sum = 0;
#pragma unroll
      for (int g = 0; g < Shape::kKGroups; ++g) sum += partial[(g * Shape::kTokens + token) * Shape::kStride + column];
      return sum;
    };
    float value;
    if constexpr (Epilogue::kPaired)
      value = p.epilogue.combine(total(c / 8 * 16 + c % 8), total(c / 8 * 16 + c % 8 + 8));
    else
      value = total(c);
    out[token * (kOut + kSumsPadding) + c] = value;
  }
  __syncthreads();
  p.epilogue.template finish<T, Shape::kTokens, kOut, Shape::kThreads>(out, 0, p.tokens, blockIdx.x);
}

}  // namespace pop::cuda
