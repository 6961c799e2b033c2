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
  if constexpr (kPerLane<T> == 2) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(acc, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
#else
    return acc + even(bit_cast<Int>(a)) * even(bit_cast<Int>(b)) + odd(bit_cast<Int>(a)) * odd(bit_cast<Int>(b));
#endif
  } else {
    return acc + a * b;
  }
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
void vector_block(const Factor<T>* a, int64_t a_stride, const float* panel, int64_t panel_stride, int64_t lanes,
                  const float* alpha, float* c, int64_t c_stride, int64_t sum_lanes) {
  int64_t k = 0;
  do {
    Vec acc[Rows][Vecs] = {};
    for (const int64_t end = std::min(lanes, k + sum_lanes); k < end; ++k, a += kPerLane<T>, panel += panel_stride) {
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
    const bool first = k <= sum_lanes;
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const float scale = first && alpha ? alpha[r] : 1.0f;
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) {
        float* to = c + r * c_stride + v * kLanes;
        store(to, first && !alpha ? acc[r][v] : acc[r][v] + load(to) * scale);
      }
    }
  } while (k < lanes);
}

template <typename T, size_t... I>
constexpr auto block_table(std::index_sequence<I...>) {
  return std::array{&vector_block<T, I / kTileVecs + 1, I % kTileVecs + 1>...};
}

constexpr int kPrefetchBytes = 12 * 1024;  // ahead of a weight that is read once

/// One step of dots: the vector or two of w at i.
template <typename T>
inline constexpr int kDotStep = kConverted<T> ? 2 * kLanes : kPerLane<T> * kLanes;

template <typename T, bool Prefetch, int Rows, int Chains, typename N>
POP_INLINE void dot_step(const Factor<T>* x, int64_t x_stride, const T* w, N available, Vec (&acc)[Rows][Chains],
                         int chain) {
  if constexpr (kConverted<T>) {
    Int pairs{};
    if (available >= kDotStep<T>)
      std::memcpy(&pairs, w, sizeof pairs);
    else
      std::memcpy(&pairs, w, available * sizeof(T));
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      acc[r][chain] += load(x + r * x_stride) * even(pairs);
      acc[r][chain + 1] += load(x + r * x_stride + kLanes) * odd(pairs);
    }
  } else {
    // Rows lie behind each other, mostly: the hardware's own prefetch ends with each page, and reads a fifth less.
    if constexpr (Prefetch) __builtin_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes, 0, 2);
    const Vec wv = load_lanes(w, available);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
      acc[r][chain] = multiply_add<T>(acc[r][chain], load_lanes(x + r * x_stride, available), wv);
  }
}

/// sums[r * kLanes], over its lanes, is x[r] . w. One row of the weight at a time: memory is read fastest as a single
/// stream. Chains of dependent sums are enough to hide their latency, few enough for the registers; one for a Short k,
/// shorter than a step of them all.
template <typename T, int Rows, bool Short>
void dots(const Factor<T>* x, int64_t x_stride, const T* w, int64_t k, Vec* sums) {
  constexpr int kSums = kConverted<T> ? 2 : 1;  // of a step
  constexpr int kUnroll = Short ? 1 : kLanes == 16 || Rows == 1 ? 4 : std::max(1, (Rows == 2 ? 4 : 2) / kSums);
  constexpr int kChains = kUnroll * kSums, kStep = kDotStep<T>;
  Vec total[Rows] = {};
  for (int64_t i = 0; i < k;) {
    Vec acc[Rows][kChains] = {};
    const int64_t end = std::min(k, i + kSumLanes / 2 * kUnroll * kStep);
    for (; i + kUnroll * kStep <= end; i += kUnroll * kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u)
        dot_step<T, !Short>(x + i + u * kStep, x_stride, w + i + u * kStep, std::integral_constant<int, kStep>{}, acc,
                            u * kSums);
    }
    for (; i < end; i += kStep) dot_step<T, !Short>(x + i, x_stride, w + i, end - i, acc, 0);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int u = 1; u < kChains; ++u) acc[r][0] += acc[r][u];
      total[r] += acc[r][0];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) sums[r * kLanes] = total[r];
}

template <typename T>
inline constexpr int64_t kShort = 2 * kDotStep<T>;  // up to here one chain of sums is enough

