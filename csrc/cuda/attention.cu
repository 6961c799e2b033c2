// Flash attention over the paged cache: a block takes some rows (query heads of query tokens) of one key/value head,
// keys and values pass by in tiles, and the softmax is rescaled as larger scores turn up.
//
// Rows of all query heads that share a key/value head are packed, token by token, so that each key is read once for all
// of them. One kernel serves two shapes of block. Prefill: 128 rows, each warp has some of them and all keys of a tile;
// for prefill. Decode: 16 rows, each warp has all of them and a quarter of a tile's keys; for decode and the boundary.
// Where blocks are fewer than the device holds, they share the context out, and a second kernel adds up their parts in
// a fixed order.

#include <cutlass/fast_math.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/swizzle_layout.hpp>

#include "cuda/device.h"
#include "cuda/numbers.h"
#include "cuda/shared.h"
#include "pop/attention.h"

namespace pop::cuda {
namespace {

constexpr char kOperation[] = "attention";
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kInfinity = INFINITY;

struct Cache {
  const void* data;
  int64_t block_stride, token_stride, head_stride;
};

struct Parameters {
  const void* query;
  int64_t query_token_stride, query_head_stride;
  Cache keys, values;
  const int32_t* block_tables;
  int64_t block_table_stride;
  const int32_t *cu_seqlens_q, *seqlens_k, *spans;
  int64_t span_stride;
  cutlass::FastDivmod group, block_size;  // query heads of a key/value head; tokens of a block of the cache
  int sequences, query_heads, window_size, splits;
  float softmax_scale;  // of scores, times log2(e): exponentials are powers of two
  int64_t rows;         // tokens * query_heads
  float* split_values;  // [splits, rows, head_size]: each split's sum of weight * value,
  float2* split_stats;  // [splits, rows]: its largest score, before scaling, and sum of weights
  void* out;            // [rows, head_size]
};

/// kRows rows of a head in shared memory: columns of 64 elements (32 for that head size) one behind the other, in which
/// 16-byte chunks are permuted so that the eight rows ldmatrix reads at once lie in different banks.
template <int kRows, int kHeadSize>
struct Tile {
  static constexpr int kWidth = kHeadSize < 64 ? kHeadSize : 64, kBytes = kRows * kHeadSize * 2;
  using Atom = decltype(cute::composition(
      cute::Swizzle<(kWidth == 64 ? 3 : 2), 3, 3>{},
      cute::Layout<cute::Shape<cute::_8, cute::Int<kWidth>>, cute::Stride<cute::Int<kWidth>, cute::_1>>{}));
  using Layout = decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kRows>, cute::Int<kHeadSize>>{}));

  /// Where (row, element) is, in bytes.
  __device__ static int offset(int row, int element) { return Layout{}(row, element) * 2; }

  /// From the offset of (row, element), element < 16: that of (row + rows, element + elements), for multiples of 8
  /// rows and 16 elements.
  __device__ static int step(int offset, int rows, int elements) {
    return (offset ^ (elements % kWidth * 2)) + (elements / kWidth * kRows + rows) * kWidth * 2;
  }
  /// From the offset of (row, element): that of (row + rows, element), where row and rows have no bit in common.
  __device__ static int step(int offset, int rows) { return (offset ^ (rows % 8 * 16)) + rows * kWidth * 2; }
};

template <typename T_, int kHeadSize_, bool kDecode_>
struct Config {
  using T = T_;
  static constexpr bool kDecode = kDecode_;
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kRowWarps = kDecode ? 1 : kHeadSize == 256 ? 8 : 4, kKeyWarps = kDecode ? 4 : 1;
  static constexpr int kWarps = kRowWarps * kKeyWarps, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kDecode || kHeadSize == 256 ? 1 : 2;  // of 16 rows, of a warp
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarpRows * kRowWarps;
  static constexpr int kKeys = !kDecode && kHeadSize == 256 ? 32 : 64, kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kStages = kHeadSize == 256 ? 2 : kHeadSize == 128 && !kDecode ? 3 : 4;
  static constexpr bool kQueryInRegisters = kDecode || kHeadSize <= 64;

  using QueryTile = Tile<kRows, kHeadSize>;
  using KeyTile = Tile<kKeys, kHeadSize>;
  static constexpr int kSharedBytes = QueryTile::kBytes + kStages * KeyTile::kBytes;

