#pragma once

// y = x weight^T with an epilogue: the main loop of every projection; attention uses its parts.
//
// x is read as it lies, broadcasting a lane (a float, or a pair of bf16) at a time. The weight is stored as it lies in
// the checkpoint, too: up to kTileColumns of its rows are transposed into a panel [k][columns] that stays in cache
// while all of x passes by, which costs about 5 / tokens of the multiplication; no second copy of the weights is ever
// kept. Few tokens (decode) take plain dot products instead: each weight is read once, nothing is packed. Both leave a
// tile of fp32 sums in L1, and the operation's epilogue takes it from there.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/simd.h"
#include "pop/types.h"

namespace pop::cpu::POP_ISA {

// 6 x 4 accumulators of AVX-512's 32 registers, 6 x 2 of 16 elsewhere.
inline constexpr int kTileRows = 6;
inline constexpr int kTileVecs = kLanes == 16 ? 4 : 2;
inline constexpr int kTileColumns = kTileVecs * kLanes;
inline constexpr int64_t kFewTokens = 12;  // up to here dot products beat packing the weight

/// How elements of T are multiplied: in pairs where the processor multiplies bf16, else as floats. A lane holds
/// kPerLane of them.
template <typename T>
inline constexpr int kPerLane = kBf16Dot && std::is_same_v<T, bf16> ? 2 : 1;
template <typename T>
using Factor = std::conditional_t<kPerLane<T> == 2, bf16, float>;
template <typename T>
constexpr int64_t lanes_of(int64_t k) {
  return (k + kPerLane<T> - 1) / kPerLane<T>;
}
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// Memory of one thread that lives as long as the thread, so that a warm call allocates nothing.
template <typename Tag, typename T>
T* scratch(int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<T, Free> data;
  thread_local int64_t capacity = 0;
  if (count > capacity) {
    capacity = 0;
    data.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) & ~size_t{63})));
    if (!data) throw std::bad_alloc();
    capacity = count;
  }
  return data.get();
}

/// body(i) for i in [0, count); whichever thread is free takes the next.
template <typename Body>
void parallel_for(const Threads& threads, int64_t count, Body&& body) {
  const int workers = static_cast<int>(std::min<int64_t>(threads.count, count));
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Shared {
    std::atomic<int64_t> next;
    int64_t count;
    std::remove_reference_t<Body>& body;
  } shared{{0}, count, body};
  threads.run(
      workers,
      [](int, void* context) {
        auto& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.body(i);
      },
      &shared);
}

/// panel[lane of k][column] = rows[column][k], whole vectors of columns; zeros where columns or k end inside a vector
/// or lane.
template <typename T>
void pack_panel(const T* const* rows, int columns, int64_t k, float* panel, int64_t panel_stride);

/// c[r][column] = (alpha ? alpha[r] c[r][column] : 0) + sum over lanes of a[r] panel[lane][column]; rows <= kTileRows,
/// columns <= kTileColumns. Whole vectors of c are written.
template <typename T>
void multiply_tile(int rows, int columns, const Factor<T>* a, int64_t a_stride, const float* panel,
                   int64_t panel_stride, int64_t lanes, const float* alpha, float* c, int64_t c_stride);

/// c[r][column] = x[r] . weights[column], by dot products along k.
template <typename T>
void multiply_dots(int64_t rows, int columns, const T* x, int64_t x_stride, const T* const* weights, int64_t k,
                   float* c, int64_t c_stride);

/// Rows [0, count) of x in the form that multiply_tile broadcasts: x itself where it already is, else a copy.
template <typename T>
const Factor<T>* as_factors(const T* x, int64_t x_stride, int64_t count, int64_t k, int64_t& stride) {
  if constexpr (std::is_same_v<T, float>) {
    stride = x_stride;
    return x;
  } else {
    if (kPerLane<T> == 2 && k % 2 == 0) {
      stride = x_stride;
      return reinterpret_cast<const Factor<T>*>(x);
    }
    struct Tag;
    stride = lanes_of<T>(k) * kPerLane<T>;
    Factor<T>* copy = scratch<Tag, Factor<T>>(count * stride);
    for (int64_t r = 0; r < count; ++r) {
      Factor<T>* to = copy + r * stride;
      const T* from = x + r * x_stride;
      if constexpr (kPerLane<T> == 2) {
        std::memcpy(to, from, k * sizeof(T));
        to[k] = bf16{0};
      } else {
        for_each_vector(k, [&](int64_t i, auto n) { store(to + i, load(from + i, n), n); });
      }
    }
    return copy;
  }
}

