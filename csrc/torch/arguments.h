#pragma once

// From torch's tensors to the structs of csrc/pop: every property a kernel relies on and that needs no look into device
// memory is checked here, for all devices alike. A violation throws a message with the operation, the argument, what it
// was and what was expected.

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "pop/attention.h"
#include "pop/gated_linear.h"
#include "pop/linear.h"
#include "pop/project_kv.h"
#include "pop/qkv_project.h"
#include "pop/rms_norm.h"

namespace pop::arguments {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// What a device's kernels take: tensors of `device`, multiplied in the dtypes that are true. CUDA's move 16 bytes at a
/// time: rows start at such addresses, hidden sizes are multiples of 8, and heads have 32, 64, 128 or 256.
struct Backend {
  DeviceType device;
  bool float32, bfloat16, float16;
  bool vectors;
};
inline constexpr Backend kCpu{DeviceType::CPU, true, true, false, false};
inline constexpr Backend kCuda{DeviceType::CUDA, false, true, true, true};

/// Arguments ready for the kernels, and the output they write to.
template <typename Struct>
struct Call {
  Struct arguments;
  Tensor output;
};

Call<RmsNorm> rms_norm(const Backend&, const Tensor& x, const Tensor& weight, double eps,
                       const OptionalTensor& residual);

Call<Linear> linear(const Backend&, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const std::optional<ScalarType>& out_dtype);

Call<GatedLinear> gated_linear(const Backend&, const Tensor& x, const Tensor& gate_up_weight,
                               const std::string& activation);

Call<QkvProject> qkv_project(const Backend&, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps, const Tensor& cos,
                             const Tensor& sin, const Tensor& slot_mapping, const Tensor& key_cache,
                             const Tensor& value_cache);

Call<Attention> attention(const Backend&, const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                          const Tensor& block_tables, const Tensor& cu_seqlens_q, const Tensor& seqlens_k,
                          int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, int64_t window_size,
                          const OptionalTensor& spans);

ProjectKv project_kv(const Backend&, const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& k_norm, double eps, const Tensor& cos, const Tensor& sin,
                     const Tensor& rope_index, const Tensor& slot_mapping, const Tensor& key_caches,
                     const Tensor& value_caches);

/// As torch and numpy spell it.
const char* dtype_name(ScalarType);

[[noreturn]] void fail(const std::string& message);

}  // namespace pop::arguments
