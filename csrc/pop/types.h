#pragma once

#include <cstdint>

struct CUstream_st;

namespace pop {

enum class DType { kFloat32, kBFloat16, kFloat16 };

enum class Activation { kSiLU, kGeluTanh };

/// The caller's thread pool: `run(n, body, context)` calls body(i, context) for i in [0, n), on up to `count` threads,
/// and waits.
struct Threads {
  int count;
  void (*run)(int n, void (*body)(int i, void* context), void* context);
};

/// A CUDA stream (cudaStream_t, without CUDA's headers); kernels run on the current device.
using Stream = CUstream_st*;

/// The cache slot of each token, -1 where it is not written: int64, or int32 where that pointer is set.
struct SlotMapping {
  const int64_t* as_int64;
  const int32_t* as_int32 = nullptr;

  constexpr int64_t operator[](int64_t token) const { return as_int32 ? as_int32[token] : as_int64[token]; }
};

/// A paged cache of one layer's keys or values, [blocks, block_size, heads, head_size]. Strides count elements; the
/// last dimension is contiguous. Slot s is token s % block_size of block s / block_size.
struct PagedCache {
  void* data;
  int64_t blocks, block_size, heads, head_size;
  int64_t block_stride, token_stride, head_stride;
};

}  // namespace pop
