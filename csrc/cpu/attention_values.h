#pragma once

// Values times probabilities, the second multiplication of attention: packed for multiply_tile, or read as they lie.

#include "cpu/gemm.h"

namespace pop::cpu::POP_ISA {

/// panel[pair of keys][e] = {rows[2 i][e], rows[2 i + 1][e]} (or panel[key][e] for floats): values as a factor of
/// probabilities.
template <typename T>
void pack_values(const T* const* rows, int keys, int64_t size, float* panel, int64_t panel_stride) {
  for (int key = 0; key < keys; key += kPerLane<T>, panel += panel_stride) {
    for_each_vector(size, [&](int64_t e, auto n) {
      Vec v;
      if constexpr (kPerLane<T> == 2) {
        const Int even = bit_cast<Int>(load(rows[key] + e, n));  // a bf16 is the upper half of its float
        const Int odd = key + 1 < keys ? bit_cast<Int>(load(rows[key + 1] + e, n)) : Int{};
        v = bit_cast<Vec>(((even >> 16) & 0xffff) | odd);
      } else {
        v = load(rows[key] + e, n);
      }
      store(panel + e, v);
    });
  }
  for (int64_t lane = lanes_of<T>(keys); lane < panel_lanes<T>(keys); ++lane, panel += panel_stride)
    for (int64_t e = 0; e < size; e += kLanes) store(panel + e, Vec{});
}

/// c[r] = rescale[r] c[r] + sum over keys of probs[r][key] values[key], for columns [e, e + 2 kLanes), of which
/// `available` exist. Two vectors of bf16 come from one by a shift and a mask, the even columns and the odd ones.
template <typename T, int Rows>
POP_INLINE void add_value_columns(const float* probs, int64_t prob_stride, int keys, const T* const* values, int64_t e,
                                  int64_t available, const float* rescale, float* c, int64_t c_stride) {
  constexpr bool kSplit = std::is_same_v<T, bf16>;
  Vec acc[Rows][2] = {};
  for (int key = 0; key < keys; ++key) {
    const T* from = values[key] + e;
    T buffer[2 * kLanes] = {};
    if (available < 2 * kLanes) {
      std::memcpy(buffer, from, available * sizeof(T));
      from = buffer;
    }
    Vec first, second;
    if constexpr (kSplit) {
      Int pairs;
      std::memcpy(&pairs, from, sizeof pairs);
      first = even(pairs), second = odd(pairs);
    } else {
      first = load(from), second = load(from + kLanes);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const float prob = probs[r * prob_stride + key];
      acc[r][0] += first * prob, acc[r][1] += second * prob;
    }
  }
  Int low, high;  // interleaves even and odd columns
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    Vec a = acc[r][0], b = acc[r][1];
    if constexpr (kSplit) {
      a = __builtin_shuffle(acc[r][0], acc[r][1], low);
      b = __builtin_shuffle(acc[r][0], acc[r][1], high);
    }
    float* to = c + r * c_stride + e;
    store(to, load(to) * rescale[r] + a);
    store(to + kLanes, load(to + kLanes) * rescale[r] + b);
  }
}

template <typename T, int Rows>
void add_values(const float* probs, int64_t prob_stride, int keys, const T* const* values, int64_t size,
                const float* rescale, float* c, int64_t c_stride) {
  int64_t e = 0;
  for (; e + 2 * kLanes <= size; e += 2 * kLanes)
    add_value_columns<T, Rows>(probs, prob_stride, keys, values, e, 2 * kLanes, rescale, c, c_stride);
  if (e < size) add_value_columns<T, Rows>(probs, prob_stride, keys, values, e, size - e, rescale, c, c_stride);
}

}  // namespace pop::cpu::POP_ISA
