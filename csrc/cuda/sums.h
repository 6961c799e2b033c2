#pragma once

// Eight float32 at a time: how epilogues read finished sums from shared memory, and floats from global memory.

#include "cuda/numbers.h"

namespace pop::cuda {

struct Floats {
  float4 low, high;
};

__device__ inline Floats load_floats(const float* from) {
  return {reinterpret_cast<const float4*>(from)[0], reinterpret_cast<const float4*>(from)[1]};
}

__device__ inline void unpack(const Floats& f, float (&v)[8]) {
  v[0] = f.low.x, v[1] = f.low.y, v[2] = f.low.z, v[3] = f.low.w;
  v[4] = f.high.x, v[5] = f.high.y, v[6] = f.high.z, v[7] = f.high.w;
}

/// As two vectors of 16 bytes, which the compiler may split where they are plain stores.
__device__ inline void store_floats(float* to, const float (&v)[8]) {
  __stwb(reinterpret_cast<float4*>(to), make_float4(v[0], v[1], v[2], v[3]));
  __stwb(reinterpret_cast<float4*>(to) + 1, make_float4(v[4], v[5], v[6], v[7]));
}

__device__ inline void add(float (&v)[8], const Floats& f) {
  float other[8];
  unpack(f, other);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] += other[i];
}

template <typename T>
__device__ inline void add(float (&v)[8], const Vector& vector) {
  float other[8];
  unpack<T>(vector, other);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] += other[i];
}

/// Columns 8 chunk to 8 chunk + 7 of a row in shared memory. Neighbouring lanes read neighbouring chunks; every other
/// four of them read the halves in the other order, so that eight lanes at a time fall into different banks.
__device__ inline void load_sums(float (&v)[8], const float* row, int chunk) {
  const bool swap = chunk & 4;
  const float4 first = *reinterpret_cast<const float4*>(row + 8 * chunk + 4 * swap);
  const float4 second = *reinterpret_cast<const float4*>(row + 8 * chunk + 4 * !swap);
  unpack(swap ? Floats{second, first} : Floats{first, second}, v);
}

}  // namespace pop::cuda
