#include <bit>

#include "cuda/heads.h"
#include "cuda/multiply.h"
#include "cuda/sums.h"

namespace pop::cuda {
namespace {

/// A tile holds whole heads. One thread takes eight columns of a head and the eight that RoPE pairs them with, the
/// threads of a head being neighbouring lanes.
struct FinishHeads {
  static constexpr bool kPaired = false;

  Heads h;
  int block_shift;  // log2 of the caches' block size, -1 if that is no power of two

  __device__ int heads_per_layer() const { return h.query_heads + 2 * h.kv_heads; }

  __device__ int64_t weight_row(int tile, int width, int r) const {
    const int64_t row = int64_t{tile} * width + r;
    return row < int64_t{h.layers} * heads_per_layer() * h.head_size ? row : -1;
  }

  template <typename T>
  __device__ T* cache_row(const PagedCache& cache, int64_t layer_offset, int64_t slot, int head) const {
    const int64_t block = block_shift >= 0 ? slot >> block_shift : slot / cache.block_size;
    return static_cast<T*>(cache.data) + layer_offset + block * cache.block_stride +
           (slot - block * cache.block_size) * cache.token_stride + head * cache.head_stride;
  }

  template <typename T, int kRows, int kColumns, int kThreads>
  __device__ void finish(const float* sums, int token0, int tokens, int tile) const {
    const int lanes = h.head_size / 16, half = h.head_size / 2;  // lanes of a head: 2, 4, 8 or 16
    for (int unit = threadIdx.x % kThreads; unit < kRows * (kColumns / 16); unit += kThreads) {
      const int row = unit / (kColumns / 16), in_row = unit % (kColumns / 16), token = token0 + row;
      const int in_tile = in_row / lanes, chunk = in_row % lanes;
      const int head = tile * (kColumns / h.head_size) + in_tile;
      const int layer = head / heads_per_layer(), of_layer = head % heads_per_layer();
      const bool present = token < tokens && layer < h.layers;  // others still take part in shuffles
      const bool is_query = of_layer < h.query_heads, is_value = of_layer >= h.query_heads + h.kv_heads;

      const float* const from = sums + row * (kColumns + kSumsPadding) + in_tile * h.head_size;
      float low[8], high[8];
      load_sums(low, from, chunk);
      load_sums(high, from + half, chunk);
      if (present && h.row_scale) {
        const float scale = h.row_scale[token];
#pragma unroll
        for (int i = 0; i < 8; ++i) low[i] *= scale, high[i] *= scale;
      }
      if (present && h.bias) {
        const T* const bias = static_cast<const T*>(h.bias) + int64_t{head} * h.head_size + 8 * chunk;
        add<T>(low, *reinterpret_cast<const Vector*>(bias));
        add<T>(high, *reinterpret_cast<const Vector*>(bias + half));
      }
      float squares = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += low[i] * low[i] + high[i] * high[i];
      for (int o = lanes / 2; o > 0; o /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, o);
      if (!present) continue;

      const float* norm = is_query ? h.q_norm : is_value || !h.k_norm ? nullptr : h.k_norm + layer * h.head_size;
      if (norm) {
        const float scale = rsqrtf(squares / h.head_size + h.eps);
        multiply(low, scale, norm + 8 * chunk);
        multiply(high, scale, norm + half + 8 * chunk);
      }
      if (!is_value) {
        const int64_t rope = h.rope_index ? h.rope_index[layer] : 0;
        const int64_t at = (rope * tokens + token) * half + 8 * chunk;
        float c[8], s[8];
        unpack(load_floats(h.cos + at), c);
        unpack(load_floats(h.sin + at), s);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float first = low[i], second = high[i];
          low[i] = first * c[i] - second * s[i];
          high[i] = second * c[i] + first * s[i];
        }
      }
      T* to;
      if (is_query) {
        to = static_cast<T*>(h.query) + (int64_t{token} * h.query_heads + of_layer) * h.head_size;
      } else {
        const int64_t slot = h.slot_mapping[token];
        if (slot < 0) continue;
        const int kv_head = (of_layer - h.query_heads) % h.kv_heads;
        to = is_value ? cache_row<T>(h.values, layer * h.value_layer_stride, slot, kv_head)
                      : cache_row<T>(h.keys, layer * h.key_layer_stride, slot, kv_head);
      }
      *reinterpret_cast<Vector*>(to + 8 * chunk) = pack<T>(low);
      *reinterpret_cast<Vector*>(to + half + 8 * chunk) = pack<T>(high);
    }
  }

  __device__ static void multiply(float (&v)[8], float scale, const float* gains) {
    float g[8];
    unpack(load_floats(gains), g);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale * g[i];
  }
};

template <int kColumns>
using HeadsSkinny = SkinnyShapes<SkinnyTile<16, kColumns>, SkinnyTile<64, kColumns>>;

/// Tiles hold whole heads.
template <typename T>
void run(const char* operation, const GemmParameters<FinishHeads>& p, Stream stream) {
  using Wide = Tile<64, 256, 64, 64>;
  if (p.epilogue.h.head_size <= 64)
    multiply<T>(operation, HeadsSkinny<64>{}, p, 1, stream);
  else if (p.epilogue.h.head_size == 128)
    multiply<T>(operation, HeadsSkinny<128>{}, p, 1, stream);
  else
    multiply<T, Wide, Wide>(operation, HeadsSkinny<256>{}, p, 1, stream);
}

}  // namespace

void project_heads(const char* operation, DType dtype, int64_t tokens, int64_t k, const void* x, int64_t x_stride,
                   const void* weight, const Heads& h, Stream stream) {
  const auto block_size = static_cast<uint64_t>(h.keys.block_size);
  const int64_t rows = int64_t{h.layers} * (h.query_heads + 2 * h.kv_heads) * h.head_size;
  const GemmParameters<FinishHeads> p{
      .tokens = static_cast<int>(tokens),
      .k = static_cast<int>(k),
      .x = x,
      .x_stride = x_stride,
      .weight = weight,
      .rows = rows,
      .weight_stride = k,
      .epilogue = {h, std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1}};
  dtype == DType::kBFloat16 ? run<bf16>(operation, p, stream) : run<fp16>(operation, p, stream);
}

}  // namespace pop::cuda
