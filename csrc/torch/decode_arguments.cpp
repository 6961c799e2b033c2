#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cmath>
#include <initializer_list>
#include <sstream>

#include "torch/decode_arguments.h"

namespace pop::arguments {
namespace {

constexpr int64_t kAny = -1;

/// The tensors of one call, all on the device of the first.
class Expect {
 public:
  Expect(const char* operation, const Backend& backend, const Tensor& first)
      : operation_(operation), backend_(backend), device_index_(first.defined() ? first.get_device_index() : -1) {}

  [[noreturn]] void fail(const char* name, const std::string& was, const std::string& expected) const {
    arguments::fail(std::string("pop::") + operation_ + ": " + name + " is " + was + ", expected " + expected);
  }

  void require(bool condition, const char* name, int64_t was, const char* expected) const {
    if (!condition) fail(name, std::to_string(was), expected);
  }

  /// Checks dtype, shape (kAny matches any size), device and layout: rows anywhere, or all contiguous.
  void tensor(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape,
              const char* names, bool contiguous = true) const {
    if (!t.defined()) fail(name, "None", "a tensor");
    const auto sizes = t.sizes(), strides = t.strides();
    bool same = sizes.size() == shape.size();
    for (size_t i = 0; same && i < shape.size(); ++i) same = shape.begin()[i] == kAny || shape.begin()[i] == sizes[i];
    if (!same) fail(name, "of shape " + text(sizes.data(), sizes.size()), std::string(names) + " = " + text(shape));
    if (t.scalar_type() != type) fail(name, dtype_name(t.scalar_type()), dtype_name(type));
    if (t.device().type() != backend_.device || t.get_device_index() != device_index_)
      fail(name, "on another device", "all tensors on one");
    const bool laid_out =
        contiguous ? t.is_contiguous() : sizes[sizes.size() - 1] <= 1 || strides[sizes.size() - 1] == 1;
    if (!laid_out)
      fail(name, "laid out with strides " + text(strides.data(), strides.size()),
           contiguous ? "contiguous memory" : "a contiguous last dimension");
  }

  /// The address of an optional tensor, null without.
  template <typename T>
  T* optional(const char* name, const OptionalTensor& t, ScalarType type, std::initializer_list<int64_t> shape,
              const char* names) const {
    if (!t) return nullptr;
    tensor(name, *t, type, shape, names);
    return static_cast<T*>(t->mutable_data_ptr());
  }

  Tensor empty(const char* because_of, std::initializer_list<int64_t> shape, ScalarType type) const {
    int64_t strides[4], stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape.begin()[i])) strides[i] = stride;
    AtenTensorHandle handle;
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    if (aoti_torch_empty_strided(shape.size(), shape.begin(), strides, dtype, static_cast<int32_t>(backend_.device),
                                 device_index_, &handle) != AOTI_TORCH_SUCCESS)
      fail(because_of, "of a size that asks for an output of " + text(shape), "one that fits in memory");
    return Tensor(handle);
  }

 private:
  static std::string text(const int64_t* sizes, size_t count) {
    std::ostringstream out;
    out << '[';
    for (size_t i = 0; i < count; ++i) {
      out << (i ? ", " : "");
      if (sizes[i] == kAny)
        out << "any";
      else
        out << sizes[i];
    }
    out << ']';
    return out.str();
  }
  static std::string text(std::initializer_list<int64_t> shape) { return text(shape.begin(), shape.size()); }

  const char* operation_;
  const Backend& backend_;
  int32_t device_index_;
};

}  // namespace

Call<Embedding> embedding(const Backend& backend, const Tensor& token_ids, const Tensor& weight, double scale) {
  const Expect expect("embedding", backend, token_ids);
  expect.tensor("token_ids", token_ids, ScalarType::Long, {kAny}, "[T]");
  const ScalarType type = weight.defined() ? weight.scalar_type() : ScalarType::Float;
  const bool served = (type == ScalarType::Float && backend.float32) || (type == ScalarType::BFloat16) ||
                      (type == ScalarType::Half && backend.float16);
  if (!served) expect.fail("weight", dtype_name(type), backend.float32 ? "float32 or bfloat16" : "bfloat16 or float16");
  expect.tensor("weight", weight, type, {kAny, kAny}, "[V, D]", false);
  const int64_t tokens = token_ids.size(0), hidden = weight.size(1);
  expect.require(hidden > 0 && (!backend.vectors || hidden % 8 == 0), "weight's hidden size D", hidden,
                 backend.vectors ? "a multiple of 8 on CUDA" : "1 or more");
  expect.require(tokens < (int64_t{1} << 31), "token_ids' number of tokens T", tokens, "less than 2^31");
  if (backend.vectors && weight.numel() &&
      (reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 || weight.stride(0) % 8))
    expect.fail("weight", "not laid out in rows that start every 16 n bytes", "such rows on CUDA");
  if (!std::isfinite(static_cast<float>(scale))) expect.fail("scale", std::to_string(scale), "a finite number");
  Tensor y = expect.empty("token_ids", {tokens, hidden}, type);
  const DType dtype = type == ScalarType::Float  ? DType::kFloat32
                      : type == ScalarType::Half ? DType::kFloat16
                                                 : DType::kBFloat16;
  return {{dtype, tokens, weight.size(0), hidden, static_cast<const int64_t*>(token_ids.const_data_ptr()),
           weight.const_data_ptr(), weight.stride(0), static_cast<float>(scale), y.mutable_data_ptr()},
          y};
}

