#include "pop/linear.h"

#include "cpu/gemm.h"

namespace pop::cpu::POP_ISA {
namespace {

template <typename T, typename Out>
void run(const Linear& p, const Threads& threads) {
  const T* weight = static_cast<const T*>(p.weight);
  const T* bias = static_cast<const T*>(p.bias);
  const T* residual = static_cast<const T*>(p.residual);
  const int width = block_columns(p.tokens, p.out, p.in, threads.count);
  const auto columns = [&](int64_t block) { return static_cast<int>(std::min<int64_t>(width, p.out - block * width)); };
  const auto row = [&](int64_t block, int c) { return weight + (block * width + c) * p.weight_stride; };
  const auto epilogue = [&](int64_t block, int64_t first, int count, const float* sums, int64_t stride) {
    const int64_t column = block * width;
    for (int64_t t = first; t < first + count; ++t, sums += stride) {
      for_each_vector(columns(block), [&](int64_t i, auto n) {
        Vec v = load(sums + i);
        if (bias) v += load(bias + column + i, n);
        if (residual) v += load(residual + t * p.residual_stride + column + i, n);
        store(static_cast<Out*>(p.y) + t * p.out + column + i, v, n);
      });
    }
  };
  gemm<T>(threads, p.tokens, p.in, static_cast<const T*>(p.x), p.x_stride, (p.out + width - 1) / width, width, columns,
          row, epilogue);
}

}  // namespace

void linear(const Linear& p, const Threads& threads) {
  if (p.dtype == DType::kFloat32) return run<float, float>(p, threads);
  if (p.y_is_float32) return run<bf16, float>(p, threads);
  run<bf16, bf16>(p, threads);
}

}  // namespace pop::cpu::POP_ISA