  // How a warp copies rows: a lane 16 bytes, so many rows at a time.
  static constexpr int kChunks = kHeadSize / 8, kPassRows = 32 / kChunks;
  static constexpr int kCopyRows = kKeys / kWarps;  // of a tile of keys, of a warp

  // Decode: what warps have to add up in the end goes where the tiles were. Padding keeps rows in different banks.
  static constexpr int kSumStride = kHeadSize + 8;
  static_assert(!kDecode || kKeyWarps * kRows * (kSumStride + 2) * 4 <= kSharedBytes);
  static_assert(kSharedBytes <= 99 * 1024);
};

__device__ inline void load_matrices(uint32_t (&to)[4], const unsigned char* from) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(from), to[0], to[1], to[2], to[3]);
}

__device__ inline void load_transposed(uint32_t (&to)[4], const unsigned char* from) {
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(from), to[0], to[1], to[2], to[3]);
}

/// Starts a copy of 16 bytes; zeros instead, and nothing is read, where they are not `wanted`.
__device__ inline void copy_async(unsigned char* to, const void* from, bool wanted) {
  cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t>::copy(*reinterpret_cast<const cute::uint128_t*>(from),
                                                               *reinterpret_cast<cute::uint128_t*>(to), wanted);
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The weight of a score, given how far below the largest it is. float16 has no exponents below -24: there the largest
/// weight is 2^15, not 1, lest small ones be lost.
template <typename T>
__device__ inline float weight_of(float below_largest) {
  return exp2_approx(std::is_same_v<T, fp16> ? below_largest + 15 : below_largest);
}

/// A block's rows [first, end) of a sequence, whose row r is head r % group of query token r / group.
struct Rows {
  int sequence, start, context, first, end;  // start: the sequence's first token of all
  int offset;                                // from the index of a query token to its position in the context

  __device__ int position(const Parameters& p, int row) const { return offset + p.group.div(row); }
};

/// False where the block has none.
template <typename C>
__device__ inline bool find_rows(const Parameters& p, Rows& r) {
  const int group = p.group.divisor;
  r.sequence = blockIdx.x, r.first = 0;
  if constexpr (!C::kDecode) {
    // Sequence s has the blocks from floor(rows before it / kRows) + s on: enough, as each sequence leaves at most one
    // block unfilled. The last blocks come first, as they see the most keys.
    const int block = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    const auto first_block = [&](int s) { return static_cast<int>(int64_t{p.cu_seqlens_q[s]} * group / C::kRows) + s; };
    r.sequence = 0;
    for (int end = p.sequences; end - r.sequence > 1;) {
      const int middle = (r.sequence + end) / 2;
      (first_block(middle) <= block ? r.sequence : end) = middle;
    }
    r.first = (block - first_block(r.sequence)) * C::kRows;
  }
  r.start = p.cu_seqlens_q[r.sequence];
  const int queries = p.cu_seqlens_q[r.sequence + 1] - r.start;
  r.context = p.seqlens_k[r.sequence];
  r.offset = r.context - queries;
  r.end = min(queries * group, r.first + C::kRows);
  return r.first < r.end;
}

/// One past the last key that the queries at positions [first, last] see, or a little more: the last key beyond them
/// with a span id between the least and the greatest of theirs. `scratch`: shared memory that nobody else uses.
template <int kThreads>
__device__ inline int end_of_spans(const int32_t* spans, int first, int last, int context, int* scratch) {
  int &low = scratch[0], &high = scratch[1], &end = scratch[2];
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) low = INT_MAX, high = -1, end = last + 1;
  __syncthreads();
  for (int i = first + thread; i <= last; i += kThreads)
    if (const int id = spans[i]; id >= 0) atomicMin(&low, id), atomicMax(&high, id);
  __syncthreads();
  if (const int least = low, greatest = high; greatest >= 0) {
    int mine = 0;
    for (int j = last + 1 + thread; j < context; j += kThreads)
      if (const int id = spans[j]; id >= least && id <= greatest) mine = j + 1;
    if (mine > 0) atomicMax(&end, mine);
  }
  __syncthreads();
  const int result = end;
  __syncthreads();
  return result;
}

