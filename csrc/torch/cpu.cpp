// The schemas of torch.ops.pop, and the operations on CPU tensors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <sstream>

#include "torch/arguments.h"

namespace pop {
namespace {

using arguments::fail;
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

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream out;
  (out << ... << parts);
  fail(out.str());
}

// What lies in the index tensors can be looked at here, without waiting for a device.

void check_slots(const char* operation, const int64_t* slot_mapping, int64_t tokens, const PagedCache& cache) {
  for (int64_t t = 0; t < tokens; ++t)
    require(slot_mapping[t] >= -1 && slot_mapping[t] < cache.blocks * cache.block_size, "pop::", operation,
            ": slot_mapping[", t, "] is ", slot_mapping[t],
            ", expected -1 (no write) or a slot below blocks * block_size = ", cache.blocks * cache.block_size);
}

void check_sequences(const Attention& a) {
  require(a.cu_seqlens_q[0] == 0, "pop::attention: cu_seqlens_q[0] is ", a.cu_seqlens_q[0], ", expected 0");
  require(a.cu_seqlens_q[a.sequences] == a.tokens, "pop::attention: cu_seqlens_q[", a.sequences, "] is ",
          a.cu_seqlens_q[a.sequences], ", expected query's number of tokens ", a.tokens);
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t queries = int64_t{a.cu_seqlens_q[s + 1]} - a.cu_seqlens_q[s], context = a.seqlens_k[s];
    require(queries >= 0 && queries <= a.max_seqlen_q, "pop::attention: cu_seqlens_q give sequence ", s, " ", queries,
            " queries, expected 0 to max_seqlen_q = ", a.max_seqlen_q);
    require(context >= queries && context <= a.max_seqlen_k, "pop::attention: seqlens_k[", s, "] is ", context,
            ", expected at least its ", queries, " queries and at most max_seqlen_k = ", a.max_seqlen_k);
    for (int64_t b = 0; b * a.key_cache.block_size < context; ++b) {
      const int32_t block = a.block_tables[s * a.block_table_stride + b];
      require(block >= 0 && block < a.key_cache.blocks, "pop::attention: block_tables[", s, ", ", b, "] is ", block,
              ", expected a block of key_cache, 0 to ", a.key_cache.blocks - 1);
    }
  }
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
  check_slots("qkv_project", p.slot_mapping, p.tokens, p.key_cache);
  cpu::qkv_project(p, torch_threads());
  return query;
}

Tensor attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                 const Tensor& cu_seqlens_q, const Tensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                 double softmax_scale, int64_t window_size, const OptionalTensor& spans) {
  auto [p, out] = arguments::attention(kCpu, query, key_cache, value_cache, block_tables, cu_seqlens_q, seqlens_k,
                                       max_seqlen_q, max_seqlen_k, softmax_scale, window_size, spans);
  check_sequences(p);
  cpu::attention(p, torch_threads());
  return out;
}

void project_kv(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& k_norm,
                double eps, const Tensor& cos, const Tensor& sin, const Tensor& rope_index, const Tensor& slot_mapping,
                const Tensor& key_caches, const Tensor& value_caches) {
  const ProjectKv p = arguments::project_kv(kCpu, hidden, weight, bias, k_norm, eps, cos, sin, rope_index, slot_mapping,
                                            key_caches, value_caches);
  check_slots("project_kv", p.slot_mapping, p.tokens, p.key_caches);
  for (int64_t l = 0; l < p.layers; ++l)
    require(p.rope_index[l] >= 0 && p.rope_index[l] < cos.size(0), "pop::project_kv: rope_index[", l, "] is ",
            p.rope_index[l], ", expected 0 to cos' number of ropes less one, ", cos.size(0) - 1);
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
