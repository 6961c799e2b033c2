// Flash attention for sm_90a, prefill: blocks of 128 rows, as attention.cu has them, two warpgroups with 64 each.
//
// A third warpgroup brings tiles of keys and values: by TMA where a tile lies in whole boxes of the cache's blocks,
// else (odd blocks, the context's ragged end) by plain copies. A warpgroup multiplies the queries with the next tile's
// keys, and the last tile's probabilities, in registers, with its values, while it turns the next scores into
// probabilities; and the two warpgroups take turns, so that one's exponentials run beside the other's multiplications.

#include <numeric>

#include "cuda/attention_epilogue.h"
#include "cuda/attention_hopper.h"
#include "cuda/attention_wgmma.h"
#include "cuda/device.h"
#include "cuda/hopper.h"

namespace pop::cuda {

/// In the words of AttentionConfig, for what both kernels share; warps are those that multiply.
template <typename T_, int kHeadSize_, bool kSpans_>
struct HopperConfig {
  using T = T_;
  static constexpr bool kDecode = false, kSpans = kSpans_;  // without spans, a mask takes less than half
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr int kGroups = 2, kGroupThreads = 128;  // warpgroups that multiply, beside the one that copies
  static constexpr int kWarps = 4 * kGroups, kThreads = (kGroups + 1) * kGroupThreads;
  static constexpr int kRowTiles = 1, kWarpRows = 16, kRows = kWarpRows * kWarps;
  static constexpr int kKeys = 128, kKeyTiles = kKeys / 8, kValueTiles = kHeadSize / 8;
  static constexpr int kStages = 4;

  using QueryTile = HeadTile<kRows, kHeadSize>;
  using KeyTile = HeadTile<kKeys, kHeadSize>;
  static constexpr int kBarriers = QueryTile::kBytes + kStages * KeyTile::kBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kGroups == 2 && kRows == kHopperRows && kSharedBytes <= 227 * 1024);

  static constexpr int kChunks = kHeadSize / 8, kPassRows = 32 / kChunks;
  static constexpr int kCopyRows = kGroupThreads / kChunks;  // of a tile, that a warpgroup copies at a time

  // Registers of a thread: 504 for one of each warpgroup.
  static constexpr int kCopyRegisters = 24, kRegisters = 240;
};

struct HopperParameters {
  static constexpr bool kSm90a = true;  // for launch
  CUtensorMap keys, values;             // in boxes of box_keys keys by 64 elements
  AttentionParameters attention;
  int box_keys, boxes;  // of a tile; 0: the cache's blocks are too small, or odd
};

namespace {

constexpr char kOperation[] = "attention";

/// Named barriers, beside __syncthreads's; those of a warpgroup are one each.
enum Barrier { kQueries = 1, kCopies, kTurn, kOwn = kTurn + 2 };

/// The ring of tiles. A stage is full once its tile has landed, and empty once both warpgroups have read it. Tiles pass
/// in the order in which they are used: tile 0's keys, then each next tile's keys and the values of the one before.
template <typename C>
struct TileRing {
  uint32_t tiles, full, empty;
  int stage = 0;
  uint32_t parity = 0;

  __device__ explicit TileRing(uint32_t shared)
      : tiles(shared + C::QueryTile::kBytes), full(shared + C::kBarriers), empty(full + 8 * C::kStages) {}

  __device__ void initialize() const {
    for (int s = 0; s < C::kStages; ++s) {
      initialize_barrier(full + 8 * s, 1);
      initialize_barrier(empty + 8 * s, C::kGroups);
    }
    fence_barriers();
  }
  __device__ uint32_t tile(int stage) const { return tiles + stage * C::KeyTile::kBytes; }
  __device__ void advance() {
    if (++stage == C::kStages) stage = 0, parity ^= 1;
  }

  /// Waits for the next stage with a tile.
  __device__ __forceinline__ int take() {
    const int taken = stage;
    wait_barrier(full + 8 * taken, parity);
    advance();
    return taken;
  }
  __device__ __forceinline__ void release(int taken) const {
    if (threadIdx.x % C::kGroupThreads == 0) arrive_barrier(empty + 8 * taken);
  }
};

/// The keys that a block works on: [begin, end) are all that any row sees, in the tiles [first_tile, last_tile).
struct KeyRange {
  int begin, end, first_tile, last_tile;
};

/// The copying warpgroup.
template <typename C>
struct Copier {
  using T = typename C::T;
  using KeyTile = typename C::KeyTile;

  const HopperParameters& h;
  const AttentionParameters& p;
  const Rows& rows;
  const KeyRange& range;
  const int kv_head;
  const int32_t* const table;
  TileRing<C> ring;
  int copied = -1;  // a stage with copies under way that nobody has been told of

