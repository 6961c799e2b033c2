#include "torch/arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace pop::arguments {

const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

namespace {

std::string shape_text(const int64_t* sizes, size_t count) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < count; ++i) out << (i ? ", " : "") << sizes[i];
  out << ']';
  return out.str();
}

/// Collects the tensors of one call. The first one's dtype and device are the others'.
class Checker {
 public:
  Checker(const char* operation, const Backend& backend) : operation_(operation), backend_(backend) {}

  [[noreturn]] void fail(const char* name, const std::string& was, const std::string& expected) const {
    arguments::fail(std::string("pop::") + operation_ + ": " + name + " is " + was + ", expected " + expected);
  }

  void require(bool condition, const char* name, int64_t was, const char* expected) const {
    if (!condition) fail(name, std::to_string(was), expected);
  }

  /// A size that the backend's vectors must divide.
  void vectors(const char* name, int64_t size) const {
    require(!backend_.vectors || size % 8 == 0, name, size, "a multiple of 8 on CUDA");
  }
  void head_size(const char* name, int64_t size) const {
    require(!backend_.vectors || size == 32 || size == 64 || size == 128 || size == 256, name, size,
            "32, 64, 128 or 256 on CUDA");
  }
  /// A size that CUDA's grids count in 32 bits.
  void countable(const char* name, int64_t size) const {
    require(!backend_.vectors || size < (int64_t{1} << 31), name, size, "less than 2^31 on CUDA");
  }

  float positive(const char* name, double value) const {
    if (!(value > 0 && std::isfinite(static_cast<float>(value))))
      fail(name, std::to_string(value), "a positive finite number");
    return static_cast<float>(value);
  }
  float eps(double value) const {
    if (!(value >= 0 && std::isfinite(static_cast<float>(value))))
      fail("eps", std::to_string(value), "a finite number of 0 or more");
    return static_cast<float>(value);
  }

  /// The dtype of everything that is multiplied, from the first tensor.
  void multiplied(const char* name, const Tensor& t) {
    if (!t.defined()) fail(name, "None", "a tensor");
    const ScalarType type = t.scalar_type();
    device_index_ = t.get_device_index();
    if ((type == ScalarType::Float && backend_.float32) || (type == ScalarType::BFloat16 && backend_.bfloat16) ||
        (type == ScalarType::Half && backend_.float16)) {
      scalar_ = type;
      return;
    }
    fail(name, dtype_name(type), std::string(backend_.float32 ? "float32 or bfloat16" : "bfloat16 or float16"));
  }
  ScalarType scalar() const { return scalar_; }
  DType dtype() const {
    return scalar_ == ScalarType::Float  ? DType::kFloat32
           : scalar_ == ScalarType::Half ? DType::kFloat16
                                         : DType::kBFloat16;
  }
  int32_t device_index() const { return device_index_; }
  DeviceType device() const { return backend_.device; }

  /// Checks dtype, device and shape (kAny matches any size), and that the last dimension is contiguous; with
  /// `contiguous`, that all are; with `vectors`, that the backend's vectors can read its rows.
  static constexpr int64_t kAny = -1;
  void tensor(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape,
              const char* shape_names, bool contiguous = false, bool vectors = true) const {
    if (!t.defined()) fail(name, "None", "a tensor");
    const auto sizes = t.sizes(), strides = t.strides();
    bool same = sizes.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = shape.begin()[i] == kAny || shape.begin()[i] == sizes[i];
    if (!same) fail(name, "of shape " + shape_text(sizes.data(), sizes.size()), shape_expected(shape, shape_names));
    if (t.scalar_type() != type) fail(name, dtype_name(t.scalar_type()), dtype_name(type));
    if (t.device().type() != backend_.device || t.get_device_index() != device_index_)
      fail(name, "on another device", "all tensors on one");
    if (contiguous ? !t.is_contiguous() : sizes[sizes.size() - 1] > 1 && strides[sizes.size() - 1] != 1) {
      fail(name, "laid out with strides " + shape_text(strides.data(), strides.size()),
           contiguous ? "contiguous memory" : "a contiguous last dimension");
    }
    if (vectors && (type == scalar_ || type == ScalarType::Float)) aligned(name, t);
  }

