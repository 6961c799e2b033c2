// Flash attention over the paged cache: a block takes some rows (query heads of query tokens) of one key/value head,
// keys and values pass by in tiles, and the softmax is rescaled as larger scores turn up.
//
// Rows of all query heads that share a key/value head are packed, token by token, so that each key is read once for all
// of them. One kernel serves two shapes of block. Prefill: 128 rows, each warp has some of them and all keys of a tile.
// Decode, and the boundary: 16 rows, each warp has all of them and a quarter of a tile's keys. Where blocks are fewer
// than the device holds, they share the context out, and a second kernel merges their parts in a fixed order. On
// sm_90a, prefill has a kernel of its own (attention_hopper.cu), for blocks of the same rows.

#include <algorithm>

#include "cuda/attention_epilogue.h"
#include "cuda/attention_hopper.h"
#include "cuda/device.h"
#include "pop/attention.h"

namespace pop::cuda {
namespace {

constexpr char kOperation[] = "attention";

/// scores = queries keys^T for a warp's rows and keys. A (queries): 16 rows by 16 elements, whose four matrices are
/// rows 0-7, 8-15 of elements 0-7, then of elements 8-15; B (keys): elements 0-7 and 8-15 of keys 0-7, then of keys
/// 8-15. Where queries stay in registers, `query` holds them.
template <typename C, int kHeld>
__device__ __forceinline__ void multiply_queries(float (&scores)[C::kRowTiles][C::kKeyTiles][4],
                                                 uint32_t (&query)[kHeld][C::kRowTiles][4], uint32_t queries,
                                                 int query_offset, uint32_t key_tile, int key_offset) {
#pragma unroll
  for (int k = 0; k < C::kHeadSize / 16; ++k) {
    if constexpr (!C::kQueryInRegisters) {
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
        load_matrices(query[0][m], queries + C::QueryTile::step(query_offset, 16 * m, 16 * k));
    }
#pragma unroll
    for (int n = 0; n < C::kKeyTiles / 2; ++n) {
      uint32_t key[4];
      load_matrices(key, key_tile + C::KeyTile::step(key_offset, 16 * n, 16 * k));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          multiply_add<typename C::T>(scores[m][2 * n + j], query[C::kQueryInRegisters ? k : 0][m], key[2 * j],
                                      key[2 * j + 1]);
    }
  }
}

/// acc += probs values, row_sum += probs as rounded, so that the result is a mean. B (values, transposed): keys 0-7 and
/// 8-15 of elements 0-7, then of elements 8-15.
template <typename C>
__device__ __forceinline__ void multiply_values(OnlineSoftmax<C>& s,
                                                const uint32_t (&probs)[C::kKeyTiles / 2][C::kRowTiles][4],
                                                uint32_t value_tile, int value_offset) {
  using T = typename C::T;
  constexpr uint32_t kOnes = std::is_same_v<T, bf16> ? 0x3f803f80u : 0x3c003c00u;
#pragma unroll
  for (int k = 0; k < C::kKeyTiles / 2; ++k) {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) multiply_add<T>(s.row_sum[m], probs[k][m], kOnes, kOnes);
#pragma unroll
    for (int n = 0; n < C::kValueTiles / 2; ++n) {
      uint32_t value[4];
      load_transposed(value, value_tile + C::KeyTile::step(value_offset, 16 * k, 16 * n));
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) multiply_add<T>(s.acc[m][2 * n + j], probs[k][m], value[2 * j], value[2 * j + 1]);
    }
  }
}

