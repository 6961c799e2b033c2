#pragma once

#include "pop/types.h"

namespace pop {

/// y = act(x gate^T) * (x up^T); x [tokens, in], weight [2 * out, in] with the gate's rows first, y [tokens, out].
struct GatedLinear {
  DType dtype;
  int64_t tokens, in, out;
  const void* x;
  int64_t x_stride;
  const void* weight;
  int64_t weight_stride;
  Activation activation;
  void* y;  // contiguous
};

namespace cpu {
void gated_linear(const GatedLinear&, const Threads&);
}

namespace cuda {
void gated_linear(const GatedLinear&, Stream);
}

}  // namespace pop
