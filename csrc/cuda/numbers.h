#pragma once

// bfloat16 and float16 as the kernels use them: in pairs and in vectors of 16 bytes, computed in float32, and
// multiplied by the tensor cores.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <cute/arch/mma_sm80.hpp>

namespace pop::cuda {

using bf16 = cutlass::bfloat16_t;
using fp16 = cutlass::half_t;

/// Eight elements: what one thread moves at a time.
struct alignas(16) Vector {
  uint32_t pairs[4];
};

template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename T>
__device__ inline float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>)
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  else
    return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <typename T>
__device__ inline void unpack(const Vector& v, float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(v.pairs[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ inline Vector pack(const float (&values)[8]) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.pairs[i] = pack<T>(values[2 * i], values[2 * i + 1]);
  return v;
}

/// c += a b on the tensor cores: mma.m16n8k16, a [16 rows, 16 deep], b [16 deep, 8 columns], float32 sums.
template <typename T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using Atom = std::conditional_t<std::is_same_v<T, bf16>, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                  cute::SM80_16x8x16_F32F16F16F32_TN>;
  Atom::fma(c[0], c[1], c[2], c[3], a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]);
}

}  // namespace pop::cuda
