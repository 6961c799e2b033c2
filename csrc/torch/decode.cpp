// The decode step's operations: their schemas, and the operations on CPU tensors.

#include <torch/csrc/stable/library.h>

#include <sstream>

#include "torch/decode_arguments.h"

namespace pop {
namespace {

using arguments::kCpu;
using arguments::OptionalTensor;
using torch::stable::Tensor;

Tensor embedding(const Tensor& token_ids, const Tensor& weight, double scale) {
  auto [p, y] = arguments::embedding(kCpu, token_ids, weight, scale);
  cpu::embedding(p);
  return y;
}

Tensor rope_gather(const Tensor& cos_table, const Tensor& sin_table, const Tensor& positions,
                   const OptionalTensor& axes) {
  auto [p, out] = arguments::rope_gather(kCpu, cos_table, sin_table, positions, axes);
  for (int64_t i = 0; p.axes && i < p.half; ++i) {
    if (p.axes[i] >= 0 && p.axes[i] < p.num_axes) continue;
    std::ostringstream message;
    message << "pop::rope_gather: axes[" << i << "] is " << p.axes[i] << ", expected 0 to positions' number of axes "
            << "less one, " << p.num_axes - 1;
    arguments::fail(message.str());
  }
  cpu::rope_gather(p);
  return out;
}

void decode_advance(const Tensor& block_tables, int64_t block_size, const Tensor& shifts, const Tensor& seqlens_k,
                    const Tensor& positions, const Tensor& slot_mapping, const OptionalTensor& step) {
  cpu::decode_advance(
      arguments::decode_advance(kCpu, block_tables, block_size, shifts, seqlens_k, positions, slot_mapping, step));
}

void sample(const Tensor& logits, const OptionalTensor& settings, const OptionalTensor& seen,
            const OptionalTensor& uniforms, const OptionalTensor& step, const Tensor& tokens) {
  cpu::sample(arguments::sample(kCpu, logits, settings, seen, uniforms, step, tokens));
}

}  // namespace
}  // namespace pop

STABLE_TORCH_LIBRARY_FRAGMENT(pop, m) {
  m.def("embedding(Tensor token_ids, Tensor weight, float scale=1.0) -> Tensor");
  m.def("rope_gather(Tensor cos_table, Tensor sin_table, Tensor positions, Tensor? axes=None) -> Tensor");
  m.def(
      "decode_advance(Tensor block_tables, int block_size, Tensor shifts, Tensor(a!) seqlens_k, Tensor(b!) positions, "
      "Tensor(c!) slot_mapping, Tensor(d!)? step=None) -> ()");
  m.def(
      "sample(Tensor logits, Tensor? settings, Tensor(a!)? seen, Tensor? uniforms, Tensor? step, Tensor(b!) tokens) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pop, CPU, m) {
  m.impl("embedding", TORCH_BOX(&pop::embedding));
  m.impl("rope_gather", TORCH_BOX(&pop::rope_gather));
  m.impl("decode_advance", TORCH_BOX(&pop::decode_advance));
  m.impl("sample", TORCH_BOX(&pop::sample));
}
