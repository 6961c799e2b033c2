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

void check_slots(const char* operation, const int64_t* slots, int64_t tokens, const PagedCache& cache) {
  for (int64_t t = 0; t < tokens; ++t)
    require(slots[t] >= -1 && slots[t] < cache.blocks * cache.block_size, "pop::", operation, ": slots[", t, "] is ",
            slots[t],
            ", expected -1 (no write) or a slot below blocks * block_size = ", cache.blocks * cache.block_size);
}

void check_sequences(const Attention& a) {
  require(a.query_starts[0] == 0, "pop::attention: query_starts[0] is ", a.query_starts[0], ", expected 0");
  require(a.query_starts[a.sequences] == a.tokens, "pop::attention: query_starts[", a.sequences, "] is ",
          a.query_starts[a.sequences], ", expected query's number of tokens ", a.tokens);
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t queries = int64_t{a.query_starts[s + 1]} - a.query_starts[s], context = a.context_lens[s];
    require(queries >= 0 && queries <= a.max_query_len, "pop::attention: query_starts give sequence ", s, " ", queries,
            " queries, expected 0 to max_query_len = ", a.max_query_len);
    require(context >= queries && context <= a.max_context_len, "pop::attention: context_lens[", s, "] is ", context,
            ", expected at least its ", queries, " queries and at most max_context_len = ", a.max_context_len);
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
                   const OptionalTensor& k_norm, double eps, const Tensor& cos, const Tensor& sin, const Tensor& slots,
                   const Tensor& key_cache, const Tensor& value_cache) {
  auto [p, query] =
      arguments::qkv_project(kCpu, x, weight, bias, q_norm, k_norm, eps, cos, sin, slots, key_cache, value_cache);
  check_slots("qkv_project", p.slots, p.tokens, p.key_cache);
  cpu::qkv_project(p, torch_threads());
  return query;
}

Tensor attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                 const Tensor& query_starts, const Tensor& context_lens, int64_t max_query_len, int64_t max_context_len,
                 double scale, int64_t window, const OptionalTensor& spans) {
  auto [p, out] = arguments::attention(kCpu, query, key_cache, value_cache, block_tables, query_starts, context_lens,
                                       max_query_len, max_context_len, scale, window, spans);
  check_sequences(p);
  cpu::attention(p, torch_threads());
  return out;
}

void project_kv(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& k_norm,
                double eps, const Tensor& cos, const Tensor& sin, const Tensor& rope_index, const Tensor& slots,
                const Tensor& key_caches, const Tensor& value_caches) {
  const ProjectKv p = arguments::project_kv(kCpu, hidden, weight, bias, k_norm, eps, cos, sin, rope_index, slots,
                                            key_caches, value_caches);
  check_slots("project_kv", p.slots, p.tokens, p.key_caches);
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
      "Tensor sin, Tensor slots, "
      "Tensor(a!) key_cache, Tensor(b!) value_cache) -> Tensor");
  m.def(
      "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor query_starts, Tensor "
      "context_lens, "
      "int max_query_len, int max_context_len, float scale, int window=0, Tensor? spans=None) -> Tensor");
  m.def(
      "project_kv(Tensor hidden, Tensor weight, Tensor? bias, Tensor? k_norm, float eps, Tensor cos, Tensor sin, "
      "Tensor rope_index, "
      "Tensor slots, Tensor(a!) key_caches, Tensor(b!) value_caches) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pop, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&pop::rms_norm));
  m.impl("linear", TORCH_BOX(&pop::linear));
  m.impl("gated_linear", TORCH_BOX(&pop::gated_linear));
  m.impl("qkv_project", TORCH_BOX(&pop::qkv_project));
  m.impl("attention", TORCH_BOX(&pop::attention));
  m.impl("project_kv", TORCH_BOX(&pop::project_kv));
}
