// The operations on CUDA tensors: libpop_cuda.so, which Python loads only where there is a CUDA runtime.
//
// On the PTX emulator (tools/ptx-emulator) tensors are the CPU's: device memory is host memory.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "pop/device.h"
#include "torch/arguments.h"
#include "torch/decode_arguments.h"
#include "torch/indices.h"

extern "C" {
// torch's, where it is built with CUDA.
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
// The PTX emulator's, where that is the runtime: its mark, and how memory that kernels may use is made known to it.
__attribute__((weak)) void* ptx_emulator_load(const char* text, size_t bytes);
__attribute__((weak)) int ptx_emulator_register(void* base, size_t bytes, int written, const char* name);
__attribute__((weak)) int ptx_emulator_unregister(const void* base);
}

namespace pop {
namespace {

using arguments::OptionalTensor;
using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool emulated() { return ptx_emulator_load != nullptr; }

Stream emulated_stream = nullptr;
std::vector<Tensor> emulated_workspaces;  // of the calls on that stream, which may be captured and run again later

const arguments::Backend& backend() {
  static const arguments::Backend software{DeviceType::CPU, false, true, true, true};
  return emulated() ? software : arguments::kCuda;
}

/// Makes the tensors' device current, as long as it lives, and knows its stream. The first on a device loads all
/// kernels.
class Current {
 public:
  explicit Current(const Tensor& t) {
    if (emulated()) {
      stream_ = emulated_stream;
      cuda::load_kernels();
      return;
    }
    guard_.emplace(t.get_device_index());
    if (!aoti_torch_get_current_cuda_stream)
      arguments::fail("pop: this torch has no CUDA (" __FILE__
                      " was loaded without it); install a CUDA build of torch");
    void* stream;
    if (aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
      arguments::fail("pop: torch does not tell the current CUDA stream");
    stream_ = static_cast<Stream>(stream);
    cuda::load_kernels();
  }

  Stream stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  Stream stream_ = nullptr;
};

/// An output or workspace that a kernel writes first. On the PTX emulator it is NaN until then.
void introduce(const Tensor& t, const char* name) {
  if (!emulated() || t.numel() == 0) return;
  const size_t bytes = t.numel() * t.element_size();
  std::memset(t.mutable_data_ptr(), 0xff, bytes);
  if (ptx_emulator_register) ptx_emulator_register(t.mutable_data_ptr(), bytes, 0, name);
}

void forget(const Tensor& t) {
  if (ptx_emulator_unregister) ptx_emulator_unregister(t.const_data_ptr());
}

/// Device memory for the time of one call, from torch's allocator.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    if (bytes == 0) return;
    tensor_ = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    introduce(*tensor_, "workspace");
  }
  ~Workspace() {
    if (!tensor_ || !emulated()) return;
    if (emulated_stream)
      emulated_workspaces.push_back(*tensor_);
    else
      forget(*tensor_);
  }
  void* data() const { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

/// Whether to look at index tensors before a call. A stream that is being captured must not be waited for.
bool check_indices(const Current& current) {
  const char* wanted = std::getenv("POP_CHECK_INDICES");
  return wanted && std::strcmp(wanted, "1") == 0 && !cuda::capturing(current.stream());
}

template <typename T>
std::vector<T> read(const char* operation, const T* from, int64_t count, const Current& current) {
  std::vector<T> values(count);
  cuda::read(operation, values.data(), from, count * sizeof(T), current.stream());
  return values;
}

void check_slots(const char* operation, const SlotMapping& slots, int64_t tokens, const PagedCache& cache,
                 const Current& current) {
  if (!check_indices(current)) return;
  if (slots.as_int32)
    indices::check_slots(operation, {nullptr, read(operation, slots.as_int32, tokens, current).data()}, tokens, cache);
  else
    indices::check_slots(operation, {read(operation, slots.as_int64, tokens, current).data()}, tokens, cache);
}

void check_sequences(Attention a, const Current& current) {
  if (!check_indices(current)) return;
  const auto starts = read("attention", a.cu_seqlens_q, a.sequences + 1, current);
  const auto lengths = read("attention", a.seqlens_k, a.sequences, current);
  const int64_t columns = (a.max_seqlen_k + a.key_cache.block_size - 1) / a.key_cache.block_size;
  std::vector<int32_t> tables;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const auto row = read("attention", a.block_tables + s * a.block_table_stride, columns, current);
    tables.insert(tables.end(), row.begin(), row.end());
  }
  a.cu_seqlens_q = starts.data(), a.seqlens_k = lengths.data();
  a.block_tables = tables.data(), a.block_table_stride = columns;
  indices::check_sequences(a);
}

/// Runs a function for a caller in C: its result, or -1 and the error's message, cut to `size` bytes.
template <typename F>
int guarded(char* message, size_t size, F&& function) {
  try {
    return function();
  } catch (const std::exception& error) {
    if (size) message[std::string(error.what()).copy(message, size - 1)] = 0;
    return -1;
  }
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, const OptionalTensor& residual) {
  auto [p, y] = arguments::rms_norm(backend(), x, weight, eps, residual);
  const Current current(x);
  introduce(y, "y");
  cuda::rms_norm(p, current.stream());
  return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
              const std::optional<ScalarType>& out_dtype) {
  auto [p, y] = arguments::linear(backend(), x, weight, bias, residual, out_dtype);
  const Current current(x);
  introduce(y, "y");
  const Workspace workspace(x, cuda::linear_workspace(p));
  cuda::linear(p, workspace.data(), current.stream());
  return y;
}

Tensor gated_linear(const Tensor& x, const Tensor& gate_up_weight, const std::string& activation) {
  auto [p, y] = arguments::gated_linear(backend(), x, gate_up_weight, activation);
  const Current current(x);
  introduce(y, "y");
  cuda::gated_linear(p, current.stream());
  return y;
}

Tensor qkv_project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& q_norm,
                   const OptionalTensor& k_norm, double eps, const Tensor& cos, const Tensor& sin,
                   const Tensor& slot_mapping, const Tensor& key_cache, const Tensor& value_cache) {
  auto [p, query] = arguments::qkv_project(backend(), x, weight, bias, q_norm, k_norm, eps, cos, sin, slot_mapping,
                                           key_cache, value_cache);
  const Current current(x);
  check_slots("qkv_project", p.slot_mapping, p.tokens, p.key_cache, current);
  introduce(query, "query");
  cuda::qkv_project(p, current.stream());
  return query;
}

Tensor attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                 const Tensor& cu_seqlens_q, const Tensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                 double softmax_scale, int64_t window_size, const OptionalTensor& spans) {
  auto [p, out] = arguments::attention(backend(), query, key_cache, value_cache, block_tables, cu_seqlens_q, seqlens_k,
                                       max_seqlen_q, max_seqlen_k, softmax_scale, window_size, spans);
  const Current current(query);
  check_sequences(p, current);
  introduce(out, "out");
  const Workspace workspace(query, cuda::attention_workspace(p));
  cuda::attention(p, workspace.data(), current.stream());
  return out;
}