template <typename C>
__global__ __launch_bounds__(C::kThreads) void attention_kernel(const __grid_constant__ Parameters p) {
  using T = typename C::T;
  using QueryTile = typename C::QueryTile;
  using KeyTile = typename C::KeyTile;
  constexpr int kHeadSize = C::kHeadSize, kRowTiles = C::kRowTiles;
  constexpr int kKeyTiles = C::kWarpKeys / 8, kValueTiles = kHeadSize / 8;  // of 8 columns, of scores and of values
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr int kRing = QueryTile::kBytes;  // queries, then the ring of tiles

  Rows rows;
  if (!find_rows<C>(p, rows)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int kv_head = blockIdx.y, group = p.group.divisor;
  const int32_t* const spans = p.spans ? p.spans + rows.sequence * p.span_stride : nullptr;

  // Keys [begin, end) are all that any row sees; of their tiles, this split has [first_tile, last_tile).
  const int first_position = rows.position(p, rows.first), last_position = rows.position(p, rows.end - 1);
  const int begin = max(0, first_position - p.window_size + 1);
  const int end = spans ? end_of_spans<C::kThreads>(spans, first_position, last_position, rows.context,
                                                    reinterpret_cast<int*>(shared))
                        : last_position + 1;
  const int tiles_begin = begin / C::kKeys, tiles = (end + C::kKeys - 1) / C::kKeys - tiles_begin;
  const int split_tiles = (tiles + p.splits - 1) / p.splits;
  const int first_tile = tiles_begin + static_cast<int>(blockIdx.z) * split_tiles;
  const int last_tile = min(first_tile + split_tiles, tiles_begin + tiles);

  // Copies: a lane has the 16 bytes from element `chunk` on of rows chunk_row + i * kPassRows of a warp's.
  const int chunk = lane % C::kChunks * 8, chunk_row = lane / C::kChunks;
  const int copy_row = warp * C::kCopyRows + chunk_row, copy_offset = held(KeyTile::offset(copy_row, chunk));
  const int32_t* const table = p.block_tables + rows.sequence * p.block_table_stride;
  const bool one_block = p.block_size.divisor % C::kCopyRows == 0;  // has all rows that a warp copies of a tile
  const auto head_of = [&](const Cache& cache) {
    return static_cast<const T*>(cache.data) + kv_head * cache.head_stride + chunk;
  };
  const T *const keys_head = head_of(p.keys), *const values_head = head_of(p.values);
  const auto load_tile = [&](const Cache& cache, const T* head, int tile, unsigned char* to) {
    const auto locate = [&](int key) {
      const int known = min(max(key, begin), end - 1);  // beyond, the table may name no block
      int block, token;
      p.block_size(block, token, known);
      return head + table[block] * cache.block_stride + (token + key - known) * cache.token_stride;
    };
    const int key = tile * C::kKeys + copy_row;
    constexpr int kPasses = C::kCopyRows / C::kPassRows;
    if (one_block) {
      const T* from = locate(key);
#pragma unroll
      for (int i = 0; i < kPasses; ++i, from += C::kPassRows * cache.token_stride)
        copy_async(to + KeyTile::step(copy_offset, i * C::kPassRows), from,
                   static_cast<unsigned>(key - begin + i * C::kPassRows) < static_cast<unsigned>(end - begin));
    } else {
#pragma unroll 1
      for (int i = 0; i < kPasses * C::kPassRows; i += C::kPassRows)
        copy_async(to + KeyTile::step(copy_offset, i), locate(key + i), key + i >= begin && key + i < end);
    }
  };

  // Tiles pass through the ring in the order in which they are used, 2 i being tile i's keys and 2 i + 1 its values.
  const auto fetch = [&](int step, int at) {
    if (step < 2 * last_tile) {
      if (step % 2)
        load_tile(p.values, values_head, step / 2, shared + at);
      else
        load_tile(p.keys, keys_head, step / 2, shared + at);
    }
    cute::cp_async_fence();
  };
  int at = C::kSharedBytes - KeyTile::kBytes;
  // Waits for a tile; the one before it has been read by all then, and its stage is filled again.
  const auto next_tile = [&](int step) {
    cute::cp_async_wait<C::kStages - 2>();
    __syncthreads();
    fetch(step + C::kStages - 1, at);
    at = at + KeyTile::kBytes == C::kSharedBytes ? kRing : at + KeyTile::kBytes;
    return shared + at;
  };

  for (int pass = warp; pass < C::kRows / C::kPassRows; pass += C::kWarps) {
    const int row = pass * C::kPassRows + chunk_row;
    int token, head;
    p.group(token, head, min(rows.first + row, rows.end - 1));
    copy_async(shared + QueryTile::offset(row, chunk),
               static_cast<const T*>(p.query) + (rows.start + token) * p.query_token_stride +
                   (int64_t{kv_head} * group + head) * p.query_head_stride + chunk,
               rows.first + row < rows.end);
  }
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) fetch(2 * first_tile + i, kRing + i * KeyTile::kBytes);

  // The warp's rows, and what this lane points ldmatrix at. A (queries): 16 rows by 16 elements, its four matrices
  // being rows 0-7, 8-15 of elements 0-7, then of elements 8-15; B (keys): elements 0-7 and 8-15 of keys 0-7, then of
  // keys 8-15; B (values, transposed): keys 0-7 and 8-15 of elements 0-7, then of elements 8-15.
  const int warp_row = rows.first + warp % C::kRowWarps * C::kWarpRows, warp_key = warp / C::kRowWarps * C::kWarpKeys;
  const int query_offset = held(QueryTile::offset(warp % C::kRowWarps * C::kWarpRows + lane % 16, lane / 16 * 8));
  const int key_offset = held(KeyTile::offset(warp_key + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
  const int value_offset = held(KeyTile::offset(warp_key + lane % 16, lane / 16 * 8));

  // Positions of the warp's first and last row.
  const int warp_first = rows.position(p, min(warp_row, rows.end - 1));
  const int warp_last = rows.position(p, min(warp_row + C::kWarpRows, rows.end) - 1);

  uint32_t query[C::kQueryInRegisters ? kHeadSize / 16 : 1][kRowTiles][4];
  float acc[kRowTiles][kValueTiles][4] = {}, row_sum[kRowTiles][4] = {}, row_max[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) row_max[m][0] = row_max[m][1] = -kInfinity;

  for (int tile = first_tile; tile < last_tile; ++tile) {
    const unsigned char* const key_tile = next_tile(2 * tile);
    if constexpr (C::kQueryInRegisters) {
      if (tile == first_tile) {
#pragma unroll
        for (int k = 0; k < kHeadSize / 16; ++k)
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
            load_matrices(query[k][m], shared + QueryTile::step(query_offset, 16 * m, 16 * k));
      }
    }
    uint32_t probs[kKeyTiles / 2][kRowTiles][4];
    float scores[kRowTiles][kKeyTiles][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadSize / 16; ++k) {
      if constexpr (!C::kQueryInRegisters) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
          load_matrices(query[0][m], shared + QueryTile::step(query_offset, 16 * m, 16 * k));
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles / 2; ++n) {
        uint32_t key[4];
        load_matrices(key, key_tile + KeyTile::step(key_offset, 16 * n, 16 * k));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            multiply_add<T>(scores[m][2 * n + j], query[C::kQueryInRegisters ? k : 0][m], key[2 * j], key[2 * j + 1]);
      }
    }

    const int first_key = tile * C::kKeys + warp_key;
    if (first_key + C::kWarpKeys > warp_first + 1 || first_key <= warp_last - p.window_size) {  // some are not visible
      const int lane_key = first_key + lane % 4 * 2, lane_row = held(warp_row + lane / 4);
      int positions[kRowTiles][2], ids[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          positions[m][half] = rows.position(p, min(lane_row + 16 * m + 8 * half, rows.end - 1));
          ids[m][half] = -2;  // matches nothing
          if (spans)
            if (const int id = spans[positions[m][half]]; id >= 0) ids[m][half] = id;
        }
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = lane_key + 8 * n + j;
          const int id = spans && key < rows.context ? max(spans[key], -1) : -1;
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int distance = positions[m][half] - key;  // below 0: only through the span
              if (static_cast<unsigned>(distance) >= static_cast<unsigned>(p.window_size) &&
                  !(spans && distance < 0 && id == ids[m][half]))
                scores[m][n][2 * half + j] = -kInfinity;
            }
        }
    }

    // Scores become weights, relative to the largest score so far; what was summed up shrinks by its growth. The
    // difference is taken before it is scaled, so that huge scores stay exact at the largest.
    bool grown = false;
    float rescale[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
        const float before = row_max[m][half];
        top = fmaxf(top, before);
        row_max[m][half] = top;
        grown |= top != before;
        const float base = top == -kInfinity ? 0.0f : top;
        rescale[m][half] = exp2_approx((before - base) * p.softmax_scale);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& score = scores[m][n][2 * half + j];
            score = weight_of<T>((score - base) * p.softmax_scale);
          }
      }
