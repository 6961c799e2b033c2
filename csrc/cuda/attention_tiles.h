#pragma once

// What a block of attention works on: its rows, and the tiles of queries, keys and values in shared memory.

#include <cutlass/fast_math.h>

#include <climits>
#include <cute/arch/copy_sm80.hpp>
#include <cute/swizzle_layout.hpp>

#include "cuda/numbers.h"
#include "cuda/shared.h"

namespace pop::cuda {

struct Cache {
  const void* data;
  int64_t block_stride, token_stride, head_stride;
};

struct AttentionParameters {
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
  float2* split_stats;  // [splits, rows]: its maximum and sum of probabilities, as softmax has them
  void* out;            // [rows, head_size]
};

/// kRows rows of a head in shared memory: columns of 64 elements (32 for that head size) one behind the other, in which
/// 16-byte chunks are permuted so that the eight rows ldmatrix reads at once lie in different banks.
template <int kRows, int kHeadSize>
struct HeadTile {
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

/// One of the two shapes of block: see attention.cu.
template <typename T_, int kHeadSize_, bool kDecode_>
struct AttentionConfig {
  using T = T_;
  static constexpr bool kDecode = kDecode_;
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kRowWarps = kDecode ? 1 : kHeadSize == 256 ? 8 : 4, kKeyWarps = kDecode ? 4 : 1;
  static constexpr int kWarps = kRowWarps * kKeyWarps, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kDecode || kHeadSize == 256 ? 1 : 2;  // of 16 rows, of a warp
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kWarpRows * kRowWarps;
  static constexpr int kKeys = !kDecode && kHeadSize == 256 ? 32 : 64, kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kKeyTiles = kWarpKeys / 8, kValueTiles = kHeadSize / 8;  // of 8 columns, of scores and of values
  static constexpr int kStages = kHeadSize == 256 ? 2 : kHeadSize == 128 && !kDecode ? 3 : 4;
  static constexpr bool kQueryInRegisters = kDecode || kHeadSize <= 64;

  using QueryTile = HeadTile<kRows, kHeadSize>;
  using KeyTile = HeadTile<kKeys, kHeadSize>;
  static constexpr int kSharedBytes = QueryTile::kBytes + kStages * KeyTile::kBytes;

  // How a warp copies rows: a lane 16 bytes, so many rows at a time.
  static constexpr int kChunks = kHeadSize / 8, kPassRows = 32 / kChunks;
  static constexpr int kCopyRows = kKeys / kWarps;  // of a tile of keys, of a warp

  // Decode: what warps have to add up in the end goes where the tiles were. Padding keeps rows in different banks.
  static constexpr int kSumStride = kHeadSize + 8;
  static_assert(!kDecode || kKeyWarps * kRows * (kSumStride + 2) * 4 <= kSharedBytes);
  static_assert(kSharedBytes <= 99 * 1024);
};

/// A block's rows [first, end) of a sequence, whose row r is head r % group of query token r / group.
struct Rows {
  int sequence, start, context, first, end;  // start: the sequence's first token of all
  int offset;                                // from the index of a query token to its position in the context