/// Columns [0, columns), at most kLanes, of c, whose lanes' sums are made together.
template <typename T, int Rows, bool Short>
void dot_columns(const Factor<T>* x, int64_t x_stride, const T* const* weights, int columns, int64_t k, float* c,
                 int64_t c_stride) {
  Vec sums[Rows][kLanes];
  for (int j = 0; j < columns; ++j) dots<T, Rows, Short>(x, x_stride, weights[j], k, &sums[0][j]);
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    for (int j = columns; j < kLanes; ++j) sums[r][j] = Vec{};
    store(c + r * c_stride, sum_rows(sums[r]), columns);
  }
}

#if defined(__AMX_BF16__) || defined(POP_EMULATED_TILES)

/// RowTiles x ColumnTiles tiles of C, in tiles 0 to 3, which begin as zero or as what c holds. The second row of them
/// begins `below` rows after the first: fewer than a tile's rows where they overlap, which writes the same sums twice.
template <int RowTiles, int ColumnTiles>
void tile_block(bool add, int below, const bf16* a, int64_t a_stride, const float* panel, int64_t panel_stride,
                int64_t lanes, float* c, int64_t c_stride) {
  const int64_t bytes = c_stride * sizeof(float);
  float* c_below = c + below * c_stride;
  if (add) {
    tile::load<0>(c, bytes);
    if constexpr (ColumnTiles == 2) tile::load<1>(c + kLanes, bytes);
    if constexpr (RowTiles == 2) {
      tile::load<2>(c_below, bytes);
      if constexpr (ColumnTiles == 2) tile::load<3>(c_below + kLanes, bytes);
    }
  } else {
    tile::zero<0>(), tile::zero<1>(), tile::zero<2>(), tile::zero<3>();
  }
  const auto step = [&](const bf16* first, const bf16* second, int64_t stride, const float* b) {
    const int64_t a_bytes = stride * sizeof(bf16), b_bytes = panel_stride * sizeof(float);
    tile::load<4>(first, a_bytes);
    tile::load_once<6>(b, b_bytes);
    tile::dp_bf16<0, 4, 6>();
    if constexpr (ColumnTiles == 2) {
      tile::load_once<7>(b + kLanes, b_bytes);
      tile::dp_bf16<1, 4, 7>();
    }
    if constexpr (RowTiles == 2) {
      tile::load<5>(second, a_bytes);
      tile::dp_bf16<2, 5, 6>();
      if constexpr (ColumnTiles == 2) tile::dp_bf16<3, 5, 7>();
    }
  };
  const int64_t whole = lanes / tile::kPairs * tile::kPairs;
  const bf16* second = a + below * a_stride;
  for (int64_t k = 0; k < whole; k += tile::kPairs) step(a + 2 * k, second + 2 * k, a_stride, panel + k * panel_stride);
  if (whole < lanes) {  // the rest of k, zeros behind it
    alignas(64) bf16 rest[RowTiles * tile::kRows][2 * tile::kPairs] = {};
    for (int r = 0; r < RowTiles * tile::kRows; ++r)
      std::memcpy(rest[r], (r < tile::kRows ? a + r * a_stride : second + (r - tile::kRows) * a_stride) + 2 * whole,
                  (lanes - whole) * sizeof(float));
    step(rest[0], rest[RowTiles == 2 ? tile::kRows : 0], 2 * tile::kPairs, panel + whole * panel_stride);
  }
  tile::store<0>(c, bytes);
  if constexpr (ColumnTiles == 2) tile::store<1>(c + kLanes, bytes);
  if constexpr (RowTiles == 2) {
    tile::store<2>(c_below, bytes);
    if constexpr (ColumnTiles == 2) tile::store<3>(c_below + kLanes, bytes);
  }
}

void multiply_on_tiles(int rows, int columns, const bf16* a, int64_t a_stride, const float* panel, int64_t panel_stride,
                       int64_t lanes, const float* alpha, float* c, int64_t c_stride) {
  static constexpr decltype(&tile_block<1, 1>) kBlocks[] = {tile_block<1, 1>, tile_block<1, 2>, tile_block<2, 1>,
                                                            tile_block<2, 2>};
  // A dp adds 32 products up before it adds to C, so that the sum is in blocks already, up to here.
  constexpr int64_t kMostLanes = 512;
  const int row_tiles = rows > tile::kRows ? 2 : 1;
  if (alpha) {
    for (int r = 0; r < rows; ++r) {
      if (alpha[r] == 1) continue;
      for (int i = 0; i < columns; i += kLanes) store(c + r * c_stride + i, load(c + r * c_stride + i) * alpha[r]);
    }
  }
  for (int64_t k = 0; k < lanes; k += kMostLanes) {
    alignas(64) float partial[kTileRows<bf16> * kTileColumns];
    // C is written in whole tiles: rows that are not asked for may be overwritten, but not added to.
    const bool in_place = k == 0 && (!alpha || rows >= tile::kRows);
    float* sums = in_place ? c : partial;
    const int64_t stride = in_place ? c_stride : kTileColumns;
    for (int column = 0; column < columns; column += 2 * kLanes) {
      const int column_tiles = columns - column > kLanes ? 2 : 1;
      kBlocks[2 * row_tiles + column_tiles - 3](alpha && in_place, rows - tile::kRows, a + 2 * k, a_stride,
                                                panel + k * panel_stride + column, panel_stride,
                                                std::min(kMostLanes, lanes - k), sums + column, stride);
    }
    if (in_place) continue;
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < columns; i += kLanes)
        store(c + r * c_stride + i, load(c + r * c_stride + i) + load(partial + r * kTileColumns + i));
  }
}

