#include "pop/rms_norm.h"

#include <cmath>

#include "cpu/gemm.h"

namespace pop::cpu::POP_ISA {
namespace {

template <typename T>
void run(const RmsNorm& p, const Threads& threads) {
  constexpr int64_t kTokensPerTask = 32;
  parallel_for(threads, (p.tokens + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
    for (int64_t t = task * kTokensPerTask; t < std::min(p.tokens, (task + 1) * kTokensPerTask); ++t) {
      const T* x = static_cast<const T*>(p.x) + t * p.x_stride;
      const float scale = 1.0f / std::sqrt(sum_of_squares(x, p.hidden) / p.hidden + p.eps);
      for_each_vector(p.hidden, [&](int64_t i, auto n) {
        Vec v = load(x + i, n) * scale * load(p.weight + i, n);
        if (p.residual) v += load(static_cast<const T*>(p.residual) + t * p.residual_stride + i, n);
        store(static_cast<T*>(p.y) + t * p.hidden + i, v, n);
      });
    }
  });
}

}  // namespace

void rms_norm(const RmsNorm& p, const Threads& threads) {
  if (p.dtype == DType::kFloat32) return run<float>(p, threads);
  run<bf16>(p, threads);
}

}  // namespace pop::cpu::POP_ISA
