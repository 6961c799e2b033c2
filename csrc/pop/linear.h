#pragma once

#include "pop/types.h"

namespace pop {

/// y = x weight^T (+ bias) (+ residual); x [tokens, in], weight [out, in], y and residual [tokens, out].
/// With `y_is_float32`, y keeps the accumulator's precision whatever `dtype` is.
struct Linear {
  DType dtype;
  int64_t tokens, in, out;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  const void* bias;      // [out] or null
  const void* residual;  // or null
  int64_t residual_stride;
  void* y;  // contiguous
  bool y_is_float32;
};

namespace cpu {
void linear(const Linear&, const Threads&);
}

namespace cuda {
/// Bytes of device memory that `linear` uses while it runs, on the current device; 0 for none.
int64_t linear_workspace(const Linear&);
void linear(const Linear&, void* workspace, Stream);
}  // namespace cuda

}  // namespace pop
