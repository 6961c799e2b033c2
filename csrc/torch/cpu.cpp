// The schemas of torch.ops.pop, and the operations on CPU tensors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "torch/arguments.h"
#include "torch/indices.h"

namespace pop {
namespace {

using arguments::kCpu;
using arguments::OptionalTensor;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int n, void (*body)(int, void*), void* context) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i), context);
            });
          }};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& residual) {
  auto [p, y] = arguments::rms_norm(kCpu, x, weight, eps, residual);
  cpu::rms_norm(p, torch_threads());
  return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
              const std::optional<ScalarType>& out_dtype) {
  auto [p, y] = arguments::linear(kCpu, x, weight, bias, residual, out_dtype);
  cpu::linear(p, torch_threads());
  return y;
}

Tensor gated_linear(const Tensor& x, const Tensor& gate_up_weight, const std::string& activation) {
  auto [p, y] = arguments::gated_linear(kCpu, x, gate_up_weight, activation);
  cpu::gated_linear(p, torch_threads());
  return y;
}

Tensor qkv_project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& q_norm,
                   const OptionalTensor& k_norm, double eps, const Tensor& cos, const Tensor& sin,
                   const Tensor& slot_mapping, const Tensor& key_cache, const Tensor& value_cache) {
  auto [p, query] = arguments::qkv_project(kCpu, x, weight, bias, q_norm, k_norm, eps, cos, sin, slot_mapping,
                                           key_cache, value_cache);
  indices::check_slots("qkv_project", p.slot_mapping, p.tokens, p.key_cache);
  cpu::qkv_project(p, torch_threads());
  return query;
}

Tensor attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                 const Tensor& cu_seqlens_q, const Tensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                 double softmax_scale, int64_t window_size, const OptionalTensor& spans) {
  auto [p, out] = arguments::attention(kCpu, query, key_cache, value_cache, block_tables, cu_seqlens_q, seqlens_k,
                                       max_seqlen_q, max_seqlen_k, softmax_scale, window_size, spans);
  indices::check_sequences(p);
  cpu::attention(p, torch_threads());
  const int64_t token_bytes = p.query_heads * p.key_cache.head_size * out.element_size();
  for (int64_t s = 0; s < p.sequences; ++s)
    if (p.seqlens_k[s] == 0)  // padding
      std::memset(static_cast<char*>(p.out) + p.cu_seqlens_q[s] * token_bytes, 0,
                  (p.cu_seqlens_q[s + 1] - p.cu_seqlens_q[s]) * token_bytes);
  return out;
}

void project_kv(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& k_norm,
                double eps, const Tensor& cos, const Tensor& sin, const Tensor& rope_index, const Tensor& slot_mapping,
                const Tensor& key_caches, const Tensor& value_caches) {
  const ProjectKv p = arguments::project_kv(kCpu, hidden, weight, bias, k_norm, eps, cos, sin, rope_index, slot_mapping,
                                            key_caches, value_caches);
  indices::check_slots("project_kv", p.slot_mapping, p.tokens, p.key_caches);
  indices::check_ropes(p.rope_index, p.layers, cos.size(0));
  cpu::project_kv(p, torch_threads());
}

}  // namespace
}  // namespace pop

STABLE_TORCH_LIBRARY(pop, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual=None) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, *, ScalarType? out_dtype=None) -> "
      "Tensor");
  m.def("gated_linear(Tensor x, Tensor gate_up_weight, str activation) -> Tensor");
  m.def(
      "qkv_project(Tensor x, Tensor weight, Tensor? bias, Tensor? q_norm, Tensor? k_norm, float eps, Tensor cos, "
      "Tensor sin, Tensor slot_mapping, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache) -> Tensor");
  m.def(
      "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor cu_seqlens_q, Tensor "
      "seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, float softmax_scale, int window_size=0, Tensor? spans=None) -> Tensor");
  m.def(
      "project_kv(Tensor hidden, Tensor weight, Tensor? bias, Tensor? k_norm, float eps, Tensor cos, Tensor sin, "
      "Tensor rope_index, "
      "Tensor slot_mapping, Tensor(a!) key_caches, Tensor(b!) value_caches) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pop, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&pop::rms_norm));
  m.impl("linear", TORCH_BOX(&pop::linear));
  m.impl("gated_linear", TORCH_BOX(&pop::gated_linear));
  m.impl("qkv_project", TORCH_BOX(&pop::qkv_project));
  m.impl("attention", TORCH_BOX(&pop::attention));
  m.impl("project_kv", TORCH_BOX(&pop::project_kv));
}