  __device__ int position(const AttentionParameters& p, int row) const { return offset + p.group.div(row); }
};

/// False where the block has none.
template <typename C>
__device__ inline bool find_rows(const AttentionParameters& p, Rows& r) {
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
  r.offset = max(r.context - queries, 0);  // a sequence of no keys is padding
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

/// Copies a block's queries to the start of shared memory; rows that do not exist become zeros.
template <typename C>
__device__ __forceinline__ void load_queries(const AttentionParameters& p, const Rows& rows, int kv_head,
                                             uint32_t shared) {
  using T = typename C::T;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunk = lane % C::kChunks * 8, chunk_row = lane / C::kChunks;
  for (int pass = warp; pass < C::kRows / C::kPassRows; pass += C::kWarps) {
    const int row = pass * C::kPassRows + chunk_row;
    int token, head;
    p.group(token, head, min(rows.first + row, rows.end - 1));
    copy_async(shared + C::QueryTile::offset(row, chunk),
               static_cast<const T*>(p.query) + (rows.start + token) * p.query_token_stride +
                   (int64_t{kv_head} * p.group.divisor + head) * p.query_head_stride + chunk,
               rows.first + row < rows.end ? 16 : 0);
  }
}

/// Where a key (or value) is in the cache, `head` being where its head begins. Beyond the keys [begin, end), where the
/// table may name no block, it is where it would be if the block of the nearest of them went on.
template <typename T>
__device__ __forceinline__ const T* locate(const AttentionParameters& p, const int32_t* table, const Cache& cache,
                                           const T* head, int key, int begin, int end) {
  const int known = min(max(key, begin), end - 1);
  int block, token;
  p.block_size(block, token, known);
  return head + table[block] * cache.block_stride + (token + key - known) * cache.token_stride;
}

/// Tiles of keys and values on their way through a ring of stages behind the queries, in the order in which they are
/// used: step 2 i is tile i's keys and 2 i + 1 its values. Keys [begin, end) are all that any row of the block sees;
/// others become zeros.
template <typename C>
struct KeyRing {
  using T = typename C::T;
  using KeyTile = typename C::KeyTile;
  static constexpr uint32_t kBegin = C::QueryTile::kBytes, kEnd = C::kSharedBytes;

  const AttentionParameters& p;
  const uint32_t shared;
  const int begin, end, last_tile;
  const int32_t* const table;
  const bool one_block;             // holds all rows that a warp copies of a tile
  const int copy_row, copy_offset;  // a lane copies 16 bytes of rows copy_row + i * kPassRows
  const T *const keys, *const values;
  uint32_t at = kEnd - KeyTile::kBytes;

  __device__ __forceinline__ KeyRing(const AttentionParameters& p, const Rows& rows, int kv_head, uint32_t shared,
                                     int begin, int end, int first_tile, int last_tile)
      : p(p),
        shared(shared),
        begin(begin),
        end(end),
        last_tile(last_tile),
        table(p.block_tables + rows.sequence * p.block_table_stride),
        one_block(p.block_size.divisor % C::kCopyRows == 0),
        copy_row(threadIdx.x / 32 * C::kCopyRows + threadIdx.x % 32 / C::kChunks),
        copy_offset(held(KeyTile::offset(copy_row, chunk()))),
        keys(static_cast<const T*>(p.keys.data) + kv_head * p.keys.head_stride + chunk()),
        values(static_cast<const T*>(p.values.data) + kv_head * p.values.head_stride + chunk()) {
#pragma unroll
    for (int i = 0; i < C::kStages - 1; ++i) fetch(2 * first_tile + i, kBegin + i * KeyTile::kBytes);
  }

  /// Waits for a tile, whose address it returns; the one before it has been read by all then, and its stage is filled
  /// again.
  __device__ __forceinline__ uint32_t next(int step) {
    cute::cp_async_wait<C::kStages - 2>();
    __syncthreads();
    fetch(step + C::kStages - 1, at);
    at = at + KeyTile::kBytes == kEnd ? kBegin : at + KeyTile::kBytes;
    return shared + at;
  }

 private:
  __device__ static int chunk() { return threadIdx.x % C::kChunks * 8; }

  __device__ __forceinline__ void fetch(int step, uint32_t to) const {
    if (step < 2 * last_tile) {
      if (step % 2)
        load(p.values, values, step / 2, shared + to);
      else
        load(p.keys, keys, step / 2, shared + to);
    }
    cute::cp_async_fence();
  }

  __device__ __forceinline__ const T* locate(const Cache& cache, const T* head, int key) const {
    return pop::cuda::locate(p, table, cache, head, key, begin, end);
  }

  __device__ __forceinline__ void load(const Cache& cache, const T* head, int tile, uint32_t to) const {
    const int key = tile * C::kKeys + copy_row;
    constexpr int kPasses = C::kCopyRows / C::kPassRows;
    if (one_block) {
      const T* from = locate(cache, head, key);
#pragma unroll
      for (int i = 0; i < kPasses; ++i, from += C::kPassRows * cache.token_stride) {
        const bool wanted = static_cast<unsigned>(key - begin + i * C::kPassRows) < static_cast<unsigned>(end - begin);
        copy_async(to + KeyTile::step(copy_offset, i * C::kPassRows), from, wanted ? 16 : 0);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPasses * C::kPassRows; i += C::kPassRows)
        copy_async(to + KeyTile::step(copy_offset, i), locate(cache, head, key + i),
                   key + i >= begin && key + i < end ? 16 : 0);
    }
  }
};

}  // namespace pop::cuda