  /// That the backend's vectors can read the rows.
  void aligned(const char* name, const Tensor& t) const {
    constexpr int64_t kBytes = 16;
    if (!backend_.vectors || t.numel() == 0) return;
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    if (address % kBytes) fail(name, "at an address of 16 n + " + std::to_string(address % kBytes), "16 n on CUDA");
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t element = t.scalar_type() == ScalarType::Float ? 4 : 2;
    for (size_t i = 0; i + 1 < sizes.size(); ++i)
      if (sizes[i] > 1 && strides[i] * element % kBytes)
        fail(name, "laid out with strides " + shape_text(strides.data(), strides.size()),
             "rows that start every 16 n bytes on CUDA");
  }

  template <typename T>
  const T* optional(const char* name, const OptionalTensor& t, ScalarType type, std::initializer_list<int64_t> shape,
                    const char* shape_names) const {
    if (!t) return nullptr;
    tensor(name, *t, type, shape, shape_names, true);
    return static_cast<const T*>(t->const_data_ptr());
  }

  SlotMapping slots(const char* name, const Tensor& t, int64_t tokens) const {
    const bool is_int32 = t.defined() && t.scalar_type() == ScalarType::Int;
    if (t.defined() && !is_int32 && t.scalar_type() != ScalarType::Long)
      fail(name, dtype_name(t.scalar_type()), "int64 or int32");
    tensor(name, t, is_int32 ? ScalarType::Int : ScalarType::Long, {tokens}, "[T]", true);
    if (is_int32) return {.as_int64 = nullptr, .as_int32 = static_cast<const int32_t*>(t.const_data_ptr())};
    return {.as_int64 = static_cast<const int64_t*>(t.const_data_ptr())};
  }

  /// An uninitialised output; `because_of` is the argument that its size follows.
  Tensor empty(const char* because_of, std::initializer_list<int64_t> shape, ScalarType type) const {
    int64_t strides[4], stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape.begin()[i])) strides[i] = stride;
    AtenTensorHandle handle;
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    if (aoti_torch_empty_strided(shape.size(), shape.begin(), strides, dtype, static_cast<int32_t>(backend_.device),
                                 device_index_, &handle) != AOTI_TORCH_SUCCESS) {
      fail(because_of, "of a size that asks for an output of " + shape_text(shape.begin(), shape.size()),
           "one that fits in memory");
    }
    return Tensor(handle);
  }

  /// A cache [blocks, block_size, heads, head_size] (behind a layer dimension where first_dim is 1); heads or head_size
  /// may be kAny.
  PagedCache cache(const char* name, const Tensor& t, int64_t first_dim, std::initializer_list<int64_t> shape,
                   const char* shape_names) const {
    tensor(name, t, scalar_, shape, shape_names);
    const auto sizes = t.sizes(), strides = t.strides();
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (i > 0 || first_dim == 0)
        require(sizes[i] > 0 || i == size_t(first_dim), name, sizes[i], "no empty dimension but blocks");
      if (sizes[i] > 1 && strides[i] == 0) fail(name, "expanded (a stride is 0)", "memory of its own for each element");
    }
    const auto d = first_dim;
    return {t.data_ptr(), sizes[d],   sizes[d + 1],   sizes[d + 2],
            sizes[d + 3], strides[d], strides[d + 1], strides[d + 2]};
  }

 private:
  static std::string shape_expected(std::initializer_list<int64_t> shape, const char* names) {
    std::ostringstream out;
    out << names << " = [";
    const char* separator = "";
    for (int64_t size : shape) {
      out << separator;
      if (size == kAny)
        out << "any";
      else
        out << size;
      separator = ", ";
    }
    out << ']';
    return out.str();
  }

  const char* operation_;
  Backend backend_;
  ScalarType scalar_ = ScalarType::Float;
  int32_t device_index_ = -1;
};

constexpr int64_t kAny = Checker::kAny;

}  // namespace

void fail(const std::string& message) { throw std::runtime_error(message); }

