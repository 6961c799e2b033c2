#pragma once

// sums [tokens, rows of the weight] = x weight^T on the tensor cores, a tile at a time, each tile handed to an
// epilogue in float32.
//
// Both operands lie with K contiguous, as mma.m16n8k16 wants them. A ring of `stages` tiles 32 deep is filled
// by cp.async; ldmatrix reads it, one step of 16 ahead of the multiplications. What an epilogue is:
//
//   kPaired                      pairs of columns of the tile become one: columns 16 i + j and 16 i + 8 + j, j < 8,
//   combine(first, second)       whose sums one thread holds
//   weight_row(tile, width, r)   which row of the weight row r of a tile's `width` is; -1 for none
//   finish<T, ..., kThreads>     takes finished rows of sums from shared memory to where they belong, by so many
//     (sums, ...)                neighbouring threads, of which thread i has threadIdx.x % kThreads == i

#include <cute/arch/copy_sm80.hpp>
#include <cute/swizzle_layout.hpp>

#include "cuda/device.h"
#include "cuda/numbers.h"
#include "cuda/shared.h"

namespace pop::cuda {

template <typename Epilogue>
struct GemmParameters {
  int tokens, k;  // k: a multiple of 8
  const void* x;  // [tokens, k]
  int64_t x_stride;
  const void* weight;  // [rows, k]
  int64_t rows, weight_stride;
  Epilogue epilogue;
  int column_tiles = 0;
  int stages = 0, split_k = 0;  // blockIdx.y takes [y * split_k, (y + 1) * split_k) of K
};

inline constexpr int kTileK = 32;
// float32 between rows of finished sums: rows of a store, a quarter warp each, then fall into different banks.
inline constexpr int kSumsPadding = 8;

/// kRows tokens by kColumns rows of the weight, of which each warp has a part.
template <int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kThreads = 32 * (kRows / kWarpRows) * (kColumns / kWarpColumns);
  static constexpr int kBlocks = kWarpRows * kWarpColumns > 2048 ? 2 : 3;  // on a multiprocessor, as registers allow

  template <typename Epilogue>
  static constexpr int kOutColumns = Epilogue::kPaired ? kColumns / 2 : kColumns;
  template <typename Epilogue>
  static constexpr int shared_bytes(int stages) {
    const int ring = stages * (kRows + kColumns) * kTileK * 2;
    const int sums = kWarpRows * (kOutColumns<Epilogue> + kSumsPadding) * 4;
    return std::max(ring, sums);
  }
};

// An operand's tile in shared memory: rows of 64 bytes, whose four 16-byte chunks are permuted so that the eight rows
// that ldmatrix reads at once, or cp.async writes, lie in different banks.
using OperandAtom = decltype(cute::composition(
    cute::Swizzle<2, 3, 3>{},
    cute::Layout<cute::Shape<cute::_8, cute::Int<kTileK>>, cute::Stride<cute::Int<kTileK>, cute::_1>>{}));

/// Where (row, k) of an operand's tile is, in bytes.
__device__ inline int operand_offset(int row, int k) {
  return 2 * (row / 8 * (8 * kTileK) + OperandAtom{}(row % 8, k));
}

/// One thread's part of filling an operand's tile: chunk threadIdx.x % 4 of the rows threadIdx.x / 4 + i kThreads / 4.
template <typename T, int kRows, int kThreads>
struct OperandLoader {
  static constexpr int kCount = kRows * (kTileK / 8) / kThreads, kRowStep = kThreads / (kTileK / 8);
  static_assert(kCount >= 1 && kRowStep % 8 == 0);

  const T* next[kCount];
  uint32_t to;

  /// row(r) is the operand's row for row r of the tile. Where there is none it may be any: its sums go nowhere.
  template <typename Row>
  __device__ OperandLoader(uint32_t ring, const void* data, int64_t stride, int begin, Row&& row) {
    const int first = threadIdx.x / (kTileK / 8), k = threadIdx.x % (kTileK / 8) * 8;
    to = held(ring + operand_offset(first, k));
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      next[i] = static_cast<const T*>(data) + row(first + i * kRowStep) * stride + begin + k;
  }

  /// Starts copies of the next 32 columns; `bytes` is 16, or 0 beyond the end of K.
  __device__ void fetch(uint32_t stage_offset, int bytes) {
    unrolled<kCount>([&](auto i) {
      copy_async<i * kRowStep * kTileK * 2>(to + stage_offset, next[i], bytes);
      next[i] += kTileK;
    });
  }
};

__device__ inline void wait_for_copies(int stages) {
  if (stages == 4)
    cute::cp_async_wait<2>();
  else
    cute::cp_async_wait<1>();
}

