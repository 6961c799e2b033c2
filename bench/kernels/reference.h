#pragma once

// Outputs in float64 on the host, with the magnitude of what they sum, which bounds their error.

#include <cmath>
#include <cstdint>
#include <vector>

#include "data.h"

namespace bench {

inline constexpr float kEps = 1e-6f;
inline constexpr double kUnit = 0x1p-8;  // of bf16: half the distance of two neighbours, relative

/// What an output should be, and the same computation on absolute values.
struct Expected {
  double value, magnitude;
};

/// x[x0 + i] . y[y0 + i], i < count.
template <typename X, typename Y>
Expected dot(const Buffer<X>& x, int64_t x0, const Buffer<Y>& y, int64_t y0, int64_t count) {
  Expected sum{};
  for (int64_t i = 0; i < count; ++i) {
    const double product = x.at(x0 + i) * y.at(y0 + i);
    sum.value += product;
    sum.magnitude += std::abs(product);
  }
  return sum;
}

/// A head of sums through RMS norm (gains null: none) and RoPE at angles[token], in float64; float32 cos and sin.
inline std::vector<Expected> finish_head(std::vector<Expected> head, const Buffer<float>* gains, int64_t gains0,
                                         const Buffer<float>& cos, const Buffer<float>& sin, int64_t angles0) {
  if (gains) {
    double squares = 0;
    for (const Expected& e : head) squares += e.value * e.value;
    const double scale = 1 / std::sqrt(squares / static_cast<double>(head.size()) + double{kEps});
    for (size_t i = 0; i < head.size(); ++i) {
      const double gain = scale * gains->at(gains0 + static_cast<int64_t>(i));
      head[i].value *= gain;
      head[i].magnitude *= std::abs(gain);
    }
  }
  const size_t half = head.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double c = cos.at(angles0 + static_cast<int64_t>(i)), s = sin.at(angles0 + static_cast<int64_t>(i));
    const Expected first = head[i], second = head[i + half];
    head[i] = {first.value * c - second.value * s, first.magnitude * std::abs(c) + second.magnitude * std::abs(s)};
    head[i + half] = {second.value * c + first.value * s,
                      second.magnitude * std::abs(c) + first.magnitude * std::abs(s)};
  }
  return head;
}

}  // namespace bench
