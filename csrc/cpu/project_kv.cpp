#include "pop/project_kv.h"

#include <vector>

#include "cpu/head.h"

namespace pop::cpu::POP_ISA {
namespace {

template <typename T>
void run(const ProjectKv& p, const Threads& threads) {
  const int64_t size = p.key_caches.head_size, kv_heads = p.key_caches.heads, heads = p.layers * 2 * kv_heads;
  const int64_t block_heads = heads_per_block(p.tokens, heads, size, p.in, threads.count);
  const T* hidden = static_cast<const T*>(p.hidden);
  const T* weight = static_cast<const T*>(p.weight);

  std::vector<float> scales(p.tokens);  // 1 / rms of each token, which commutes with the multiplication
  constexpr int64_t kTokensPerTask = 64;
  parallel_for(threads, (p.tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
    for (int64_t t = task * kTokensPerTask; t < std::min(p.tokens, (task + 1) * kTokensPerTask); ++t)
      scales[t] = 1.0f / std::sqrt(sum_of_squares(hidden + t * p.hidden_stride, p.in) / p.in + p.eps);
  });

  const auto heads_of = [&](int64_t block) { return std::min(block_heads, heads - block * block_heads); };
  const auto columns = [&](int64_t block) { return static_cast<int>(heads_of(block) * size); };
  const auto row = [&](int64_t block, int c) { return weight + (block * block_heads * size + c) * p.in; };
  const auto epilogue = [&](int64_t block, int64_t first, int count, float* sums, int64_t stride) {
    for (int64_t t = first; t < first + count; ++t, sums += stride) {
      if (p.slot_mapping[t] < 0) continue;
      for (int64_t i = 0; i < heads_of(block); ++i) {
        const int64_t head = block * block_heads + i, layer = head / (2 * kv_heads), kv = head % (2 * kv_heads);
        const T* bias = p.bias ? static_cast<const T*>(p.bias) + head * size : nullptr;
        if (kv < kv_heads) {
          const int64_t angle = (p.rope_index[layer] * p.tokens + t) * (size / 2);
          finish_head(sums + i * size, size, scales[t], bias, p.k_norm ? p.k_norm + layer * size : nullptr, p.eps,
                      p.cos + angle, p.sin + angle,
                      cache_row<T>(p.key_caches, p.slot_mapping[t], kv) + layer * p.key_layer_stride);
        } else {
          finish_head<T>(sums + i * size, size, scales[t], bias, nullptr, p.eps, nullptr, nullptr,
                         cache_row<T>(p.value_caches, p.slot_mapping[t], kv - kv_heads) + layer * p.value_layer_stride);
        }
      }
    }
  };
  gemm<T>(threads, p.tokens, p.in, hidden, p.hidden_stride, (heads + block_heads - 1) / block_heads,
          static_cast<int>(block_heads * size), columns, row, epilogue);
}

}  // namespace

void project_kv(const ProjectKv& p, const Threads& threads) {
  if (p.dtype == DType::kFloat32) return run<float>(p, threads);
  run<bf16>(p, threads);
}

}  // namespace pop::cpu::POP_ISA