template <typename T, typename Tile, typename Epilogue>
__global__ __launch_bounds__(Tile::kThreads,
                             Tile::kBlocks) void tile_gemm(const __grid_constant__ GemmParameters<Epilogue> p) {
  constexpr int kM = Tile::kWarpRows / 16, kN = Tile::kWarpColumns / 16;  // of 16 each
  constexpr int kWarpsAcross = Tile::kColumns / Tile::kWarpColumns;
  extern __shared__ __align__(128) unsigned char shared[];

  // Tiles that run at the same time share rows of both operands in L2: columns advance after 16 tiles of tokens.
  const int token_tiles = ceil_div(p.tokens, Tile::kRows), group = 16 * p.column_tiles;
  const int first_tile = blockIdx.x / group * 16, height = min(16, token_tiles - first_tile);
  const int token0 = (first_tile + static_cast<int>(blockIdx.x) % group % height) * Tile::kRows;
  const int column_tile = static_cast<int>(blockIdx.x) % group / height;

  // The ring: stages of a tile of x and one of the weight.
  constexpr int kXBytes = Tile::kRows * kTileK * 2, kStageBytes = kXBytes + Tile::kColumns * kTileK * 2;
  const uint32_t x_ring = shared_address(shared), weight_ring = x_ring + kXBytes;
  const uint32_t ring_bytes = p.stages * kStageBytes;
  const int begin = static_cast<int>(blockIdx.y) * p.split_k, end = min(p.k, begin + p.split_k);
  OperandLoader<T, Tile::kRows, Tile::kThreads> x(x_ring, p.x, p.x_stride, begin,
                                                  [&](int r) { return int64_t{min(token0 + r, p.tokens - 1)}; });
  OperandLoader<T, Tile::kColumns, Tile::kThreads> weight(weight_ring, p.weight, p.weight_stride, begin, [&](int r) {
    return max(p.epilogue.weight_row(column_tile, Tile::kColumns, r), int64_t{0});
  });
  const int steps = ceil_div(end - begin, kTileK);
  int left = end - begin - static_cast<int>(threadIdx.x) % (kTileK / 8) * 8;  // of this thread's columns
  const auto fetch = [&](uint32_t at) {
    const int bytes = left > 0 ? 16 : 0;
    x.fetch(at, bytes);
    weight.fetch(at, bytes);
    left -= kTileK;
  };
  for (int stage = 0; stage < p.stages - 1; ++stage) {
    if (stage < steps) fetch(stage * kStageBytes);
    cute::cp_async_fence();
  }

  // What this lane points ldmatrix at. A: 16 tokens by 16 deep, its four matrices being tokens 0-7, 8-15 of k 0-7, then
  // of k 8-15; B: 16 rows of the weight, k 0-7 and 8-15 of rows 0-7, then of rows 8-15.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / kWarpsAcross * Tile::kWarpRows, warp_column = warp % kWarpsAcross * Tile::kWarpColumns;
  uint32_t a_address[2], b_address[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    a_address[half] = held(x_ring + operand_offset(warp_row + lane % 16, 16 * half + lane / 16 * 8));
    b_address[half] =
        held(weight_ring + operand_offset(warp_column + lane % 8 + lane / 16 * 8, 16 * half + lane / 8 % 2 * 8));
  }
  uint32_t a[2][kM][4], b[2][kN][4];
  float acc[kM][2 * kN][4] = {};
  const auto load = [&](int half, uint32_t at) {
    unrolled<kM>([&](auto i) { load_matrices<i * 16 * kTileK * 2>(a[half][i], a_address[half] + at); });
    unrolled<kN>([&](auto j) { load_matrices<j * 16 * kTileK * 2>(b[half][j], b_address[half] + at); });
  };
  const auto multiply = [&](int half) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kN; ++j)
        multiply_add<T>(acc[i][j], a[half][i], b[half][j / 2][j % 2 * 2], b[half][j / 2][j % 2 * 2 + 1]);
  };

  uint32_t read = 0, write = ring_bytes - kStageBytes;
  wait_for_copies(p.stages);
  __syncthreads();
  load(0, 0);
  for (int step = 0; step < steps; ++step) {
    load(1, read);
    if (step + p.stages - 1 < steps) fetch(write);  // into the stage whose last reader passed the barrier below
    cute::cp_async_fence();
    write = read;
    multiply(0);
    read = read + kStageBytes == ring_bytes ? 0 : read + kStageBytes;
    wait_for_copies(p.stages);
    __syncthreads();
    if (step + 1 < steps) load(0, read);
    multiply(1);
  }

  // The ring is free: rows of finished sums go through it, those of one row of warps at a time.
  cute::cp_async_wait<0>();
  constexpr int kOut = Tile::template kOutColumns<Epilogue>, kStride = kOut + kSumsPadding;
  float* const out = reinterpret_cast<float*>(shared);
  for (int rows0 = 0; rows0 < Tile::kRows; rows0 += Tile::kWarpRows) {
    __syncthreads();
    if (warp_row == rows0) {
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float* const to = out + (16 * i + 8 * row + lane / 4) * kStride + lane % 4 * 2;
          if constexpr (Epilogue::kPaired) {
#pragma unroll
            for (int j = 0; j < kN; ++j)
              *reinterpret_cast<float2*>(to + warp_column / 2 + 8 * j) = {
                  p.epilogue.combine(acc[i][2 * j][2 * row], acc[i][2 * j + 1][2 * row]),
                  p.epilogue.combine(acc[i][2 * j][2 * row + 1], acc[i][2 * j + 1][2 * row + 1])};
          } else {
#pragma unroll
            for (int j = 0; j < 2 * kN; ++j)
              *reinterpret_cast<float2*>(to + warp_column + 8 * j) = {acc[i][j][2 * row], acc[i][j][2 * row + 1]};
          }
        }
    }
    __syncthreads();
    p.epilogue.template finish<T, Tile::kWarpRows, kOut, Tile::kThreads>(out, token0 + rows0, p.tokens, column_tile);
  }
}

}  // namespace pop::cuda