Call<RmsNorm> rms_norm(const Backend& backend, const Tensor& x, const Tensor& weight, double eps,
                       const OptionalTensor& residual) {
  Checker check("rms_norm", backend);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, D]", false, false);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check.require(hidden > 0, "x's hidden size D", hidden, "1 or more");
  check.vectors("x's hidden size D", hidden);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  check.tensor("weight", weight, ScalarType::Float, {hidden}, "[D]", true);
  if (residual) check.tensor("residual", *residual, check.scalar(), {tokens, hidden}, "[T, D]");
  const float epsilon = check.eps(eps);
  Tensor y = check.empty("x", {tokens, hidden}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .hidden = hidden,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = static_cast<const float*>(weight.const_data_ptr()),
           .eps = epsilon,
           .residual = residual ? residual->const_data_ptr() : nullptr,
           .residual_stride = residual ? residual->stride(0) : 0,
           .y = y.mutable_data_ptr()},
          y};
}

Call<Linear> linear(const Backend& backend, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& residual, const std::optional<ScalarType>& out_dtype) {
  Checker check("linear", backend);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, K]", false, false);
  const int64_t tokens = x.size(0), in = x.size(1);
  check.vectors("x's size K", in);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  check.tensor("weight", weight, check.scalar(), {kAny, in}, "[N, K]");
  const int64_t out = weight.size(0);
  const void* bias_data = check.optional<void>("bias", bias, check.scalar(), {out}, "[N]");
  if (residual) check.tensor("residual", *residual, check.scalar(), {tokens, out}, "[T, N]", false, out % 8 == 0);
  const ScalarType type = out_dtype.value_or(check.scalar());
  if (type != check.scalar() && type != ScalarType::Float)
    check.fail("out_dtype", dtype_name(type), "float32 or x's dtype");
  Tensor y = check.empty("x", {tokens, out}, type);
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .in = in,
           .out = out,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = weight.const_data_ptr(),
           .weight_stride = weight.stride(0),
           .bias = bias_data,
           .residual = residual ? residual->const_data_ptr() : nullptr,
           .residual_stride = residual ? residual->stride(0) : 0,
           .y = y.mutable_data_ptr(),
           .y_is_float32 = type == ScalarType::Float},
          y};
}

Call<GatedLinear> gated_linear(const Backend& backend, const Tensor& x, const Tensor& weight,
                               const std::string& activation) {
  Checker check("gated_linear", backend);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, D]", false, false);
  const int64_t tokens = x.size(0), in = x.size(1);
  check.vectors("x's hidden size D", in);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  check.tensor("gate_up_weight", weight, check.scalar(), {kAny, in}, "[2 F, D]");
  check.require(weight.size(0) % 2 == 0, "gate_up_weight's number of rows", weight.size(0),
                "an even number, F of the gate and F of up");
  check.vectors("gate_up_weight's F", weight.size(0) / 2);
  if (activation != "silu" && activation != "gelu_tanh")
    check.fail("activation", '"' + activation + '"', "\"silu\" or \"gelu_tanh\"");
  const int64_t out = weight.size(0) / 2;
  Tensor y = check.empty("x", {tokens, out}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .in = in,
           .out = out,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = weight.const_data_ptr(),
           .weight_stride = weight.stride(0),
           .activation = activation == "silu" ? Activation::kSiLU : Activation::kGeluTanh,
           .y = y.mutable_data_ptr()},
          y};
}