void project_kv(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& k_norm,
                double eps, const Tensor& cos, const Tensor& sin, const Tensor& rope_index, const Tensor& slot_mapping,
                const Tensor& key_caches, const Tensor& value_caches) {
  const ProjectKv p = arguments::project_kv(backend(), hidden, weight, bias, k_norm, eps, cos, sin, rope_index,
                                            slot_mapping, key_caches, value_caches);
  const Current current(hidden);
  check_slots("project_kv", p.slot_mapping, p.tokens, p.key_caches, current);
  if (check_indices(current))
    indices::check_ropes(read("project_kv", p.rope_index, p.layers, current).data(), p.layers, cos.size(0));
  const Workspace workspace(hidden, cuda::project_kv_workspace(p));
  cuda::project_kv(p, workspace.data(), current.stream());
}

Tensor embedding(const Tensor& token_ids, const Tensor& weight, double scale) {
  auto [p, y] = arguments::embedding(backend(), token_ids, weight, scale);
  const Current current(token_ids);
  introduce(y, "y");
  cuda::embedding(p, current.stream());
  return y;
}

Tensor rope_gather(const Tensor& cos_table, const Tensor& sin_table, const Tensor& positions,
                   const OptionalTensor& axes) {
  auto [p, out] = arguments::rope_gather(backend(), cos_table, sin_table, positions, axes);
  const Current current(cos_table);
  introduce(out, "out");
  cuda::rope_gather(p, current.stream());
  return out;
}

void decode_advance(const Tensor& block_tables, int64_t block_size, const Tensor& shifts, const Tensor& seqlens_k,
                    const Tensor& positions, const Tensor& slot_mapping, const OptionalTensor& step) {
  const DecodeAdvance p =
      arguments::decode_advance(backend(), block_tables, block_size, shifts, seqlens_k, positions, slot_mapping, step);
  const Current current(block_tables);
  cuda::decode_advance(p, current.stream());
}

void sample(const Tensor& logits, const OptionalTensor& settings, const OptionalTensor& seen,
            const OptionalTensor& uniforms, const OptionalTensor& step, const Tensor& tokens) {
  const Sample p = arguments::sample(backend(), logits, settings, seen, uniforms, step, tokens);
  const Current current(logits);
  cuda::sample(p, current.stream());
}

}  // namespace
}  // namespace pop

/// The stream of every later call on the PTX emulator; null is the default one. Workspaces of calls on another
/// stream live until this is called again.
extern "C" __attribute__((visibility("default"))) void pop_cuda_set_emulated_stream(void* stream) {
  for (const auto& t : pop::emulated_workspaces) pop::forget(t);
  pop::emulated_workspaces.clear();
  pop::emulated_stream = static_cast<pop::Stream>(stream);
}

// For pop_ext.ops: see pop/device.h. Both return -1 and a message where it fails.

extern "C" __attribute__((visibility("default"))) int pop_cuda_load_kernels(char* message, size_t size) {
  return pop::guarded(message, size, [] { return pop::cuda::load_kernels(); });
}

extern "C" __attribute__((visibility("default"))) int pop_cuda_image(int* sm, int* ptx, char* message, size_t size) {
  return pop::guarded(message, size, [&] {
    const pop::cuda::Image image = pop::cuda::loaded_image();
    *sm = image.sm, *ptx = image.ptx;
    return 0;
  });
}

STABLE_TORCH_LIBRARY_IMPL(pop, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&pop::rms_norm));
  m.impl("linear", TORCH_BOX(&pop::linear));
  m.impl("gated_linear", TORCH_BOX(&pop::gated_linear));
  m.impl("qkv_project", TORCH_BOX(&pop::qkv_project));
  m.impl("attention", TORCH_BOX(&pop::attention));
  m.impl("project_kv", TORCH_BOX(&pop::project_kv));
  m.impl("embedding", TORCH_BOX(&pop::embedding));
  m.impl("rope_gather", TORCH_BOX(&pop::rope_gather));
  m.impl("decode_advance", TORCH_BOX(&pop::decode_advance));
  m.impl("sample", TORCH_BOX(&pop::sample));
}