#pragma unroll
    for (int k = 0; k < kKeyTiles / 2; ++k)
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          probs[k][m][i] = held(pack<T>(scores[m][2 * k + i / 2][i % 2 * 2], scores[m][2 * k + i / 2][i % 2 * 2 + 1]));
    if (__any_sync(kAllLanes, grown)) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          row_sum[m][i] *= rescale[m][i / 2];
#pragma unroll
          for (int n = 0; n < kValueTiles; ++n) acc[m][n][i] *= rescale[m][i / 2];
        }
    }

    const unsigned char* const value_tile = next_tile(2 * tile + 1);
    constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;
#pragma unroll
    for (int k = 0; k < kKeyTiles / 2; ++k) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        multiply_add<T>(row_sum[m], probs[k][m], kOnes, kOnes);  // of weights as rounded: the result is a mean
#pragma unroll
      for (int n = 0; n < kValueTiles / 2; ++n) {
        uint32_t value[4];
        load_transposed(value, value_tile + KeyTile::step(value_offset, 16 * k, 16 * n));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int j = 0; j < 2; ++j) multiply_add<T>(acc[m][2 * n + j], probs[k][m], value[2 * j], value[2 * j + 1]);
      }
    }
  }
  cute::cp_async_wait<0>();

  // Row r of the sequence among all rows of the output.
  const auto out_row = [&](int row) {
    int token, head;
    p.group(token, head, row);
    return int64_t{rows.start + token} * p.query_heads + kv_head * group + head;
  };
  const int64_t split_row = blockIdx.z * p.rows;

  if constexpr (C::kDecode) {
    // Each warp has a sum over its keys: they are added up through shared memory.
    float* const parts = reinterpret_cast<float*>(shared);
    float2* const stats = reinterpret_cast<float2*>(parts + C::kKeyWarps * C::kRows * C::kSumStride);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * C::kRows + 8 * half + lane / 4;
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n)
        *reinterpret_cast<float2*>(parts + row * C::kSumStride + 8 * n + lane % 4 * 2) = {acc[0][n][2 * half],
                                                                                          acc[0][n][2 * half + 1]};
      if (lane % 4 == 0) stats[row] = {row_max[0][half], row_sum[0][2 * half]};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (rows.end - rows.first) * C::kChunks; i += C::kThreads) {
      const int row = i / C::kChunks, element = i % C::kChunks * 8;
      float top = -kInfinity, sum = 0, v[8] = {};
#pragma unroll
      for (int w = 0; w < C::kKeyWarps; ++w) top = fmaxf(top, stats[w * C::kRows + row].x);
#pragma unroll
      for (int w = 0; w < C::kKeyWarps; ++w) {
        const float2 stat = stats[w * C::kRows + row];
        const float weight = stat.x == -kInfinity ? 0.0f : exp2_approx((stat.x - top) * p.softmax_scale);
        sum += weight * stat.y;
        const float* const part = parts + (w * C::kRows + row) * C::kSumStride + element;
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] += weight * part[e];
      }
      const int64_t to = out_row(rows.first + row);
      if (p.splits == 1) {
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] /= sum;
        *reinterpret_cast<Vector*>(static_cast<T*>(p.out) + to * kHeadSize + element) = pack<T>(v);
      } else {
        float4* const part = reinterpret_cast<float4*>(p.split_values + (split_row + to) * kHeadSize + element);
        part[0] = {v[0], v[1], v[2], v[3]}, part[1] = {v[4], v[5], v[6], v[7]};
        if (element == 0) p.split_stats[split_row + to] = {top, sum};
      }
    }
  } else if (p.splits == 1) {
    // Through the queries' place, which only this warp reads, to stores of 16 bytes.
    __syncwarp();
    const int first = warp * C::kWarpRows;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = 1.0f / row_sum[m][2 * half];
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n)
          *reinterpret_cast<uint32_t*>(shared +
                                       QueryTile::offset(first + 16 * m + 8 * half + lane / 4, 8 * n + lane % 4 * 2)) =
              pack<T>(acc[m][n][2 * half] * factor, acc[m][n][2 * half + 1] * factor);
      }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < C::kWarpRows / C::kPassRows; ++i) {
      const int row = i * C::kPassRows + chunk_row;
      if (warp_row + row < rows.end)
        *reinterpret_cast<Vector*>(static_cast<T*>(p.out) + out_row(warp_row + row) * kHeadSize + chunk) =
            *reinterpret_cast<const Vector*>(shared + QueryTile::offset(first + row, chunk));
    }
  } else {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = warp_row + 16 * m + 8 * half + lane / 4;
        if (row >= rows.end) continue;
        const int64_t to = split_row + out_row(row);
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n)
          *reinterpret_cast<float2*>(p.split_values + to * kHeadSize + 8 * n + lane % 4 * 2) = {
              acc[m][n][2 * half], acc[m][n][2 * half + 1]};
        if (lane % 4 == 0) p.split_stats[to] = {row_max[m][half], row_sum[m][2 * half]};
      }
  }
}

