#include "cpu/gemm.h"

#include <array>

namespace pop::cpu::POP_ISA {
namespace {

/// One lane (4 bytes, whatever they mean) in every lane.
POP_INLINE Vec broadcast_lane(const void* p) {
  int32_t lane;
  std::memcpy(&lane, p, sizeof lane);
  return bit_cast<Vec>(lane + Int{});
}

template <typename T>
POP_INLINE Vec multiply_add(Vec acc, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (kPerLane<T> == 2) return _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#endif
  return acc + a * b;
}

/// kLanes lanes from p, which `available` elements follow (zeros behind them).
template <typename T>
POP_INLINE Vec load_lanes(const T* p, int64_t available) {
  constexpr int kStep = kPerLane<T> * kLanes;
  if constexpr (kPerLane<T> == 2) {
    Vec v;
    if (available >= kStep) {
      std::memcpy(&v, p, sizeof v);
    } else {
      T buffer[kStep] = {};
      std::memcpy(buffer, p, available * sizeof(T));
      std::memcpy(&v, buffer, sizeof v);
    }
    return v;
  } else {
    return available >= kStep ? load(p) : load(p, available);
  }
}

template <typename T, int Rows, int Vecs>
void tile(const Factor<T>* a, int64_t a_stride, const float* panel, int64_t panel_stride, int64_t lanes,
          const float* alpha, float* c, int64_t c_stride) {
  Vec acc[Rows][Vecs];
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) acc[r][v] = alpha ? load(c + r * c_stride + v * kLanes) * alpha[r] : Vec{};
  for (int64_t k = 0; k < lanes; ++k, a += kPerLane<T>, panel += panel_stride) {
    Vec b[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Vec ar = broadcast_lane(a + r * a_stride);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) acc[r][v] = multiply_add<T>(acc[r][v], ar, b[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) store(c + r * c_stride + v * kLanes, acc[r][v]);
}

template <typename T, size_t... I>
constexpr auto tile_table(std::index_sequence<I...>) {
  return std::array{&tile<T, I / kTileVecs + 1, I % kTileVecs + 1>...};
}

/// c[r] = x[r] . w. One row of the weight at a time: memory is read fastest as a single stream.
template <typename T, int Rows>
void dots(const T* x, int64_t x_stride, const T* w, int64_t k, float* c, int64_t c_stride) {
  constexpr int kStep = kPerLane<T> * kLanes, kUnroll = 4;
  Vec acc[Rows][kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kStep <= k; i += kUnroll * kStep) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const Vec wv = load_lanes(w + i + u * kStep, kStep);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r)
        acc[r][u] = multiply_add<T>(acc[r][u], load_lanes(x + r * x_stride + i + u * kStep, kStep), wv);
    }
  }
  for (; i < k; i += kStep) {
    const Vec wv = load_lanes(w + i, k - i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) acc[r][0] = multiply_add<T>(acc[r][0], load_lanes(x + r * x_stride + i, k - i), wv);
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) c[r * c_stride] = reduce_add((acc[r][0] + acc[r][1]) + (acc[r][2] + acc[r][3]));
}

constexpr int kDotRows = 4;

}  // namespace

template <typename T>
void pack_panel(const T* const* rows, int columns, int64_t k, float* panel, int64_t panel_stride) {
  constexpr int kStep = kPerLane<T> * kLanes;
  const int vecs = (columns + kLanes - 1) / kLanes;
  for (int v = 0; v < vecs; ++v) {
    const int count = std::min(kLanes, columns - v * kLanes);
    for (int64_t i = 0; i < k; i += kStep) {
      Vec lanes[kLanes];
      if (count == kLanes && i + kStep <= k) {
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) lanes[c] = load_lanes(rows[v * kLanes + c] + i, kStep);
      } else {
        for (int c = 0; c < kLanes; ++c) lanes[c] = c < count ? load_lanes(rows[v * kLanes + c] + i, k - i) : Vec{};
      }
      transpose(lanes);
      float* to = panel + i / kPerLane<T> * panel_stride + v * kLanes;
      const int64_t valid = std::min<int64_t>(kLanes, lanes_of<T>(k - i));
      if (valid == kLanes) {
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) store(to + r * panel_stride, lanes[r]);
      } else {
        for (int r = 0; r < valid; ++r) store(to + r * panel_stride, lanes[r]);
      }
    }
  }
}

template <typename T>
void multiply_tile(int rows, int columns, const Factor<T>* a, int64_t a_stride, const float* panel,
                   int64_t panel_stride, int64_t lanes, const float* alpha, float* c, int64_t c_stride) {
  static constexpr auto kTiles = tile_table<T>(std::make_index_sequence<kTileRows * kTileVecs>{});
  const int vecs = (columns + kLanes - 1) / kLanes;
  kTiles[(rows - 1) * kTileVecs + vecs - 1](a, a_stride, panel, panel_stride, lanes, alpha, c, c_stride);
}

template <typename T>
void multiply_dots(int64_t rows, int columns, const T* x, int64_t x_stride, const T* const* weights, int64_t k,
                   float* c, int64_t c_stride) {
  static constexpr decltype(&dots<T, 1>) kDots[kDotRows] = {dots<T, 1>, dots<T, 2>, dots<T, 3>, dots<T, 4>};
  for (int j = 0; j < columns; ++j) {
    for (int64_t r = 0; r < rows; r += kDotRows)
      kDots[std::min<int64_t>(kDotRows, rows - r) - 1](x + r * x_stride, x_stride, weights[j], k, c + r * c_stride + j,
                                                       c_stride);
  }
}

#define POP_INSTANTIATE(T)                                                                                          \
  template void pack_panel<T>(const T* const*, int, int64_t, float*, int64_t);                                      \
  template void multiply_tile<T>(int, int, const Factor<T>*, int64_t, const float*, int64_t, int64_t, const float*, \
                                 float*, int64_t);                                                                  \
  template void multiply_dots<T>(int64_t, int, const T*, int64_t, const T* const*, int64_t, float*, int64_t);
POP_INSTANTIATE(float)
POP_INSTANTIATE(bf16)

}  // namespace pop::cpu::POP_ISA
