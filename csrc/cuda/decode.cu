// The small kernels of a decode step. All are bound by their launch; none reads more than it must.

#include "cuda/device.h"
#include "cuda/numbers.h"
#include "pop/decode.h"

namespace pop::cuda {
namespace {

constexpr int kThreads = 128;

unsigned blocks_for(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

template <typename T>
__global__ __launch_bounds__(kThreads) void embedding_kernel(const __grid_constant__ Embedding p) {
  const int64_t token = blockIdx.x, id = p.token_ids[token];
  const bool known = id >= 0 && id < p.vocabulary;
  const Vector* const from =
      reinterpret_cast<const Vector*>(static_cast<const T*>(p.weight) + (known ? id : 0) * p.weight_stride);
  Vector* const to = reinterpret_cast<Vector*>(static_cast<T*>(p.y) + token * p.hidden);
  for (int64_t i = threadIdx.x; i * 8 < p.hidden; i += kThreads) {
    Vector vector = {};
    if (known) vector = from[i];
    if (p.scale != 1) {
      float v[8];
      unpack<T>(vector, v);
#pragma unroll
      for (int e = 0; e < 8; ++e) v[e] *= p.scale;
      vector = pack<T>(v);
    }
    to[i] = vector;
  }
}

__global__ __launch_bounds__(kThreads) void rope_gather_kernel(const __grid_constant__ RopeGather p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, count = p.ropes * p.tokens * p.half;
  if (index >= count) return;
  const int64_t i = index % p.half, token = index / p.half % p.tokens, rope = index / p.half / p.tokens;
  const int64_t position = p.positions[(p.axes ? p.axes[i] : 0) * p.tokens + token];
  const bool known = position >= 0 && position < p.table_rows;
  const int64_t at = (rope * p.table_rows + position) * p.half + i;
  p.out[index] = known ? p.cos[at] : 0;
  p.out[count + index] = known ? p.sin[at] : 0;
}

__global__ __launch_bounds__(kThreads) void decode_advance_kernel(const __grid_constant__ DecodeAdvance p) {
  const int64_t s = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (s == 0 && p.step) ++*p.step;
  if (s >= p.sequences) return;
  const int64_t index = p.seqlens_k[s], column = index / p.block_size;
  const bool present = index > 0, room = present && column < p.columns;
  if (present) p.seqlens_k[s] = static_cast<int32_t>(index + 1);
  p.positions[s] = present ? index + p.shifts[s] : 0;
  p.slot_mapping[s] =
      room ? int64_t{p.block_tables[s * p.block_table_stride + column]} * p.block_size + index % p.block_size : -1;
}

}  // namespace

void embedding(const Embedding& a, Stream stream) {
  if (a.tokens == 0) return;
  const dim3 grid(static_cast<unsigned>(a.tokens));
  if (a.dtype == DType::kBFloat16)
    launch<&embedding_kernel<bf16>>("embedding", grid, dim3(kThreads), 0, stream, a);
  else
    launch<&embedding_kernel<fp16>>("embedding", grid, dim3(kThreads), 0, stream, a);
}

void rope_gather(const RopeGather& a, Stream stream) {
  if (const int64_t count = a.ropes * a.tokens * a.half)
    launch<&rope_gather_kernel>("rope_gather", dim3(blocks_for(count)), dim3(kThreads), 0, stream, a);
}

void decode_advance(const DecodeAdvance& a, Stream stream) {
  if (a.sequences == 0) return;
  launch<&decode_advance_kernel>("decode_advance", dim3(blocks_for(a.sequences)), dim3(kThreads), 0, stream, a);
}

}  // namespace pop::cuda