constexpr int kCombineThreads = 128;

/// The splits' sums to the output: a thread has 8 elements of a row.
template <typename T, int kHeadSize>
__global__ __launch_bounds__(kCombineThreads) void combine_kernel(const __grid_constant__ Parameters p) {
  constexpr int kChunks = kHeadSize / 8;
  const int64_t i = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x, row = i / kChunks;
  // Rows beyond the last sequence's, if there are any, are nobody's.
  if (row >= int64_t{p.cu_seqlens_q[p.sequences]} * p.query_heads) return;
  float top = -kInfinity, sum = 0, v[8] = {};
  for (int s = 0; s < p.splits; ++s) top = fmaxf(top, p.split_stats[s * p.rows + row].x);
  for (int s = 0; s < p.splits; ++s) {
    const float2 stat = p.split_stats[s * p.rows + row];
    const float weight = stat.x == -kInfinity ? 0.0f : exp2_approx((stat.x - top) * p.softmax_scale);
    sum += weight * stat.y;
    const float4* const part =
        reinterpret_cast<const float4*>(p.split_values + (s * p.rows + row) * kHeadSize + i % kChunks * 8);
    const float4 low = part[0], high = part[1];
    v[0] += weight * low.x, v[1] += weight * low.y, v[2] += weight * low.z, v[3] += weight * low.w;
    v[4] += weight * high.x, v[5] += weight * high.y, v[6] += weight * high.z, v[7] += weight * high.w;
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) v[e] /= sum;
  reinterpret_cast<Vector*>(p.out)[i] = pack<T>(v);
}

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