/// How many columns (rows of the weight) a block has: a tile's, or for few tokens long stretches of memory, two for
/// each thread.
inline int block_columns(int64_t tokens, int64_t columns, int threads) {
  if (tokens > kFewTokens) return kTileColumns;
  return static_cast<int>(std::clamp<int64_t>(round_up(columns / (2 * threads), kLanes), kLanes, 512));
}

/// Into how many parts to divide the tokens, so that blocks x parts load all threads alike while each part is worth
/// packing the weight.
inline int64_t token_parts(int64_t tokens, int64_t blocks, int threads) {
  constexpr int64_t kPackCost = 6;  // in tokens
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t parts = 1; parts <= std::max<int64_t>(1, tokens / 96) && parts <= 4 * threads; ++parts) {
    const int64_t rounds = (blocks * parts + threads - 1) / threads;
    const int64_t cost = rounds * (round_up((tokens + parts - 1) / parts, kTileRows) + kPackCost);
    if (cost < best_cost) best = parts, best_cost = cost;
  }
  return best;
}

/// x [tokens, k] times `blocks` groups of weight rows. Group j has columns(j) rows (at most max_columns), the c-th
/// being row(j, c); its sums reach epilogue(j, first_token, count, sums, stride) a few tokens at a time, in fp32, its
/// to overwrite.
template <typename T, typename Columns, typename Row, typename Epilogue>
void gemm(const Threads& threads, int64_t tokens, int64_t k, const T* x, int64_t x_stride, int64_t blocks,
          int max_columns, Columns&& columns, Row&& row, Epilogue&& epilogue) {
  if (tokens == 0 || blocks == 0) return;
  const int64_t lanes = lanes_of<T>(k), sums_stride = round_up(max_columns, kTileColumns);
  const bool few = tokens <= kFewTokens;
  const int64_t parts = few ? 1 : token_parts(tokens, blocks, threads.count);
  const int64_t part_tokens = round_up((tokens + parts - 1) / parts, kTileRows);

  parallel_for(threads, blocks * parts, [&](int64_t task) {
    const int64_t block = task / parts, first = task % parts * part_tokens,
                  last = std::min(tokens, first + part_tokens);
    if (first >= last) return;
    struct RowsTag;
    struct SumsTag;
    struct PanelTag;
    const int width = columns(block);
    const T** rows = scratch<RowsTag, const T*>(max_columns);
    for (int c = 0; c < width; ++c) rows[c] = row(block, c);
    float* sums = scratch<SumsTag, float>(kFewTokens * sums_stride);
    if (few) {
      multiply_dots<T>(tokens, width, x, x_stride, rows, k, sums, sums_stride);
      epilogue(block, int64_t{0}, static_cast<int>(tokens), sums, sums_stride);
      return;
    }
    float* panels = scratch<PanelTag, float>(sums_stride * lanes);  // [width / kTileColumns][lanes][kTileColumns]
    for (int c = 0; c < width; c += kTileColumns)
      pack_panel<T>(rows + c, std::min(kTileColumns, width - c), k, panels + c * lanes, kTileColumns);
    for (int64_t t = first; t < last; t += kTileRows) {
      const int count = static_cast<int>(std::min<int64_t>(kTileRows, last - t));
      int64_t stride;
      const Factor<T>* a = as_factors<T>(x + t * x_stride, x_stride, count, k, stride);
      for (int c = 0; c < width; c += kTileColumns)
        multiply_tile<T>(count, std::min(kTileColumns, width - c), a, stride, panels + c * lanes, kTileColumns, lanes,
                         nullptr, sums + c, sums_stride);
      epilogue(block, t, count, sums, sums_stride);
    }
  });
}

}  // namespace pop::cpu::POP_ISA