Call<QkvProject> qkv_project(const Backend& backend, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps, const Tensor& cos,
                             const Tensor& sin, const Tensor& slot_mapping, const Tensor& key_cache,
                             const Tensor& value_cache) {
  Checker check("qkv_project", backend);
  check.multiplied("x", x);
  check.tensor("x", x, check.scalar(), {kAny, kAny}, "[T, D]", false, false);
  const int64_t tokens = x.size(0), in = x.size(1);
  check.vectors("x's hidden size D", in);
  check.aligned("x", x);
  check.countable("x's number of tokens T", tokens);
  const PagedCache keys =
      check.cache("key_cache", key_cache, 0, {kAny, kAny, kAny, kAny}, "[blocks, block_size, Hkv, E]");
  const PagedCache values =
      check.cache("value_cache", value_cache, 0, {keys.blocks, keys.block_size, keys.heads, keys.head_size},
                  "key_cache's [blocks, block_size, Hkv, E]");
  check.require(keys.head_size % 2 == 0, "key_cache's head size E", keys.head_size,
                "an even number (RoPE turns pairs)");
  check.head_size("key_cache's head size E", keys.head_size);
  check.tensor("weight", weight, check.scalar(), {kAny, in}, "[(Hq + 2 Hkv) E, D]", true);
  const int64_t rows = weight.size(0), query_heads = rows / keys.head_size - 2 * keys.heads;
  check.require(rows % keys.head_size == 0 && query_heads > 0, "weight's number of rows", rows,
                "(Hq + 2 Hkv) E with Hq of 1 or more");
  const void* bias_data = check.optional<void>("bias", bias, check.scalar(), {rows}, "[(Hq + 2 Hkv) E]");
  const float* q_gain = check.optional<float>("q_norm", q_norm, ScalarType::Float, {keys.head_size}, "[E]");
  const float* k_gain = check.optional<float>("k_norm", k_norm, ScalarType::Float, {keys.head_size}, "[E]");
  check.tensor("cos", cos, ScalarType::Float, {tokens, keys.head_size / 2}, "[T, E / 2]", true);
  check.tensor("sin", sin, ScalarType::Float, {tokens, keys.head_size / 2}, "[T, E / 2]", true);
  const SlotMapping slots = check.slots("slot_mapping", slot_mapping, tokens);
  const float epsilon = check.eps(eps);
  Tensor query = check.empty("x", {tokens, query_heads, keys.head_size}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .in = in,
           .query_heads = query_heads,
           .x = x.const_data_ptr(),
           .x_stride = x.stride(0),
           .weight = weight.const_data_ptr(),
           .bias = bias_data,
           .q_norm = q_gain,
           .k_norm = k_gain,
           .eps = epsilon,
           .cos = static_cast<const float*>(cos.const_data_ptr()),
           .sin = static_cast<const float*>(sin.const_data_ptr()),
           .slot_mapping = slots,
           .key_cache = keys,
           .value_cache = values,
           .query = query.mutable_data_ptr()},
          query};
}

Call<Attention> attention(const Backend& backend, const Tensor& query, const Tensor& key_cache,
                          const Tensor& value_cache, const Tensor& block_tables, const Tensor& cu_seqlens_q,
                          const Tensor& seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale,
                          int64_t window_size, const OptionalTensor& spans) {
  Checker check("attention", backend);
  check.multiplied("query", query);
  check.tensor("query", query, check.scalar(), {kAny, kAny, kAny}, "[T, Hq, E]");
  const int64_t tokens = query.size(0), query_heads = query.size(1), head_size = query.size(2);
  check.require(head_size > 0, "query's head size E", head_size, "1 or more");
  check.head_size("query's head size E", head_size);
  check.countable("query's number of tokens T", tokens);
  const PagedCache keys =
      check.cache("key_cache", key_cache, 0, {kAny, kAny, kAny, head_size}, "[blocks, block_size, Hkv, E]");
  const PagedCache values =
      check.cache("value_cache", value_cache, 0, {keys.blocks, keys.block_size, keys.heads, head_size},
                  "key_cache's [blocks, block_size, Hkv, E]");
  check.require(query_heads > 0 && query_heads % keys.heads == 0, "query's number of heads Hq", query_heads,
                "a multiple of key_cache's number of heads Hkv");
  check.tensor("seqlens_k", seqlens_k, ScalarType::Int, {kAny}, "[S]", true);
  const int64_t sequences = seqlens_k.size(0);
  check.tensor("cu_seqlens_q", cu_seqlens_q, ScalarType::Int, {sequences + 1}, "[S + 1]", true);
  check.tensor("block_tables", block_tables, ScalarType::Int, {sequences, kAny}, "[S, blocks of a sequence]");
  check.require(max_seqlen_q >= 0, "max_seqlen_q", max_seqlen_q, "0 or more");
  check.require(max_seqlen_k >= 0, "max_seqlen_k", max_seqlen_k, "0 or more");
  check.require(max_seqlen_k <= block_tables.size(1) * keys.block_size || sequences == 0, "max_seqlen_k", max_seqlen_k,
                "at most block_tables' columns times block_size");
  check.require(window_size >= 0, "window_size", window_size, "0 (none) or more");
  const float factor = check.positive("softmax_scale", softmax_scale);
  const int32_t* span_data = nullptr;
  if (spans) {
    check.tensor("spans", *spans, ScalarType::Int, {sequences, kAny}, "[S, tokens]");
    check.require(spans->size(1) >= max_seqlen_k, "spans' number of columns", spans->size(1), "max_seqlen_k or more");
    span_data = static_cast<const int32_t*>(spans->const_data_ptr());
  }
  Tensor out = check.empty("query", {tokens, query_heads, head_size}, check.scalar());
  return {{.dtype = check.dtype(),
           .tokens = tokens,
           .sequences = sequences,
           .query_heads = query_heads,
           .query = query.const_data_ptr(),
           .query_token_stride = query.stride(0),
           .query_head_stride = query.stride(1),
           .key_cache = keys,
           .value_cache = values,
           .block_tables = static_cast<const int32_t*>(block_tables.const_data_ptr()),
           .block_table_stride = block_tables.stride(0),
           .cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()),
           .seqlens_k = static_cast<const int32_t*>(seqlens_k.const_data_ptr()),
           .max_seqlen_q = max_seqlen_q,
           .max_seqlen_k = max_seqlen_k,
           .softmax_scale = factor,
           .window_size = window_size,
           .spans = span_data,
           .span_stride = spans ? spans->stride(0) : 0,
           .out = out.mutable_data_ptr()},
          out};
}