#endif

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
      const bool whole = count == kLanes && i + kStep <= k;
      if (whole && !kConverted<T>) {
        load_transposed(rows + v * kLanes, i * int64_t{sizeof(T)}, lanes);
      } else if (whole) {
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) lanes[c] = load_lanes(rows[v * kLanes + c] + i, kStep);
        transpose(lanes);
      } else {
        for (int c = 0; c < kLanes; ++c) lanes[c] = c < count ? load_lanes(rows[v * kLanes + c] + i, k - i) : Vec{};
        transpose(lanes);
      }
      float* to = panel + i / kPerLane<T> * panel_stride + v * kLanes;
      const int64_t valid = std::min<int64_t>(kLanes, panel_lanes<T>(k - i));
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
                   int64_t panel_stride, int64_t lanes, const float* alpha, float* c, int64_t c_stride,
                   int64_t sum_lanes) {
#if defined(__AMX_BF16__) || defined(POP_EMULATED_TILES)
  if constexpr (kTiles<T>)
    return multiply_on_tiles(rows, columns, a, a_stride, panel, panel_stride, lanes, alpha, c, c_stride);
#endif
  static constexpr auto kBlocks = block_table<T>(std::make_index_sequence<kVectorRows * kTileVecs>{});
  const int vecs = (columns + kLanes - 1) / kLanes;
  kBlocks[(rows - 1) * kTileVecs + vecs - 1](a, a_stride, panel, panel_stride, lanes, alpha, c, c_stride, sum_lanes);
}

template <typename T>
void multiply_dots(int64_t rows, int columns, const Factor<T>* x, int64_t x_stride, const T* const* weights, int64_t k,
                   float* c, int64_t c_stride) {
  using Columns = decltype(&dot_columns<T, 1, false>);
  static constexpr Columns kLong[kDotRows] = {dot_columns<T, 1, false>, dot_columns<T, 2, false>,
                                              dot_columns<T, 3, false>, dot_columns<T, 4, false>};
  static constexpr Columns kShorter[kDotRows] = {dot_columns<T, 1, true>, dot_columns<T, 2, true>,
                                                 dot_columns<T, 3, true>, dot_columns<T, 4, true>};
  const Columns* table = k <= kShort<T> ? kShorter : kLong;
  for (int j = 0; j < columns; j += kLanes) {
    for (int64_t r = 0; r < rows; r += kDotRows)
      table[std::min<int64_t>(kDotRows, rows - r) - 1](
          x + r * x_stride, x_stride, weights + j, std::min(kLanes, columns - j), k, c + r * c_stride + j, c_stride);
  }
}

void dot_factors(const bf16* x, int64_t k, float* to) {
  for (int64_t i = 0; i < k; i += 2 * kLanes) {
    Int pairs{};
    std::memcpy(&pairs, x + i, std::min<int64_t>(2 * kLanes, k - i) * sizeof(bf16));
    store(to + i, even(pairs));
    store(to + i + kLanes, odd(pairs));
  }
}

#define POP_INSTANTIATE(T)                                                                                          \
  template void pack_panel<T>(const T* const*, int, int64_t, float*, int64_t);                                      \
  template void multiply_tile<T>(int, int, const Factor<T>*, int64_t, const float*, int64_t, int64_t, const float*, \
                                 float*, int64_t, int64_t);                                                         \
  template void multiply_dots<T>(int64_t, int, const Factor<T>*, int64_t, const T* const*, int64_t, float*, int64_t);
POP_INSTANTIATE(float)
POP_INSTANTIATE(bf16)

}  // namespace pop::cpu::POP_ISA
