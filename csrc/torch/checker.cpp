#include "torch/checker.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace pop::arguments {

void fail(const std::string& message) { throw std::runtime_error(message); }

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

std::string text(const int64_t* sizes, size_t count) {
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
std::string text(std::initializer_list<int64_t> shape) { return text(shape.begin(), shape.size()); }

}  // namespace

Checker::Checker(const char* operation, const Backend& backend, const Tensor& first)
    : operation_(operation), backend_(backend), device_index_(first.defined() ? first.get_device_index() : -1) {}

void Checker::fail(const char* name, const std::string& was, const std::string& expected) const {
  arguments::fail(std::string("pop::") + operation_ + ": " + name + " is " + was + ", expected " + expected);
}

void Checker::require(bool condition, const char* name, int64_t was, const char* expected) const {
  if (!condition) fail(name, std::to_string(was), expected);
}

void Checker::vectors(const char* name, int64_t size) const {
  require(!backend_.vectors || size % 8 == 0, name, size, "a multiple of 8 on CUDA");
}

void Checker::head_size(const char* name, int64_t size) const {
  require(!backend_.vectors || size == 32 || size == 64 || size == 128 || size == 256, name, size,
          "32, 64, 128 or 256 on CUDA");
}

void Checker::countable(const char* name, int64_t size) const {
  require(!backend_.vectors || size < (int64_t{1} << 31), name, size, "less than 2^31 on CUDA");
}

float Checker::positive(const char* name, double value) const {
  if (!(value > 0 && std::isfinite(static_cast<float>(value))))
    fail(name, std::to_string(value), "a positive finite number");
  return static_cast<float>(value);
}

float Checker::eps(double value) const {
  if (!(value >= 0 && std::isfinite(static_cast<float>(value))))
    fail("eps", std::to_string(value), "a finite number of 0 or more");
  return static_cast<float>(value);
}

void Checker::multiplied(const char* name, const Tensor& t) {
  if (!t.defined()) fail(name, "None", "a tensor");
  const ScalarType type = t.scalar_type();
  const bool served = (type == ScalarType::Float && backend_.float32) ||
                      (type == ScalarType::BFloat16 && backend_.bfloat16) ||
                      (type == ScalarType::Half && backend_.float16);
  if (!served) fail(name, dtype_name(type), backend_.float32 ? "float32 or bfloat16" : "bfloat16 or float16");
  scalar_ = type;
}

DType Checker::dtype() const {
  return scalar_ == ScalarType::Float  ? DType::kFloat32
         : scalar_ == ScalarType::Half ? DType::kFloat16
                                       : DType::kBFloat16;
}

void Checker::tensor(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape,
                     const char* shape_names, Layout layout) const {
  if (!t.defined()) fail(name, "None", "a tensor");
  const auto sizes = t.sizes(), strides = t.strides();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape.begin()[i] == kAny || shape.begin()[i] == sizes[i];
  if (!same) fail(name, "of shape " + text(sizes.data(), sizes.size()), std::string(shape_names) + " = " + text(shape));
  if (t.scalar_type() != type) fail(name, dtype_name(t.scalar_type()), dtype_name(type));
  if (t.device().type() != backend_.device || t.get_device_index() != device_index_)
    fail(name, "on another device", "all tensors on one");
  const bool contiguous = layout == Layout::kContiguous;
  if (contiguous ? !t.is_contiguous() : sizes[sizes.size() - 1] > 1 && strides[sizes.size() - 1] != 1)
    fail(name, "laid out with strides " + text(strides.data(), strides.size()),
         contiguous ? "contiguous memory" : "a contiguous last dimension");
}

void Checker::operand(const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape,
                      const char* shape_names, Layout layout) const {
  tensor(name, t, type, shape, shape_names, layout);
  aligned(name, t);
}

void Checker::aligned(const char* name, const Tensor& t) const {
  constexpr int64_t kBytes = 16;
  if (!backend_.vectors || t.numel() == 0) return;
  const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  if (address % kBytes) fail(name, "at an address of 16 n + " + std::to_string(address % kBytes), "16 n on CUDA");
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t element = t.scalar_type() == ScalarType::Float ? 4 : 2;
  for (size_t i = 0; i + 1 < sizes.size(); ++i)
    if (sizes[i] > 1 && strides[i] * element % kBytes)
      fail(name, "laid out with strides " + text(strides.data(), strides.size()),
           "rows that start every 16 n bytes on CUDA");
}

SlotMapping Checker::slots(const char* name, const Tensor& t, int64_t tokens) const {
  const bool is_int32 = t.defined() && t.scalar_type() == ScalarType::Int;
  if (t.defined() && !is_int32 && t.scalar_type() != ScalarType::Long)
    fail(name, dtype_name(t.scalar_type()), "int64 or int32");
  tensor(name, t, is_int32 ? ScalarType::Int : ScalarType::Long, {tokens}, "[T]", Layout::kContiguous);
  if (is_int32) return {.as_int64 = nullptr, .as_int32 = static_cast<const int32_t*>(t.const_data_ptr())};
  return {.as_int64 = static_cast<const int64_t*>(t.const_data_ptr())};
}

PagedCache Checker::cache(const char* name, const Tensor& t, int64_t first_dim, std::initializer_list<int64_t> shape,
                          const char* shape_names) const {
  operand(name, t, scalar_, shape, shape_names);
  const auto sizes = t.sizes(), strides = t.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0 || first_dim == 0)
      require(sizes[i] > 0 || i == size_t(first_dim), name, sizes[i], "no empty dimension but blocks");
    if (sizes[i] > 1 && strides[i] == 0) fail(name, "expanded (a stride is 0)", "memory of its own for each element");
  }
  const auto d = first_dim;
  return {t.data_ptr(), sizes[d], sizes[d + 1], sizes[d + 2], sizes[d + 3], strides[d], strides[d + 1], strides[d + 2]};
}

Tensor Checker::empty(const char* because_of, std::initializer_list<int64_t> shape, ScalarType type) const {
  int64_t strides[4], stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape.begin()[i])) strides[i] = stride;
  AtenTensorHandle handle;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  if (aoti_torch_empty_strided(shape.size(), shape.begin(), strides, dtype, static_cast<int32_t>(backend_.device),
                               device_index_, &handle) != AOTI_TORCH_SUCCESS)
    fail(because_of, "of a size that asks for an output of " + text(shape), "one that fits in memory");
  return Tensor(handle);
}

}  // namespace pop::arguments
