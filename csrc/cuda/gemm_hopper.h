#pragma once

// The same sums as gemm.h's, for sm_90a, handed to the same epilogues.
//
// A block takes tile after tile. Of its three warpgroups, one thread brings both operands by TMA through a ring of
// stages 64 deep, the next tile's while this one's sums go out; the other two have 64 tokens each and multiply
// what has landed, straight from shared memory. Each of their warps takes its own rows to the epilogue. TMA does not
// ask weight_row: rows of the weight come as they lie or, where they are paired, row r with row r + rows / 2.

#include <algorithm>

#include "cuda/gemm.h"
#include "cuda/gemm_wgmma.h"
#include "cuda/hopper.h"

namespace pop::cuda {

template <typename Epilogue>
struct HopperGemmParameters {
  static constexpr bool kSm90a = true;  // for launch
  CUtensorMap x, weight;
  int tokens, k;
  int column_tiles, tiles;
  Epilogue epilogue;
};

/// 128 tokens by kColumns rows of the weight.
template <int kColumns_>
struct HopperTile {
  static constexpr int kRows = 128, kColumns = kColumns_, kTileK = 64;
  static constexpr int kGroups = 2, kGroupThreads = 128, kGroupRows = 64;  // warpgroups that multiply
  static constexpr int kWarps = 4 * kGroups, kThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kXBytes = kRows * kTileK * 2, kStageBytes = kXBytes + kColumns * kTileK * 2;
  static constexpr int kSumRows = 8;  // of a warp, which go out together

  // Registers of a thread: 504 for one of each warpgroup.
  static constexpr int kCopyRegisters = 24, kRegisters = 240;

  template <typename Epilogue>
  static constexpr int kOutColumns = Epilogue::kPaired ? kColumns / 2 : kColumns;
  /// Shared memory holds the ring, sums of each warp, and two barriers for each stage.
  template <typename Epilogue>
  static constexpr int kSumsBytes = kWarps * kSumRows * (kOutColumns<Epilogue> + kSumsPadding) * 4;
  template <typename Epilogue>
  static constexpr int kStages = (227 * 1024 - kSumsBytes<Epilogue>) / (kStageBytes + 16);
  template <typename Epilogue>
  static constexpr int kSharedBytes = kStages<Epilogue> * (kStageBytes + 16) + kSumsBytes<Epilogue>;
};

/// The ring's stages as both sides walk through them. Phases of `full` end when a stage's bytes have landed, those of
/// `empty` when both warpgroups have read it.
template <typename Tile, int kStages>
struct OperandRing {
  uint32_t data, barriers;
  int stage = 0;
  uint32_t parity = 0;

  __device__ OperandRing(uint32_t data, uint32_t barriers) : data(data), barriers(barriers) {}
  __device__ uint32_t full(int s) const { return barriers + 8 * s; }
  __device__ uint32_t empty(int s) const { return barriers + 8 * (kStages + s); }
  __device__ uint32_t x(int s) const { return data + s * Tile::kStageBytes; }
  __device__ uint32_t weight(int s) const { return x(s) + Tile::kXBytes; }

  __device__ void initialize() const {
    for (int s = 0; s < kStages; ++s) initialize_barrier(full(s), 1), initialize_barrier(empty(s), Tile::kGroups);
    fence_barriers();
  }
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <typename T, typename Tile, typename Epilogue>
__global__ __launch_bounds__(Tile::kThreads,
                             1) void hopper_gemm(const __grid_constant__ HopperGemmParameters<Epilogue> p) {
#if POP_SM90A
  constexpr int kStages = Tile::template kStages<Epilogue>;
  extern __shared__ __align__(1024) unsigned char ring_and_sums[];
  float* const sums = reinterpret_cast<float*>(ring_and_sums + kStages * Tile::kStageBytes);
  const uint32_t data = shared_address(ring_and_sums);
  OperandRing<Tile, kStages> ring(data, data + kStages * Tile::kStageBytes + Tile::template kSumsBytes<Epilogue>);
  if (threadIdx.x == 0) ring.initialize();
  __syncthreads();

  // Tiles that run at the same time share rows of both operands in L2: columns advance after 16 tiles of tokens.
  const int token_tiles = ceil_div(p.tokens, Tile::kRows), steps = ceil_div(p.k, Tile::kTileK);
  const auto for_each_tile = [&](auto&& f) {
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      const int group = 16 * p.column_tiles, first = tile / group * 16, height = min(16, token_tiles - first);
      f((first + tile % group % height) * Tile::kRows, tile % group / height);
    }
  };

  const int group = __shfl_sync(0xffffffffu, threadIdx.x / Tile::kGroupThreads, 0);
  if (group == Tile::kGroups) {
    release_registers<Tile::kCopyRegisters>();
    if (threadIdx.x % Tile::kGroupThreads) return;
    for_each_tile([&](int token0, int column_tile) {
      for (int step = 0; step < steps; ++step, ring.advance()) {
        const uint32_t full = ring.full(ring.stage);
        wait_barrier(ring.empty(ring.stage), ring.parity ^ 1);
        expect_bytes(full, Tile::kStageBytes);
        load_box(p.x, full, ring.x(ring.stage), step * Tile::kTileK, token0, 0, 0);
        if constexpr (Epilogue::kPaired)
          load_box(p.weight, full, ring.weight(ring.stage), step * Tile::kTileK, 0, 0,
                   column_tile * (Tile::kColumns / 16));
        else
          load_box(p.weight, full, ring.weight(ring.stage), step * Tile::kTileK, column_tile * Tile::kColumns, 0, 0);
      }
    });
    return;
  }

