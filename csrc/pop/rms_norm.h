#pragma once

#include "pop/types.h"

namespace pop {

/// y = x * rsqrt(mean(x^2) + eps) * weight (+ residual), row by row; x, y, residual [tokens, hidden].
struct RmsNorm {
  DType dtype;
  int64_t tokens, hidden;
  const void* x;
  int64_t x_stride;
  const float* weight;
  float eps;
  const void* residual;  // or null
  int64_t residual_stride;
  void* y;  // contiguous
};

namespace cpu {
void rms_norm(const RmsNorm&, const Threads&);
}

namespace cuda {
void rms_norm(const RmsNorm&, Stream);
}

}  // namespace pop
