#pragma once

// What the projections do to a head of one token once its sums are there: bias, per-head RMS norm, RoPE.

#include <cmath>

#include "cpu/gemm.h"

namespace pop::cpu::POP_ISA {

/// Heads are computed in blocks of whole heads.
inline int64_t heads_per_block(int64_t tokens, int64_t heads, int64_t head_size, int64_t k, int threads) {
  return std::clamp<int64_t>(block_columns(tokens, heads * head_size, k, threads) / head_size, 1, heads);
}

template <typename T>
T* cache_row(const PagedCache& cache, int64_t slot, int64_t head) {
  return static_cast<T*>(cache.data) + slot / cache.block_size * cache.block_stride +
         slot % cache.block_size * cache.token_stride + head * cache.head_stride;
}

/// out = rope(norm(scale * sums + bias)); null pointers leave a step out. `sums` is overwritten.
template <typename T>
void finish_head(float* sums, int64_t head_size, float scale, const T* bias, const float* norm, float eps,
                 const float* cos, const float* sin, T* out) {
  if (bias || scale != 1.0f) {
    for_each_vector(head_size, [&](int64_t i, auto n) {
      Vec v = load(sums + i, n) * scale;
      if (bias) v += load(bias + i, n);
      store(sums + i, v, n);
    });
  }
  if (norm) {
    const float rms = 1.0f / std::sqrt(sum_of_squares(sums, head_size) / head_size + eps);
    for_each_vector(head_size,
                    [&](int64_t i, auto n) { store(sums + i, load(sums + i, n) * rms * load(norm + i, n), n); });
  }
  if (!cos) {
    for_each_vector(head_size, [&](int64_t i, auto n) { store(out + i, load(sums + i, n), n); });
    return;
  }
  const int64_t half = head_size / 2;
  for_each_vector(half, [&](int64_t i, auto n) {
    const Vec first = load(sums + i, n), second = load(sums + half + i, n), c = load(cos + i, n), s = load(sin + i, n);
    store(out + i, first * c - second * s, n);
    store(out + half + i, second * c + first * s, n);
  });
}

}  // namespace pop::cpu::POP_ISA