template <typename C>
__global__ __launch_bounds__(C::kThreads) void attention_kernel(const __grid_constant__ AttentionParameters p) {
  using QueryTile = typename C::QueryTile;
  using KeyTile = typename C::KeyTile;
  extern __shared__ __align__(128) unsigned char shared[];  // queries, then the ring of tiles
  const uint32_t queries = shared_address(shared);

  Rows rows;
  if (!find_rows<C>(p, rows)) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, kv_head = blockIdx.y;
  // Made anew where it is used: kept, it would cost two registers, which sm_90 has not left at head size 128.
  const auto spans = [&] { return p.spans && rows.context > 0 ? p.spans + rows.sequence * p.span_stride : nullptr; };

  // Keys [begin, end) are all that any row sees; of their tiles, this split has [first_tile, last_tile).
  const int first_position = rows.position(p, rows.first), last_position = rows.position(p, rows.end - 1);
  const int begin = max(0, first_position - p.window_size + 1);
  const int end = spans() ? end_of_spans<C::kThreads>(spans(), first_position, last_position, rows.context,
                                                      reinterpret_cast<int*>(shared))
                          : min(last_position + 1, rows.context);
  const int tiles_begin = begin / C::kKeys, tiles = ceil_div(end, C::kKeys) - tiles_begin;
  const int split_tiles = ceil_div(tiles, p.splits);
  const int first_tile = tiles_begin + static_cast<int>(blockIdx.z) * split_tiles;
  const int last_tile = min(first_tile + split_tiles, tiles_begin + tiles);

  load_queries<C>(p, rows, kv_head, queries);
  KeyRing<C> ring(p, rows, kv_head, queries, begin, end, first_tile, last_tile);

  // The warp's rows and keys, and what this lane points ldmatrix at.
  const int warp_row = rows.first + warp % C::kRowWarps * C::kWarpRows, warp_key = warp / C::kRowWarps * C::kWarpKeys;
  const int query_offset = held(QueryTile::offset(warp % C::kRowWarps * C::kWarpRows + lane % 16, lane / 16 * 8));
  const int key_offset = held(KeyTile::offset(warp_key + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8));
  const int value_offset = held(KeyTile::offset(warp_key + lane % 16, lane / 16 * 8));
  // Positions of the warp's first and last row.
  const int warp_first = rows.position(p, min(warp_row, rows.end - 1));
  const int warp_last = rows.position(p, min(warp_row + C::kWarpRows, rows.end) - 1);

  uint32_t query[C::kQueryInRegisters ? C::kHeadSize / 16 : 1][C::kRowTiles][4];
  OnlineSoftmax<C> softmax;
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const uint32_t key_tile = ring.next(2 * tile);
    if constexpr (C::kQueryInRegisters) {
      if (tile == first_tile) {
#pragma unroll
        for (int k = 0; k < C::kHeadSize / 16; ++k)
#pragma unroll
          for (int m = 0; m < C::kRowTiles; ++m)
            load_matrices(query[k][m], queries + QueryTile::step(query_offset, 16 * m, 16 * k));
      }
    }
    float scores[C::kRowTiles][C::kKeyTiles][4] = {};
    multiply_queries<C>(scores, query, queries, query_offset, key_tile, key_offset);
    const int first_key = tile * C::kKeys + warp_key;
    if (first_key + C::kWarpKeys > warp_first + 1 || first_key <= warp_last - p.window_size)  // some are not visible
      mask<C>(scores, p, rows, spans(), held(warp_row + lane / 4), first_key + lane % 4 * 2);
    uint32_t probs[C::kKeyTiles / 2][C::kRowTiles][4];
    softmax.update(scores, p.softmax_scale, probs);
    multiply_values<C>(softmax, probs, ring.next(2 * tile + 1), value_offset);
  }
  cute::cp_async_wait<0>();
  if (rows.context == 0) __syncthreads();  // padding: the queries' copies have had no barrier

  if constexpr (C::kDecode)
    store_decode<C>(p, rows, kv_head, softmax, shared);
  else if (p.splits == 1)
    store_prefill<C>(p, rows, kv_head, warp_row, softmax, shared);
  else
    store_split<C>(p, rows, kv_head, warp_row, softmax);
}

constexpr int kDecodeRows = 16, kPrefillRows = kHopperRows;

struct Plan {
  bool decode, hopper;
  int64_t blocks;  // of a key/value head, of a split
  int splits;
};

/// From sizes and bounds that the host knows: the same for every call that a captured graph repeats.
Plan plan(const Attention& a) {
  Plan plan{};
  if (a.tokens == 0 || a.sequences == 0 || a.query_heads == 0) return plan;
  const int64_t group = a.query_heads / a.key_cache.heads, queries = std::min(a.max_seqlen_q, a.tokens);
  plan.decode = queries * group <= kDecodeRows;
  plan.hopper = !plan.decode && hopper_attention_serves(a);
  plan.blocks = plan.decode ? a.sequences : a.tokens * group / kPrefillRows + a.sequences;

  // Enough splits to fill the device, if they have keys enough to be worth it: the fewest whose last round of blocks
  // leaves little of it idle.
  constexpr int kMaxSplits = 64, kMinSplitKeys = 256;
  const int blocks_per_multiprocessor = plan.hopper ? 1 : 2;
  int64_t keys = a.max_seqlen_k;
  if (a.window_size > 0 && !a.spans) keys = std::min(keys, std::min<int64_t>(a.window_size, INT_MAX) + queries);
  const int64_t slots = int64_t{current_device(kOperation).multiprocessors} * blocks_per_multiprocessor;
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
void run(const Plan& plan, const Attention& a, const AttentionParameters& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(a.key_cache.heads),
                  static_cast<unsigned>(plan.splits));
  const auto launch_blocks = [&](auto config) {
    using C = decltype(config);
    launch<&attention_kernel<C>>(kOperation, grid, C::kThreads, C::kSharedBytes, stream, p);
  };
  static_assert(AttentionConfig<T, kHeadSize, true>::kRows == kDecodeRows &&
                AttentionConfig<T, kHeadSize, false>::kRows == kPrefillRows);
  if (plan.hopper)
    launch_hopper_attention(a, p, plan.blocks, stream);
  else if (plan.decode)
    launch_blocks(AttentionConfig<T, kHeadSize, true>{});
  else
    launch_blocks(AttentionConfig<T, kHeadSize, false>{});
  if (plan.splits > 1)
    launch<&combine_kernel<T, kHeadSize>>(
        kOperation, dim3(static_cast<unsigned>(ceil_div(p.rows * kHeadSize / 8, kCombineThreads))), kCombineThreads, 0,
        stream, p);
}

template <typename T>
void run(const Plan& plan, const Attention& a, const AttentionParameters& p, Stream stream) {
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
  AttentionParameters p{};
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