Call<RopeGather> rope_gather(const Backend& backend, const Tensor& cos_table, const Tensor& sin_table,
                             const Tensor& positions, const OptionalTensor& axes) {
  const Expect expect("rope_gather", backend, cos_table);
  expect.tensor("cos_table", cos_table, ScalarType::Float, {kAny, kAny, kAny}, "[ropes, positions, E / 2]");
  const int64_t ropes = cos_table.size(0), rows = cos_table.size(1), half = cos_table.size(2);
  expect.tensor("sin_table", sin_table, ScalarType::Float, {ropes, rows, half}, "cos_table's shape");
  if (positions.defined() && positions.dim() == 1)
    expect.tensor("positions", positions, ScalarType::Long, {kAny}, "[T]");
  else
    expect.tensor("positions", positions, ScalarType::Long, {kAny, kAny}, "[A, T]");
  const bool flat = positions.dim() == 1;
  const int64_t num_axes = flat ? 1 : positions.size(0), tokens = positions.size(flat ? 0 : 1);
  const auto* axis = expect.optional<const int64_t>("axes", axes, ScalarType::Long, {half}, "[E / 2]");
  if (!flat && !axis) expect.fail("axes", "None", "the axis of each frequency, as positions has a row for each axis");
  const bool large = half && tokens && ropes > (int64_t{1} << 38) / half / tokens;
  expect.require(!large, "positions' number of tokens T", tokens, "fewer, of so many angles");
  Tensor out = expect.empty("positions", {2, ropes, tokens, half}, ScalarType::Float);
  return {
      {ropes, rows, half, tokens, num_axes, static_cast<const float*>(cos_table.const_data_ptr()),
       static_cast<const float*>(sin_table.const_data_ptr()), static_cast<const int64_t*>(positions.const_data_ptr()),
       flat ? nullptr : axis, static_cast<float*>(out.mutable_data_ptr())},
      out};
}

DecodeAdvance decode_advance(const Backend& backend, const Tensor& block_tables, int64_t block_size,
                             const Tensor& shifts, const Tensor& seqlens_k, const Tensor& positions,
                             const Tensor& slot_mapping, const OptionalTensor& step) {
  const Expect expect("decode_advance", backend, block_tables);
  expect.tensor("block_tables", block_tables, ScalarType::Int, {kAny, kAny}, "[S, blocks of a sequence]", false);
  const int64_t sequences = block_tables.size(0);
  expect.require(block_size > 0, "block_size", block_size, "1 or more");
  expect.tensor("shifts", shifts, ScalarType::Long, {sequences}, "[S]");
  expect.tensor("seqlens_k", seqlens_k, ScalarType::Int, {sequences}, "[S]");
  expect.tensor("positions", positions, ScalarType::Long, {sequences}, "[S]");
  expect.tensor("slot_mapping", slot_mapping, ScalarType::Long, {sequences}, "[S]");
  auto* counter = expect.optional<int32_t>("step", step, ScalarType::Int, {1}, "[1]");
  return {sequences,
          block_tables.size(1),
          block_size,
          static_cast<const int32_t*>(block_tables.const_data_ptr()),
          block_tables.stride(0),
          static_cast<const int64_t*>(shifts.const_data_ptr()),
          static_cast<int32_t*>(seqlens_k.mutable_data_ptr()),
          static_cast<int64_t*>(positions.mutable_data_ptr()),
          static_cast<int64_t*>(slot_mapping.mutable_data_ptr()),
          counter};
}

Sample sample(const Backend& backend, const Tensor& logits, const OptionalTensor& settings, const OptionalTensor& seen,
              const OptionalTensor& uniforms, const OptionalTensor& step, const Tensor& tokens) {
  const Expect expect("sample", backend, logits);
  expect.tensor("logits", logits, ScalarType::Float, {kAny, kAny}, "[B, V]", false);
  const int64_t rows = logits.size(0), vocabulary = logits.size(1);
  expect.require(vocabulary > 0 && vocabulary <= (int64_t{1} << 23), "logits' vocabulary V", vocabulary, "1 to 2^23");
  expect.require(rows < (int64_t{1} << 31), "logits' number of rows B", rows, "less than 2^31");
  constexpr int64_t kSettings = sizeof(SampleSettings) / sizeof(float);
  const auto* setting =
      expect.optional<const SampleSettings>("settings", settings, ScalarType::Float, {rows, kSettings}, "[B, 5]");
  auto* mark = expect.optional<uint8_t>("seen", seen, ScalarType::Byte, {rows, vocabulary}, "[B, V]");
  const auto* draws = expect.optional<const double>("uniforms", uniforms, ScalarType::Double, {kAny, rows}, "[N, B]");
  if (setting && !draws) expect.fail("uniforms", "None", "random numbers, as there are settings");
  if (draws) expect.require(uniforms->size(0) > 0, "uniforms' number of draws N", uniforms->size(0), "1 or more");
  const auto* counter = expect.optional<const int32_t>("step", step, ScalarType::Int, {1}, "[1]");
  expect.tensor("tokens", tokens, ScalarType::Long, {rows}, "[B]");
  return {rows,
          vocabulary,
          static_cast<const float*>(logits.const_data_ptr()),
          logits.stride(0),
          setting,
          mark,
          draws,
          draws ? uniforms->size(0) : 0,
          counter,
          static_cast<int64_t*>(tokens.mutable_data_ptr())};
}

}  // namespace pop::arguments