constexpr int kDecodeRows = 16, kPrefillRows = 128;

struct Plan {
  bool decode;
  int64_t blocks;  // of a key/value head, of a split
  int splits;
};

/// From sizes and bounds that the host knows: the same for every call that a captured graph repeats.
Plan plan(const Attention& a) {
  Plan plan{};
  if (a.tokens == 0 || a.sequences == 0 || a.query_heads == 0) return plan;
  const int64_t group = a.query_heads / a.key_cache.heads, queries = std::min(a.max_seqlen_q, a.tokens);
  plan.decode = queries * group <= kDecodeRows;
  plan.blocks = plan.decode ? a.sequences : a.tokens * group / kPrefillRows + a.sequences;

  // Enough splits to fill the device, if they have keys enough to be worth it: the fewest whose last round of blocks
  // leaves little of it idle.
  constexpr int kMaxSplits = 64, kMinSplitKeys = 256, kBlocksPerMultiprocessor = 2;
  int64_t keys = a.max_seqlen_k;
  if (a.window_size > 0 && !a.spans) keys = std::min(keys, std::min<int64_t>(a.window_size, INT_MAX) + queries);
  const int64_t slots = int64_t{current_device(kOperation).multiprocessors} * kBlocksPerMultiprocessor;
  const int64_t blocks = plan.blocks * a.key_cache.heads;
  const int64_t most = std::clamp<int64_t>(std::min(keys / kMinSplitKeys, ceil_div(slots, blocks)), 1, kMaxSplits);
  const auto use = [&](int64_t splits) {
    return static_cast<double>(blocks * splits) / (ceil_div(blocks * splits, slots) * slots);
  };
  double best = 0;
  for (int64_t s = 1; s <= most; ++s) best = std::max(best, use(s));
  plan.splits = 1;
  while (use(plan.splits) < 0.85 * best) ++plan.splits;
  return plan;
}

