#include "pop/gated_linear.h"

#include "cpu/gemm.h"

namespace pop::cpu::POP_ISA {
namespace {

/// A block holds `half` columns of the gate and the same columns of up, so that the epilogue has both.
template <typename T, typename Act>
void run(const GatedLinear& p, const Threads& threads, Act&& act) {
  const T* weight = static_cast<const T*>(p.weight);
  const int half = block_columns(p.tokens, 2 * p.out, p.in, threads.count) / 2;
  const auto width = [&](int64_t block) { return static_cast<int>(std::min<int64_t>(half, p.out - block * half)); };
  const auto columns = [&](int64_t block) { return 2 * width(block); };
  const auto row = [&](int64_t block, int c) {
    const int n = width(block);
    return weight + (block * half + (c < n ? c : p.out + c - n)) * p.weight_stride;
  };
  const auto epilogue = [&](int64_t block, int64_t first, int count, const float* sums, int64_t stride) {
    const int n = width(block);
    for (int64_t t = first; t < first + count; ++t, sums += stride) {
      for_each_vector(n, [&](int64_t i, auto valid) {
        store(static_cast<T*>(p.y) + t * p.out + block * half + i,
              act(load(sums + i, valid)) * load(sums + n + i, valid), valid);
      });
    }
  };
  gemm<T>(threads, p.tokens, p.in, static_cast<const T*>(p.x), p.x_stride, (p.out + half - 1) / half, 2 * half, columns,
          row, epilogue);
}

template <typename T>
void run(const GatedLinear& p, const Threads& threads) {
  if (p.activation == Activation::kSiLU) return run<T>(p, threads, [](Vec x) { return silu(x); });
  run<T>(p, threads, [](Vec x) { return gelu_tanh(x); });
}

}  // namespace

void gated_linear(const GatedLinear& p, const Threads& threads) {
  if (p.dtype == DType::kFloat32) return run<float>(p, threads);
  run<bf16>(p, threads);
}

}  // namespace pop::cpu::POP_ISA
