#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "pop/types.h"

// The choice of a token from logits. Every step is exact or one IEEE rounding, and sums are of integers, so that the
// order of additions does not matter: all implementations choose the same token for the same number.

#ifdef __CUDACC__
#define POP_HOST_DEVICE __host__ __device__
#else
#define POP_HOST_DEVICE
#endif

namespace pop {

/// A row's settings: 0 for temperature is greedy; 0 for top_k, 1 for top_p, 0 for min_p and 1 for the repetition
/// penalty change nothing.
struct SampleSettings {
  float temperature, top_k, top_p, min_p, repetition_penalty;
};

/// tokens[b] = the choice for row b; -1 where no token can be chosen (no number among the scores, or +inf at a
/// temperature).
///
/// Scores are logits, divided (where negative, multiplied) by the penalty for tokens that `seen` marks, over the
/// temperature. Kept are the top_k largest, of these the largest whose larger ones have less than top_p of the
/// probability, of these those of at least min_p times the largest probability; equal scores are kept or left together.
/// The token is where the running sum of the kept weights exceeds uniforms[step, b] times their total. Greedy: the
/// first of the largest. The chosen token is marked in `seen`.
struct Sample {
  int64_t rows, vocabulary;
  const float* logits;
  int64_t logits_stride;
  const SampleSettings* settings;  // [rows]; null: all greedy
  uint8_t* seen;                   // [rows, vocabulary] or null
  const double* uniforms;          // [draws, rows], in [0, 1); null where all rows are greedy
  int64_t draws;
  const int32_t* step;  // which draw; null: the first
  int64_t* tokens;
};

namespace cpu {
void sample(const Sample&);
}

namespace cuda {
void sample(const Sample&, Stream);
}

namespace sampling {

// One rounding each, on every device: never contracted to a multiply-add.
#ifdef __CUDA_ARCH__
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ inline uint32_t bits(float x) { return __float_as_uint(x); }
__device__ inline float from_bits(uint32_t x) { return __uint_as_float(x); }
__device__ inline uint64_t share(double part, uint64_t total) {
  return __double2ull_rz(__dmul_rn(part, __ull2double_rn(total)));
}
__device__ inline uint64_t share_up(double part, uint64_t total) {
  return __double2ull_ru(__dmul_rn(part, __ull2double_rn(total)));
}
#else
inline float multiply(float a, float b) { return a * b; }  // sample.cpp is compiled with -ffp-contract=off
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline uint32_t bits(float x) {
  uint32_t result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}
inline float from_bits(uint32_t x) {
  float result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}
inline uint64_t share(double part, uint64_t total) { return static_cast<uint64_t>(part * static_cast<double>(total)); }
inline uint64_t share_up(double part, uint64_t total) {
  return static_cast<uint64_t>(std::ceil(part * static_cast<double>(total)));
}
#endif

/// A step that has no row of `uniforms` takes the nearest.
POP_HOST_DEVICE inline int64_t draw_of(int32_t step, int64_t draws) {
  return step < 0 ? 0 : step < draws ? step : draws - 1;
}

POP_HOST_DEVICE inline float score(float logit, bool seen, const SampleSettings& s) {
  if (seen) logit = logit < 0 ? multiply(logit, s.repetition_penalty) : divide(logit, s.repetition_penalty);
  return s.temperature > 0 ? divide(logit, s.temperature) : logit;
}

/// Integers in the order of the scores; 0 for NaN. -0 and 0 are equal.
POP_HOST_DEVICE inline uint32_t order(float x) {
  if (x != x) return 0;
  if (x == 0) x = 0;
  const uint32_t b = bits(x);
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}
POP_HOST_DEVICE inline float in_order(uint32_t key) { return from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

/// e^x of x <= 0 within 3 units in the last place, 0 below -30: 2^n e^r, |r| <= ln(2) / 2, by Taylor's polynomial.
POP_HOST_DEVICE inline float exponential(float x) {
  if (!(x > -30.0f)) return 0;
  const float shifted = add(multiply(x, 1.44269504f), 12582912.0f);  // 1.5 * 2^23: rounds to an integer
  const float n = add(shifted, -12582912.0f);
  const float r = add(add(x, multiply(n, -0.693359375f)), multiply(n, 2.12194440e-4f));  // ln(2), its parts exact
  float y = 1.0f / 5040;
  y = add(multiply(y, r), 1.0f / 720);
  y = add(multiply(y, r), 1.0f / 120);
  y = add(multiply(y, r), 1.0f / 24);
  y = add(multiply(y, r), 1.0f / 6);
  y = add(multiply(y, r), 0.5f);
  y = add(multiply(y, r), 1.0f);
  y = add(multiply(y, r), 1.0f);
  return multiply(y, from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23));
}

/// A probability, relative to the largest one (2^40); a row of at most 2^23 of them adds up in 64 bits.
POP_HOST_DEVICE inline uint64_t weight(float relative) {
#ifdef __CUDA_ARCH__
  return __float2ull_rz(__fmul_rn(relative, 1099511627776.0f));
#else
  return static_cast<uint64_t>(static_cast<int64_t>(relative * 1099511627776.0f));
#endif
}

/// What is kept: scores of `threshold` or more in the order of `order`, relative probabilities of min_p or more.
POP_HOST_DEVICE inline uint64_t kept_weight(float score, float largest, uint32_t threshold, float min_p) {
  if (order(score) < threshold || score != score) return 0;
  const float relative = exponential(add(score, -largest));
  return relative >= min_p ? weight(relative) : 0;
}

}  // namespace sampling
}  // namespace pop