  __device__ Copier(const HopperParameters& h, const Rows& rows, const KeyRange& range, int kv_head, uint32_t shared)
      : h(h),
        p(h.attention),
        rows(rows),
        range(range),
        kv_head(kv_head),
        table(p.block_tables + rows.sequence * p.block_table_stride),
        ring(shared) {}

  __device__ __forceinline__ void run() {
    for (int tile = range.first_tile; tile <= range.last_tile; ++tile) {
      if (tile < range.last_tile) fetch(p.keys, h.keys, tile);
      if (tile > range.first_tile) fetch(p.values, h.values, tile - 1);
    }
    cute::cp_async_wait<0>();
    publish();
  }

 private:
  __device__ static int thread() { return threadIdx.x % C::kGroupThreads; }

  __device__ __forceinline__ void fetch(const Cache& cache, const CUtensorMap& map, int tile) {
    wait_barrier(ring.empty + 8 * ring.stage, ring.parity ^ 1);
    const int key = tile * C::kKeys;
    // What lies in a block before the first key that is seen may be read; blocks before that may be gone.
    const int known = range.begin - p.block_size.rem(range.begin);
    const bool boxed = h.boxes > 0 && key >= known && key + C::kKeys <= rows.context;
    if (boxed)
      load(map, key);
    else
      copy(cache, key);
    cute::cp_async_fence();
    // A stage of copies is told of while the next one's are under way.
    if (copied >= 0) {
      if (boxed)
        cute::cp_async_wait<0>();
      else
        cute::cp_async_wait<1>();
      publish();
    }
    copied = boxed ? -1 : ring.stage;
    ring.advance();
  }

  __device__ __forceinline__ void publish() {
    if (copied < 0) return;
    fence_async_proxy();
    sync_threads(kCopies, C::kGroupThreads);
    if (thread() == 0) arrive_barrier(ring.full + 8 * copied);
  }

  /// One warp starts the tile's boxes.
  __device__ __forceinline__ void load(const CUtensorMap& map, int key) const {
    constexpr int kColumns = C::kHeadSize / KeyTile::kWidth;
    if (thread() >= 32) return;
    const uint32_t full = ring.full + 8 * ring.stage;
    if (thread() == 0) expect_bytes(full, KeyTile::kBytes);
    __syncwarp();
    for (int i = thread(); i < h.boxes * kColumns; i += 32) {
      const int first = i / kColumns * h.box_keys, column = i % kColumns;
      int block, token;
      p.block_size(block, token, key + first);
      load_box(map, full, ring.tile(ring.stage) + (column * C::kKeys + first) * KeyTile::kWidth * 2,
               column * KeyTile::kWidth, kv_head, token, table[block]);
    }
  }

  /// Every thread copies 16 bytes of some rows; keys that nobody sees become zeros.
  __device__ __forceinline__ void copy(const Cache& cache, int first) const {
    const int chunk = thread() % C::kChunks * 8, row = thread() / C::kChunks;
    const T* const head = static_cast<const T*>(cache.data) + kv_head * cache.head_stride + chunk;
    const uint32_t to = ring.tile(ring.stage) + KeyTile::offset(row, chunk);
#pragma unroll 2
    for (int i = 0; i < C::kKeys; i += C::kCopyRows) {
      const int key = first + row + i;
      copy_async(to + i * KeyTile::kWidth * 2, locate(p, table, cache, head, key, range.begin, range.end),
                 key >= range.begin && key < range.end ? 16 : 0);
    }
  }
};

/// As OnlineSoftmax has it, for 16 rows of a warp.
template <typename C>
struct HopperSoftmax {
  using T = typename C::T;
  float acc[1][C::kValueTiles][4] = {}, row_sum[1][2] = {}, row_max[1][2] = {{-kInfinity, -kInfinity}};
  float rescale[2];

  __device__ float sum(int, int half) const { return row_sum[0][half]; }

  /// Scores become probabilities. What `rescale_values` has to do is put off, as values may be under way.
  __device__ __forceinline__ void update(float (&scores)[1][C::kKeyTiles][4], float softmax_scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top[2] = {scores[0][0][2 * half], scores[0][0][2 * half + 1]};
#pragma unroll
      for (int n = 1; n < C::kKeyTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) top[j] = fmaxf(top[j], scores[0][n][2 * half + j]);
      const float base =
          raise_maximum<T>(row_max[0][half], quad_max(fmaxf(top[0], top[1])), softmax_scale, rescale[half]);
      float sum[2] = {row_sum[0][half] * rescale[half], 0};
#pragma unroll
      for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[0][n][2 * half + j];
          score = exp2_approx(fmaf(score, softmax_scale, -base));
          sum[j] += score;
        }
      row_sum[0][half] = sum[0] + sum[1];
    }
  }

  __device__ __forceinline__ void rescale_values() {
    if (__any_sync(kAllLanes, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
      for (int n = 0; n < C::kValueTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][n][i] *= rescale[i / 2];
    }
  }

  /// Each lane has summed up its own columns.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) row_sum[0][half] = quad_sum(row_sum[0][half]);
  }
};