  claim_registers<Tile::kRegisters>();
  constexpr int kOut = Tile::template kOutColumns<Epilogue>, kStride = kOut + kSumsPadding;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const out = sums + warp * Tile::kSumRows * kStride;
  for_each_tile([&](int token0, int column_tile) {
    float acc[Tile::kColumns / 8][4];
    int before = -1;  // the stage that the last multiplications read
    const auto release = [&] {
      if (before >= 0 && threadIdx.x % Tile::kGroupThreads == 0) arrive_barrier(ring.empty(before));
    };
    for (int step = 0; step < steps; ++step, ring.advance()) {
      wait_barrier(ring.full(ring.stage), ring.parity);
      const uint64_t a = matrix_descriptor(ring.x(ring.stage) + group * Tile::kGroupRows * Tile::kTileK * 2);
      const uint64_t b = matrix_descriptor(ring.weight(ring.stage));
      wgmma_fence(acc);
#pragma unroll
      for (int i = 0; i < Tile::kTileK / 16; ++i) wgmma<T>(acc, a + 2 * i, b + 2 * i, step + i > 0);  // 32 bytes on
      wgmma_commit();
      wgmma_wait<1>(acc);
      release();
      before = ring.stage;
    }
    wgmma_wait<0>(acc);
    release();

    // The warp's sums, 8 of its 16 rows at a time.
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float* const to = out + lane / 4 * kStride + lane % 4 * 2;
      if constexpr (Epilogue::kPaired) {
#pragma unroll
        for (int j = 0; j < Tile::kColumns / 16; ++j)
          *reinterpret_cast<float2*>(to + 8 * j) = {
              p.epilogue.combine(acc[2 * j][2 * row], acc[2 * j + 1][2 * row]),
              p.epilogue.combine(acc[2 * j][2 * row + 1], acc[2 * j + 1][2 * row + 1])};
      } else {
#pragma unroll
        for (int j = 0; j < Tile::kColumns / 8; ++j)
          *reinterpret_cast<float2*>(to + 8 * j) = {acc[j][2 * row], acc[j][2 * row + 1]};
      }
      __syncwarp();
      p.epilogue.template finish<T, Tile::kSumRows, kOut, 32>(out, token0 + 16 * warp + 8 * row, p.tokens, column_tile);
      __syncwarp();
    }
  });
#endif
}

/// Whether TMA takes an operand: [rows, k], k and the stride multiples of 8.
inline bool boxes_take(const void* data, int64_t rows, int64_t k, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows > 0 && rows < int64_t{1} << 31 && k > 0 &&
         stride % 8 == 0 && stride >= k && stride * rows < int64_t{1} << 39;
}

template <typename T, typename Tile, typename Epilogue>
void launch_hopper_tiles(const char* operation, const GemmParameters<Epilogue>& p, int multiprocessors, Stream stream) {
  constexpr DType kType = std::is_same_v<T, bf16> ? DType::kBFloat16 : DType::kFloat16;
  const auto k = static_cast<cuuint64_t>(p.k), rows = static_cast<cuuint64_t>(p.rows);
  const auto stride = static_cast<cuuint64_t>(p.weight_stride);
  const TensorBoxes x{.data = p.x,
                      .sizes = {k, static_cast<cuuint64_t>(p.tokens), 1, 1},
                      .strides = {static_cast<cuuint64_t>(p.x_stride)},
                      .box = {Tile::kTileK, Tile::kRows, 1, 1}};
  TensorBoxes weight{
      .data = p.weight, .sizes = {k, rows, 1, 1}, .strides = {stride}, .box = {Tile::kTileK, Tile::kColumns, 1, 1}};
  if constexpr (Epilogue::kPaired)  // eight rows of the first half, their eight of the second, the next eight
    weight = {.data = p.weight,
              .sizes = {k, 8, 2, rows / 16},
              .strides = {stride, rows / 2 * stride, 8 * stride},
              .box = {Tile::kTileK, 8, 2, Tile::kColumns / 16}};
  HopperGemmParameters<Epilogue> h{.x = tensor_map(operation, kType, x),
                                   .weight = tensor_map(operation, kType, weight),
                                   .tokens = p.tokens,
                                   .k = p.k,
                                   .column_tiles = static_cast<int>(ceil_div(p.rows, Tile::kColumns)),
                                   .tiles = 0,
                                   .epilogue = p.epilogue};
  h.tiles = ceil_div(p.tokens, Tile::kRows) * h.column_tiles;
  launch<&hopper_gemm<T, Tile, Epilogue>>(operation, dim3(std::min(h.tiles, multiprocessors)), Tile::kThreads,
                                          Tile::template kSharedBytes<Epilogue>, stream, h);
}

}  // namespace pop::cuda
