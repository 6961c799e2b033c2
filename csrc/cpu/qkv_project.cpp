#include "pop/qkv_project.h"

#include "cpu/head.h"

namespace pop::cpu::POP_ISA {
namespace {

template <typename T>
void run(const QkvProject& p, const Threads& threads) {
  const int64_t size = p.key_cache.head_size, kv_heads = p.key_cache.heads, heads = p.query_heads + 2 * kv_heads;
  const int64_t block_heads = heads_per_block(p.tokens, heads, size, p.in, threads.count);
  const T* weight = static_cast<const T*>(p.weight);
  const auto heads_of = [&](int64_t block) { return std::min(block_heads, heads - block * block_heads); };
  const auto columns = [&](int64_t block) { return static_cast<int>(heads_of(block) * size); };
  const auto row = [&](int64_t block, int c) { return weight + (block * block_heads * size + c) * p.in; };
  const auto epilogue = [&](int64_t block, int64_t first, int count, float* sums, int64_t stride) {
    for (int64_t t = first; t < first + count; ++t, sums += stride) {
      const float *cos = p.cos + t * (size / 2), *sin = p.sin + t * (size / 2);
      for (int64_t i = 0; i < heads_of(block); ++i) {
        const int64_t head = block * block_heads + i;
        const T* bias = p.bias ? static_cast<const T*>(p.bias) + head * size : nullptr;
        if (head < p.query_heads) {
          finish_head(sums + i * size, size, 1.0f, bias, p.q_norm, p.eps, cos, sin,
                      static_cast<T*>(p.query) + (t * p.query_heads + head) * size);
        } else if (p.slot_mapping[t] >= 0) {
          const int64_t kv = head - p.query_heads;
          if (kv < kv_heads) {
            finish_head(sums + i * size, size, 1.0f, bias, p.k_norm, p.eps, cos, sin,
                        cache_row<T>(p.key_cache, p.slot_mapping[t], kv));
          } else {
            finish_head<T>(sums + i * size, size, 1.0f, bias, nullptr, p.eps, nullptr, nullptr,
                           cache_row<T>(p.value_cache, p.slot_mapping[t], kv - kv_heads));
          }
        }
      }
    }
  };
  gemm<T>(threads, p.tokens, p.in, static_cast<const T*>(p.x), p.x_stride, (heads + block_heads - 1) / block_heads,
          static_cast<int>(block_heads * size), columns, row, epilogue);
}

}  // namespace

void qkv_project(const QkvProject& p, const Threads& threads) {
  if (p.dtype == DType::kFloat32) return run<float>(p, threads);
  run<bf16>(p, threads);
}

}  // namespace pop::cpu::POP_ISA