/// Starts scores = queries keys^T, for a warpgroup's rows.
template <typename C>
__device__ __forceinline__ void multiply_queries(float (&scores)[1][C::kKeyTiles][4], uint32_t queries,
                                                 uint32_t key_tile) {
  const uint64_t a = matrix_descriptor(queries), b = matrix_descriptor(key_tile);
#pragma unroll
  for (int k = 0; k < C::kHeadSize / 16; ++k) {
    const int column = k * 16 / 64 * 64 * 2, inside = k * 16 % 64 * 2;  // bytes
    wgmma<typename C::T>(scores[0], a + (column * C::kRows + inside) / 16, b + (column * C::kKeys + inside) / 16,
                         k > 0);
  }
  wgmma_commit();
}

/// Starts acc += probs values.
template <typename C>
__device__ __forceinline__ void multiply_values(float (&acc)[1][C::kValueTiles][4],
                                                const uint32_t (&probs)[C::kKeyTiles / 2][4], uint32_t value_tile) {
  // Values lie along elements: 64 of them, then the next 64 behind all keys.
  const uint64_t b = matrix_descriptor(value_tile, C::kKeys * 64 * 2);
#pragma unroll
  for (int k = 0; k < C::kKeys / 16; ++k) wgmma<typename C::T>(acc[0], probs[k], b + k * 16 * 64 * 2 / 16);
  wgmma_commit();
}

/// A multiplying warpgroup.
template <typename C>
__device__ __forceinline__ void attend(const AttentionParameters& p, const Rows& rows, const KeyRange& range,
                                       const int32_t* spans, int kv_head, int group, unsigned char* shared) {
  const uint32_t queries = shared_address(shared);
  TileRing<C> ring(queries);
  load_queries<C>(p, rows, kv_head, queries);
  cute::cp_async_fence();
  cute::cp_async_wait<0>();
  fence_async_proxy();
  sync_threads(kQueries, C::kGroups * C::kGroupThreads);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = rows.first + warp * C::kWarpRows;
  const int warp_first = rows.position(p, min(warp_row, rows.end - 1));
  const int warp_last = rows.position(p, min(warp_row + C::kWarpRows, rows.end) - 1);
  const uint32_t group_queries = queries + group * 64 * 64 * 2;

  float scores[1][C::kKeyTiles][4];
  uint32_t probs[C::kKeyTiles / 2][4];
  HopperSoftmax<C> softmax;
  const auto weigh = [&](int tile) {
    const int first_key = tile * C::kKeys;
    if (first_key + C::kKeys > warp_first + 1 || first_key <= warp_last - p.window_size) {  // some are not visible
      const int row = held(warp_row + lane / 4), key = first_key + lane % 4 * 2;
      if constexpr (C::kSpans)
        mask<C>(scores, p, rows, spans, row, key);
      else
        mask<C>(scores, p, rows, row, key);
    }
    softmax.update(scores, p.softmax_scale);
  };
  const auto pack_scores = [&] {
#pragma unroll
    for (int k = 0; k < C::kKeyTiles / 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        probs[k][i] = pack<typename C::T>(scores[0][2 * k + i / 2][i % 2 * 2], scores[0][2 * k + i / 2][i % 2 * 2 + 1]);
  };

  // The first warpgroup has the first turn.
  const int tiles = range.last_tile - range.first_tile;
  if (tiles > 1 && group == 1) arrive_threads(kTurn, C::kGroups * C::kGroupThreads);
  if (tiles > 0) {
    const int stage = ring.take();
    wgmma_fence(scores[0]);
    multiply_queries<C>(scores, group_queries, ring.tile(stage));
    wgmma_wait<0>(scores[0]);
    ring.release(stage);
    weigh(range.first_tile);
    pack_scores();
  }
  for (int tile = range.first_tile + 1; tile < range.last_tile; ++tile) {
    sync_threads(kTurn + group, C::kGroups * C::kGroupThreads);
    const int keys = ring.take();
    wgmma_fence(scores[0]);
    multiply_queries<C>(scores, group_queries, ring.tile(keys));
    const int values = ring.take();
    wgmma_fence(softmax.acc[0]);
    multiply_values<C>(softmax.acc, probs, ring.tile(values));
    if (group == 0 || tile + 1 < range.last_tile) arrive_threads(kTurn + 1 - group, C::kGroups * C::kGroupThreads);
    wgmma_wait<1>(scores[0]);
    ring.release(keys);
    weigh(tile);
    wgmma_wait<0>(scores[0], softmax.acc[0]);
    ring.release(values);
    softmax.rescale_values();
    pack_scores();
  }
  if (tiles > 0) {
    const int stage = ring.take();
    wgmma_fence(softmax.acc[0]);
    multiply_values<C>(softmax.acc, probs, ring.tile(stage));
    wgmma_wait<0>(softmax.acc[0]);
  }

  softmax.finish();
  if (p.splits == 1) {
    sync_threads(kOwn + group, C::kGroupThreads);  // its rows' queries have been read
    store_prefill<C>(p, rows, kv_head, warp_row, softmax, shared);
  } else {
    store_split<C>(p, rows, kv_head, warp_row, softmax);
  }
}

template <typename C>
__global__ __launch_bounds__(C::kThreads, 1) void attention_hopper_kernel(const __grid_constant__ HopperParameters h) {
#if POP_SM90A
  extern __shared__ __align__(1024) unsigned char shared[];  // queries, the ring of tiles, its barriers
  const AttentionParameters& p = h.attention;
  Rows rows;
  if (!find_rows<C>(p, rows)) return;
  const int kv_head = blockIdx.y;
  const int32_t* const spans = C::kSpans && rows.context > 0 ? p.spans + rows.sequence * p.span_stride : nullptr;

  const int first_position = rows.position(p, rows.first), last_position = rows.position(p, rows.end - 1);
  KeyRange range;
  range.begin = max(0, first_position - p.window_size + 1);
  range.end = spans ? end_of_spans<C::kThreads>(spans, first_position, last_position, rows.context,
                                                reinterpret_cast<int*>(shared))
                    : min(last_position + 1, rows.context);
  const int tiles_begin = range.begin / C::kKeys, tiles = ceil_div(range.end, C::kKeys) - tiles_begin;
  const int split_tiles = ceil_div(tiles, p.splits);
  range.first_tile = tiles_begin + static_cast<int>(blockIdx.z) * split_tiles;
  range.last_tile = min(range.first_tile + split_tiles, tiles_begin + tiles);

  if (threadIdx.x == 0) TileRing<C>(shared_address(shared)).initialize();
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, threadIdx.x / C::kGroupThreads, 0);
  if (group == C::kGroups) {
    release_registers<C::kCopyRegisters>();
    Copier<C>(h, rows, range, kv_head, shared_address(shared)).run();
  } else {
    claim_registers<C::kRegisters>();
    attend<C>(p, rows, range, spans, kv_head, group, shared);
  }
#endif
}