ProjectKv project_kv(const Backend& backend, const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& k_norm, double eps, const Tensor& cos, const Tensor& sin,
                     const Tensor& rope_index, const Tensor& slot_mapping, const Tensor& key_caches,
                     const Tensor& value_caches) {
  Checker check("project_kv", backend);
  check.multiplied("hidden", hidden);
  check.tensor("hidden", hidden, check.scalar(), {kAny, kAny}, "[T, D]", false, false);
  const int64_t tokens = hidden.size(0), in = hidden.size(1);
  check.require(in > 0, "hidden's size D", in, "1 or more");
  check.vectors("hidden's size D", in);
  check.aligned("hidden", hidden);
  check.countable("hidden's number of tokens T", tokens);
  check.tensor("weight", weight, check.scalar(), {kAny, kAny, in}, "[R, 2 Hkv E, D]", true);
  const int64_t layers = weight.size(0), rows = weight.size(1);
  const PagedCache keys =
      check.cache("key_caches", key_caches, 1, {layers, kAny, kAny, kAny, kAny}, "[R, blocks, block_size, Hkv, E]");
  const PagedCache values =
      check.cache("value_caches", value_caches, 1, {layers, keys.blocks, keys.block_size, keys.heads, keys.head_size},
                  "key_caches' [R, blocks, block_size, Hkv, E]");
  check.require(keys.head_size % 2 == 0, "key_caches' head size E", keys.head_size,
                "an even number (RoPE turns pairs)");
  check.head_size("key_caches' head size E", keys.head_size);
  check.require(rows == 2 * keys.heads * keys.head_size, "weight's rows of a layer", rows, "2 Hkv E of key_caches");
  const void* bias_data = check.optional<void>("bias", bias, check.scalar(), {layers, rows}, "[R, 2 Hkv E]");
  const float* k_gain = check.optional<float>("k_norm", k_norm, ScalarType::Float, {layers, keys.head_size}, "[R, E]");
  check.tensor("cos", cos, ScalarType::Float, {kAny, tokens, keys.head_size / 2}, "[ropes, T, E / 2]", true);
  check.tensor("sin", sin, ScalarType::Float, {cos.size(0), tokens, keys.head_size / 2}, "cos' [ropes, T, E / 2]",
               true);
  check.require(cos.size(0) > 0, "cos' number of ropes", cos.size(0), "1 or more");
  check.tensor("rope_index", rope_index, ScalarType::Int, {layers}, "[R]", true);
  const SlotMapping slots = check.slots("slot_mapping", slot_mapping, tokens);
  return {.dtype = check.dtype(),
          .tokens = tokens,
          .in = in,
          .layers = layers,
          .hidden = hidden.const_data_ptr(),
          .hidden_stride = hidden.stride(0),
          .weight = weight.const_data_ptr(),
          .bias = bias_data,
          .k_norm = k_gain,
          .eps = check.eps(eps),
          .cos = static_cast<const float*>(cos.const_data_ptr()),
          .sin = static_cast<const float*>(sin.const_data_ptr()),
          .rope_index = static_cast<const int32_t*>(rope_index.const_data_ptr()),
          .slot_mapping = slots,
          .key_caches = keys,
          .value_caches = values,
          .key_layer_stride = key_caches.stride(0),
          .value_layer_stride = value_caches.stride(0)};
}

}  // namespace pop::arguments
