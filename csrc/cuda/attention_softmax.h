#pragma once

// From scores to probabilities: the mask, and a softmax that is rescaled as larger scores turn up. Lane l of a warp has
// the scores of rows l / 4 and l / 4 + 8 of each 16, at columns l % 4 * 2 and the next of each 8: mma.m16n8k16's
// layout.

#include <cmath>

#include "cuda/attention_tiles.h"
#include "cuda/sums.h"

namespace pop::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kInfinity = INFINITY;

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// The largest of what the four lanes of a row have, and their sum.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

/// Raises a row's maximum to that of more scores, `top`. A maximum is a scaled score as rounded, so that whatever is
/// relative to one is relative to the same number; float16 has no exponents below -24, and there it is 15 less: the
/// largest probability is 2^15, not 1, lest small ones be lost. Returns what to subtract from scaled scores, and the
/// factor of what was summed up before.
template <typename T>
__device__ inline float raise_maximum(float& row_max, float top, float softmax_scale, float& rescale) {
  const float before = row_max;
  row_max = fmaxf(before, fmaf(top, softmax_scale, std::is_same_v<T, fp16> ? -15.0f : 0.0f));
  const float base = row_max == -kInfinity ? 0.0f : row_max;
  rescale = exp2_approx(before - base);
  return base;
}

/// Scores of what rows do not see become -infinity. `row` and `key` are the lane's first; `spans` is the sequence's, or
/// null.
template <typename C>
__device__ __forceinline__ void mask(float (&scores)[C::kRowTiles][C::kKeyTiles][4], const AttentionParameters& p,
                                     const Rows& rows, const int32_t* spans, int row, int first_key) {
  int positions[C::kRowTiles][2], ids[C::kRowTiles][2];
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      positions[m][half] = rows.position(p, min(row + 16 * m + 8 * half, rows.end - 1));
      ids[m][half] = -2;  // matches nothing
      if (spans)
        if (const int id = spans[positions[m][half]]; id >= 0) ids[m][half] = id;
    }
#pragma unroll
  for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int key = first_key + 8 * n + j;
      const int id = spans && key < rows.context ? max(spans[key], -1) : -1;
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int distance = positions[m][half] - key;  // below 0: only through the span
          if (static_cast<unsigned>(distance) >= static_cast<unsigned>(p.window_size) &&
              !(spans && distance < 0 && id == ids[m][half]))
            scores[m][n][2 * half + j] = -kInfinity;
        }
    }
}

/// The same without spans.
template <typename C>
__device__ __forceinline__ void mask(float (&scores)[C::kRowTiles][C::kKeyTiles][4], const AttentionParameters& p,
                                     const Rows& rows, int row, int first_key) {
#pragma unroll
  for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int distance = rows.position(p, min(row + 16 * m + 8 * half, rows.end - 1)) - first_key;
#pragma unroll
      for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (static_cast<unsigned>(distance - 8 * n - j) >= static_cast<unsigned>(p.window_size))
            scores[m][n][2 * half + j] = -kInfinity;
    }
}

/// The state of a warp's rows: maxima of their scaled scores, and sums of probabilities and of probability times value,
/// both relative to those maxima.
template <typename C>
struct OnlineSoftmax {
  using T = typename C::T;
  float acc[C::kRowTiles][C::kValueTiles][4] = {}, row_sum[C::kRowTiles][4] = {}, row_max[C::kRowTiles][2];

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) row_max[m][0] = row_max[m][1] = -kInfinity;
  }

  __device__ float sum(int m, int half) const { return row_sum[m][2 * half]; }

  /// Scores become probabilities in pairs, as mma's operand; what was summed up is rescaled where a maximum has grown.
  __device__ __forceinline__ void update(float (&scores)[C::kRowTiles][C::kKeyTiles][4], float softmax_scale,
                                         uint32_t (&probs)[C::kKeyTiles / 2][C::kRowTiles][4]) {
    bool grown = false;
    float rescale[C::kRowTiles][2];
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < C::kKeyTiles; ++n)
          top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        const float before = row_max[m][half];
        const float base = raise_maximum<T>(row_max[m][half], quad_max(top), softmax_scale, rescale[m][half]);
        grown |= row_max[m][half] != before;
#pragma unroll
        for (int n = 0; n < C::kKeyTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& score = scores[m][n][2 * half + j];
            score = exp2_approx(fmaf(score, softmax_scale, -base));
          }
      }
#pragma unroll
    for (int k = 0; k < C::kKeyTiles / 2; ++k)
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          probs[k][m][i] = held(pack<T>(scores[m][2 * k + i / 2][i % 2 * 2], scores[m][2 * k + i / 2][i % 2 * 2 + 1]));
    if (__any_sync(kAllLanes, grown)) {
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          row_sum[m][i] *= rescale[m][i / 2];
#pragma unroll
          for (int n = 0; n < C::kValueTiles; ++n) acc[m][n][i] *= rescale[m][i / 2];
        }
    }
  }
};

/// One row's softmax from parts of its keys.
struct MergedRow {
  float top, sum, values[8];  // eight of its sums of probability * value

  /// `stats(i)` is part i's maximum and sum of probabilities, `part(i)` points to its eight values.
  template <typename Stats, typename Part>
  __device__ __forceinline__ MergedRow(int count, Stats&& stats, Part&& part) : top(-kInfinity), sum(0), values{} {
#pragma unroll
    for (int i = 0; i < count; ++i) top = fmaxf(top, stats(i).x);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float2 stat = stats(i);
      const float weight = stat.x == -kInfinity ? 0.0f : exp2_approx(stat.x - top);
      sum += weight * stat.y;
      float v[8];
      unpack(load_floats(part(i)), v);
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] += weight * v[e];
    }
  }

  /// The values divided by the sum of probabilities; zeros for a row without keys.
  template <typename T>
  __device__ Vector mean() const {
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = values[e] / (sum == 0 ? 1.0f : sum);
    return pack<T>(v);
  }
};

}  // namespace pop::cuda
