#pragma once

// Operands of the microbenchmark programs: random values on the device, tables of RoPE, a paged cache.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pop/types.h"

namespace bench {

using bf16 = __nv_bfloat16;

inline void ok(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}
#define BENCH_OK(call) ::bench::ok((call), #call)

inline constexpr int64_t kCacheBlock = 64;  // tokens

/// `count` values of unit variance times `scale`, around `mean`.
template <typename T>
std::vector<T> random_values(int64_t count, float scale = 1, float mean = 0) {
  static uint64_t state = 0;
  std::vector<T> values(count);
  for (T& value : values) {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    z ^= z >> 31;
    value = T(mean + scale * 1.7320508f * (static_cast<float>(z >> 40) * 0x1p-23f - 1));
  }
  return values;
}

/// An operand on the device, once for each of the sets that launches rotate through.
template <typename T>
class Buffer {
 public:
  /// The same values in every set.
  Buffer(std::vector<T> values, int sets) : host_(std::move(values)) {
    allocate(sets);
    for (int set = 0; set < sets; ++set)
      BENCH_OK(cudaMemcpy((*this)[set], host_.data(), bytes(), cudaMemcpyHostToDevice));
  }
  /// An output, NaN until it is written.
  Buffer(int64_t count, int sets) : host_(count) {
    allocate(sets);
    BENCH_OK(cudaMemset(device_, 0xff, pitch_ * sets));
  }
  ~Buffer() { cudaFree(device_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* operator[](int set) { return reinterpret_cast<T*>(static_cast<char*>(device_) + pitch_ * set); }
  /// The host's copy: of an input its values, of an output those of set 0 at the last download.
  double at(int64_t i) const { return static_cast<double>(static_cast<float>(host_[i])); }
  void download() { BENCH_OK(cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost)); }

 private:
  size_t bytes() const { return host_.size() * sizeof(T); }
  void allocate(int sets) {
    pitch_ = (bytes() + 255) / 256 * 256;
    BENCH_OK(cudaMalloc(&device_, std::max<size_t>(pitch_ * sets, 256)));
  }

  std::vector<T> host_;
  void* device_ = nullptr;
  size_t pitch_ = 0;
};

/// cos and sin of RoPE, [ropes, tokens, head_size / 2], rope r of base 10,000 * 100^r.
inline std::vector<float> angles(int64_t ropes, int64_t tokens, int64_t head_size, double (*function)(double)) {
  std::vector<float> values;
  for (int64_t r = 0; r < ropes; ++r)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < head_size / 2; ++i) {
        const double base = 1e4 * std::pow(100.0, static_cast<double>(r));
        const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(head_size);
        values.push_back(static_cast<float>(function(static_cast<double>(t) * std::pow(base, exponent))));
      }
  return values;
}

/// Tokens 0, 1, ... in cache blocks that lie in reverse order: the slots [tokens] of a sequence.
inline int64_t cache_blocks(int64_t tokens) { return (tokens + kCacheBlock - 1) / kCacheBlock; }
inline std::vector<int64_t> reversed_slots(int64_t tokens) {
  std::vector<int64_t> slots;
  for (int64_t t = 0; t < tokens; ++t)
    slots.push_back((cache_blocks(tokens) - 1 - t / kCacheBlock) * kCacheBlock + t % kCacheBlock);
  return slots;
}

inline pop::PagedCache paged_cache(void* data, int64_t blocks, int64_t heads, int64_t head_size) {
  return {data, blocks, kCacheBlock, heads, head_size, kCacheBlock * heads * head_size, heads * head_size, head_size};
}

}  // namespace bench
