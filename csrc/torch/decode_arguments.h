#pragma once

// The arguments of the decode step's operations, checked; for CPU (decode.cpp) and CUDA (cuda.cpp).

#include "pop/decode.h"
#include "pop/sample.h"
#include "torch/arguments.h"

namespace pop::arguments {

Call<Embedding> embedding(const Backend&, const Tensor& token_ids, const Tensor& weight, double scale);

Call<RopeGather> rope_gather(const Backend&, const Tensor& cos_table, const Tensor& sin_table, const Tensor& positions,
                             const OptionalTensor& axes);

DecodeAdvance decode_advance(const Backend&, const Tensor& block_tables, int64_t block_size, const Tensor& shifts,
                             const Tensor& seqlens_k, const Tensor& positions, const Tensor& slot_mapping,
                             const OptionalTensor& step);

Sample sample(const Backend&, const Tensor& logits, const OptionalTensor& settings, const OptionalTensor& seen,
              const OptionalTensor& uniforms, const OptionalTensor& step, const Tensor& tokens);

}  // namespace pop::arguments