template <typename C>
void run(const Attention& a, const AttentionParameters& p, int64_t blocks, Stream stream) {
  HopperParameters h{.keys = {}, .values = {}, .attention = p, .box_keys = 0, .boxes = 0};
  const auto common = static_cast<int>(std::gcd(a.key_cache.block_size, int64_t{C::kKeys}));
  if (common % 8 == 0 && a.key_cache.blocks > 0) {  // whole rows of the swizzle
    h.box_keys = common, h.boxes = C::kKeys / common;
    const auto map = [&](const PagedCache& c) {
      const auto count = [](int64_t n) { return static_cast<cuuint64_t>(n); };
      return tensor_map(kOperation, a.dtype,
                        {.data = c.data,
                         .sizes = {C::kHeadSize, count(c.heads), count(c.block_size), count(c.blocks)},
                         .strides = {count(c.head_stride), count(c.token_stride), count(c.block_stride)},
                         .box = {C::KeyTile::kWidth, 1, static_cast<cuuint32_t>(common), 1}});
    };
    h.keys = map(a.key_cache), h.values = map(a.value_cache);
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.key_cache.heads),
                  static_cast<unsigned>(p.splits));
  launch<&attention_hopper_kernel<C>>(kOperation, grid, C::kThreads, C::kSharedBytes, stream, h);
}

}  // namespace

bool hopper_attention_serves(const Attention& a) {
  return (a.key_cache.head_size == 64 || a.key_cache.head_size == 128) && runs_sm90a(kOperation);
}

void launch_hopper_attention(const Attention& a, const AttentionParameters& p, int64_t blocks, Stream stream) {
  const auto with = [&]<typename T, int kHeadSize>() {
    if (a.spans)
      run<HopperConfig<T, kHeadSize, true>>(a, p, blocks, stream);
    else
      run<HopperConfig<T, kHeadSize, false>>(a, p, blocks, stream);
  };
  const auto with_type = [&]<typename T>() {
    if (a.key_cache.head_size == 64)
      with.template operator()<T, 64>();
    else
      with.template operator()<T, 128>();
  };
  if (a.dtype == DType::kBFloat16)
    with_type.template operator()<bf16>();
  else
    with_type.template operator()<fp16>();
}

}  // namespace pop::cuda