template <typename T, int kHeadSize>
void run(const Plan& plan, const Attention& a, const Parameters& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(a.key_cache.heads),
                  static_cast<unsigned>(plan.splits));
  const auto launch_blocks = [&](auto config) {
    using C = decltype(config);
    launch<&attention_kernel<C>>(kOperation, grid, C::kThreads, C::kSharedBytes, stream, p);
  };
  static_assert(Config<T, kHeadSize, true>::kRows == kDecodeRows && Config<T, kHeadSize, false>::kRows == kPrefillRows);
  if (plan.decode)
    launch_blocks(Config<T, kHeadSize, true>{});
  else
    launch_blocks(Config<T, kHeadSize, false>{});
  if (plan.splits > 1)
    launch<&combine_kernel<T, kHeadSize>>(
        kOperation, dim3(static_cast<unsigned>(ceil_div(p.rows * kHeadSize / 8, kCombineThreads))), kCombineThreads, 0,
        stream, p);
}

template <typename T>
void run(const Plan& plan, const Attention& a, const Parameters& p, Stream stream) {
  switch (a.key_cache.head_size) {
    case 32:
      return run<T, 32>(plan, a, p, stream);
    case 64:
      return run<T, 64>(plan, a, p, stream);
    case 128:
      return run<T, 128>(plan, a, p, stream);
    case 256:
      return run<T, 256>(plan, a, p, stream);
    default:
      throw std::runtime_error("pop::attention: key_cache's head size E is " + std::to_string(a.key_cache.head_size) +
                               ", expected 32, 64, 128 or 256");
  }
}

}  // namespace

int64_t attention_workspace(const Attention& a) {
  const Plan plan = cuda::plan(a);
  return plan.splits > 1 ? plan.splits * a.tokens * a.query_heads * (a.key_cache.head_size + 2) * 4 : 0;
}

void attention(const Attention& a, void* workspace, Stream stream) {
  const Plan plan = cuda::plan(a);
  if (plan.splits == 0) return;
  const auto cache = [](const PagedCache& c) { return Cache{c.data, c.block_stride, c.token_stride, c.head_stride}; };
  Parameters p{};
  p.query = a.query, p.query_token_stride = a.query_token_stride, p.query_head_stride = a.query_head_stride;
  p.keys = cache(a.key_cache), p.values = cache(a.value_cache);
  p.block_tables = a.block_tables, p.block_table_stride = a.block_table_stride;
  p.cu_seqlens_q = a.cu_seqlens_q, p.seqlens_k = a.seqlens_k;
  p.spans = a.spans, p.span_stride = a.span_stride;
  p.group = cutlass::FastDivmod(static_cast<int>(a.query_heads / a.key_cache.heads));
  p.block_size = cutlass::FastDivmod(static_cast<int>(std::min<int64_t>(a.key_cache.block_size, INT_MAX)));
  p.sequences = static_cast<int>(a.sequences), p.query_heads = static_cast<int>(a.query_heads);
  p.window_size = a.window_size > 0 ? static_cast<int>(std::min<int64_t>(a.window_size, INT_MAX)) : INT_MAX;
  p.splits = plan.splits;
  p.softmax_scale = a.softmax_scale * 1.44269504f;
  p.rows = a.tokens * a.query_heads;
  p.split_values = static_cast<float*>(workspace);
  p.split_stats = reinterpret_cast<float2*>(p.split_values + plan.splits * p.rows * a.key_cache.head_size);
  p.out = a.out;
  if (a.dtype == DType::kBFloat16)
    run<bf16>(plan, a, p, stream);
  else
    run<fp16>(plan, a, p, stream);
}

}  // namespace pop::cuda
