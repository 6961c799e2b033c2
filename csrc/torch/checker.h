#pragma once

// The checks that all operations' arguments share. A violation throws "pop::operation: argument is V, expected Y".

#include <initializer_list>
#include <string>

#include "torch/arguments.h"

namespace pop::arguments {

inline constexpr int64_t kAny = -1;  // in an expected shape: any size

enum class Layout { kRows, kContiguous };  // the last dimension is contiguous, or all are

/// The tensors of one call, all on the device of `first`.
class Checker {
 public:
  Checker(const char* operation, const Backend&, const Tensor& first);

  [[noreturn]] void fail(const char* name, const std::string& was, const std::string& expected) const;
  void require(bool condition, const char* name, int64_t was, const char* expected) const;

  /// A size that the backend's vectors must divide.
  void vectors(const char* name, int64_t size) const;
  void head_size(const char* name, int64_t size) const;
  /// A size that CUDA's grids count in 32 bits.
  void countable(const char* name, int64_t size) const;
  float positive(const char* name, double value) const;
  float eps(double value) const;

  /// The dtype of everything that is multiplied is this tensor's.
  void multiplied(const char* name, const Tensor&);
  ScalarType scalar() const { return scalar_; }
  DType dtype() const;

  /// Dtype, shape, device and layout.
  void tensor(const char* name, const Tensor&, ScalarType, std::initializer_list<int64_t> shape,
              const char* shape_names, Layout = Layout::kRows) const;
  /// The same, and that the backend's vectors can read the rows.
  void operand(const char* name, const Tensor&, ScalarType, std::initializer_list<int64_t> shape,
               const char* shape_names, Layout = Layout::kRows) const;
  void aligned(const char* name, const Tensor&) const;

  /// The address of an optional contiguous tensor, null without.
  template <typename T>
  T* optional(const char* name, const OptionalTensor& t, ScalarType type, std::initializer_list<int64_t> shape,
              const char* shape_names) const {
    if (!t) return nullptr;
    tensor(name, *t, type, shape, shape_names, Layout::kContiguous);
    if constexpr (std::is_const_v<T>)
      return static_cast<T*>(t->const_data_ptr());
    else
      return static_cast<T*>(t->mutable_data_ptr());
  }
  template <typename T>
  const T* optional_operand(const char* name, const OptionalTensor& t, ScalarType type,
                            std::initializer_list<int64_t> shape, const char* shape_names) const {
    if (t) operand(name, *t, type, shape, shape_names, Layout::kContiguous);
    return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
  }

  SlotMapping slots(const char* name, const Tensor&, int64_t tokens) const;

  /// A cache [blocks, block_size, heads, head_size], behind a layer dimension where first_dim is 1.
  PagedCache cache(const char* name, const Tensor&, int64_t first_dim, std::initializer_list<int64_t> shape,
                   const char* shape_names) const;

  /// An uninitialised output; `because_of` is the argument that its size follows.
  Tensor empty(const char* because_of, std::initializer_list<int64_t> shape, ScalarType) const;

 private:
  const char* operation_;
  Backend backend_;
  int32_t device_index_;
  ScalarType scalar_ = ScalarType::Float;
};

}  // namespace pop::arguments
