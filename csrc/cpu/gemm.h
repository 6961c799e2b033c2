#pragma once

// y = x weight^T with an epilogue: the main loop of every projection; attention uses its parts.
//
// x is read as it lies where it can be (pairs of bf16, or floats), else copied once. The weight is stored as it lies in
// the checkpoint, too: up to kTileColumns of its rows are transposed into a panel [k][columns] that stays in cache
// while all of x passes by, which costs about 5 / tokens of the multiplication (on tiles ten times that, and several
// panels stay together); no second copy of the weights is ever kept. Few tokens (decode) take plain dot products
// instead: each weight is read once, nothing is packed. Both leave a block of fp32 sums in L1, and the operation's
// epilogue takes it from there.
//
// Sums over k are made in blocks, which are then added up: the rounding errors of a sum grow with the root of its
// length, and those of two short sums after each other are less than those of one long one.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/simd.h"
#include "cpu/tile.h"
#include "cpu/topology.h"
#include "pop/types.h"

namespace pop::cpu::POP_ISA {

// 6 x 4 accumulators of AVX-512's 32 registers, 6 x 2 of 16 elsewhere; on tiles, 2 x 2 of them twice.
inline constexpr int kVectorRows = 6;
template <typename T>
inline constexpr int kTileRows = kTiles<T> ? 2 * tile::kRows : kVectorRows;
inline constexpr int kTileVecs = kLanes == 16 ? 4 : 2;
inline constexpr int kTileColumns = kTileVecs * kLanes;
inline constexpr int64_t kFewTokens = 12;  // up to here dot products beat packing the weight
inline constexpr int64_t kSumLanes = 96;   // lanes of k in a block of the sum

/// How elements of T are multiplied: in pairs where the processor multiplies bf16, else as floats. A lane holds
/// kPerLane of them.
template <typename T>
inline constexpr int kPerLane = kBf16Dot && std::is_same_v<T, bf16> ? 2 : 1;
template <typename T>
using Factor = std::conditional_t<kPerLane<T> == 2, bf16, float>;
template <typename T>
inline constexpr bool kConverted = !std::is_same_v<T, Factor<T>>;  // bf16, multiplied as floats
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <typename T>
constexpr int64_t lanes_of(int64_t k) {
  return (k + kPerLane<T> - 1) / kPerLane<T>;
}
/// Lanes of a panel: whole tiles, zeros behind k.
template <typename T>
constexpr int64_t panel_lanes(int64_t k) {
  return round_up(lanes_of<T>(k), kTiles<T> ? tile::kPairs : 1);
}

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

/// body(i) for i in [0, count); whichever thread is free takes the next. Each holds a Scope meanwhile.
template <typename Scope = NoTiles, typename Body>
void parallel_for(const Threads& threads, int64_t count, Body&& body) {
  const int workers = static_cast<int>(std::min<int64_t>(threads.count, count));
  if (workers <= 1) {
    const Scope scope;
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
        const Scope scope;
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.body(i);
      },
      &shared);
}

/// panel[lane of k][column] = rows[column][k], whole vectors of columns; zeros where columns or k end inside a vector
/// or lane, or k inside a tile.
template <typename T>
void pack_panel(const T* const* rows, int columns, int64_t k, float* panel, int64_t panel_stride);

/// c[r][column] = (alpha ? alpha[r] c[r][column] : 0) + sum over lanes of a[r] panel[lane][column]; rows <=
/// kTileRows<T>, columns <= kTileColumns. Whole vectors of c are written and, without alpha, up to kTileRows<T> rows;
/// on tiles at least tile::kRows rows of a are read. The sum is made in blocks of sum_lanes; tiles have their own.
template <typename T>
void multiply_tile(int rows, int columns, const Factor<T>* a, int64_t a_stride, const float* panel,
                   int64_t panel_stride, int64_t lanes, const float* alpha, float* c, int64_t c_stride,
                   int64_t sum_lanes = kSumLanes);

/// c[r][column] = x[r] . weights[column], by dot products along k; x as dot_factors leaves it.
template <typename T>
void multiply_dots(int64_t rows, int columns, const Factor<T>* x, int64_t x_stride, const T* const* weights, int64_t k,
                   float* c, int64_t c_stride);

/// One row of x as multiply_dots reads it where kConverted: of every 2 kLanes elements first those at even places, then
/// those at odd ones, as a vector of bf16 falls into two of floats by a shift and a mask; zeros up to whole vectors.
void dot_factors(const bf16* x, int64_t k, float* to);

/// Whether x must be copied for multiply_tile: into floats, into whole lanes, or into the rows of a tile.
template <typename T>
constexpr bool needs_copy(int64_t tokens, int64_t k) {
  return kConverted<T> || k % kPerLane<T> != 0 || (kTiles<T> && tokens < tile::kRows);
}

/// A row of x as multiply_tile reads it, zeros up to a whole lane.
template <typename T>
void copy_row(const T* x, int64_t k, Factor<T>* to) {
  if constexpr (kConverted<T>) {
    for_each_vector(k, [&](int64_t i, auto n) { store(to + i, load(x + i, n), n); });
  } else {
    std::memcpy(to, x, k * sizeof(T));
    if (k % kPerLane<T>) to[k] = {};
  }
}

/// How many columns (rows of the weight) a block has: some panels that fit in half of a small L2 together, or for few
/// tokens long stretches of memory, two for each thread.
inline int block_columns(int64_t tokens, int64_t columns, int64_t k, int threads) {
  if (tokens > kFewTokens) {
    constexpr int64_t kPanelFloats = 48 * 1024, kMost = 32;
    return static_cast<int>(std::clamp<int64_t>(kPanelFloats / k / kTileColumns * kTileColumns, kTileColumns,
                                                std::max<int64_t>(kMost, kTileColumns)));
  }
  return static_cast<int>(std::clamp<int64_t>(round_up(columns / (2 * threads), kLanes), kLanes, 512));
}

/// How a multiplication falls into tasks: `group` blocks, whose panels a task packs and keeps, times one of `parts` of
/// the tokens.
struct Division {
  int64_t group, parts;
};

/// The division in which the busiest thread has the least to do: each task packs its panels, which costs as much as
/// pack_cost tokens. A smaller group, by which x passes more often, must be better by a thirtieth.
inline Division divide(int64_t tokens, int64_t blocks, int64_t most_blocks, int threads, int64_t rows,
                       int64_t pack_cost) {
  Division best{1, 1};
  int64_t best_cost = INT64_MAX;
  for (int64_t group = std::min(blocks, most_blocks); group > 0; --group) {
    int64_t bound = best_cost - best_cost / 30;
    for (int64_t parts = 1; parts <= std::max<int64_t>(1, tokens / 96) && parts <= 4 * threads; ++parts) {
      const int64_t rounds = ((blocks + group - 1) / group * parts + threads - 1) / threads;
      const int64_t cost = rounds * group * (round_up((tokens + parts - 1) / parts, rows) + pack_cost);
      if (cost < bound) best = {group, parts}, best_cost = bound = cost;
    }
  }
  return best;
}

/// The blocks of a weight, as an operation gives them to gemm: group j has columns(j) rows (at most max_columns), the
/// c-th being row(j, c).
template <typename Columns, typename Row>
struct Blocks {
  int64_t count;
  int max_columns;
  const Columns& columns;
  const Row& row;

  int64_t sums_stride() const { return round_up(max_columns, kTileColumns); }

  /// Where the rows of a block lie.
  template <typename T>
  const T** rows(int64_t block) const {
    struct Tag;
    const T** rows = scratch<Tag, const T*>(max_columns);
    for (int c = 0; c < columns(block); ++c) rows[c] = row(block, c);
    return rows;
  }
};

struct SumsTag;

template <typename T, typename Blocks, typename Epilogue>
void gemm_few_tokens(const Threads& threads, int64_t tokens, int64_t k, const T* x, int64_t x_stride,
                     const Blocks& blocks, Epilogue&& epilogue) {
  const Factor<T>* a;
  int64_t a_stride = x_stride;
  if constexpr (kConverted<T>) {
    struct Tag;
    a_stride = round_up(k, 2 * kLanes);
    float* copy = scratch<Tag, float>(kFewTokens * a_stride);
    for (int64_t t = 0; t < tokens; ++t) dot_factors(x + t * x_stride, k, copy + t * a_stride);
    a = copy;
  } else {
    a = x;
  }
  parallel_for(threads, blocks.count, [&](int64_t block) {
    float* sums = scratch<SumsTag, float>(kFewTokens * blocks.sums_stride());
    multiply_dots<T>(tokens, blocks.columns(block), a, a_stride, blocks.template rows<T>(block), k, sums,
                     blocks.sums_stride());
    epilogue(block, int64_t{0}, static_cast<int>(tokens), sums, blocks.sums_stride());
  });
}

/// Tokens [begin, end), whose factors begin at a.
template <typename T, typename Blocks, typename Epilogue>
void gemm_many_tokens(const Threads& threads, int64_t begin, int64_t end, int64_t k, const Factor<T>* a,
                      int64_t a_stride, const Blocks& blocks, Epilogue&& epilogue) {
  constexpr int kRows = kTileRows<T>;
  // Tiles multiply faster than memory brings x, which passes by all panels of a group before its next rows are read: a
  // group fills half of a second cache of 2 MB.
  constexpr int64_t kPackCost = kTiles<T> ? 56 : 6, kGroupFloats = kTiles<T> ? 256 * 1024 : 1, kMostBlocks = 64;
  const int64_t lanes = lanes_of<T>(k), depth = panel_lanes<T>(k), tokens = end - begin;
  const int64_t stride = blocks.sums_stride(), block_floats = stride * depth;
  const int64_t most_blocks = std::clamp<int64_t>(kGroupFloats / block_floats, 1, kMostBlocks);
  const auto [group, parts] = divide(tokens, blocks.count, most_blocks, threads.count, kRows, kPackCost);
  const int64_t part_tokens = round_up((tokens + parts - 1) / parts, kRows);

  parallel_for<TileScope<T>>(threads, (blocks.count + group - 1) / group * parts, [&](int64_t task) {
    const int64_t first_block = task / parts * group, last_block = std::min(blocks.count, first_block + group);
    const int64_t first = begin + task % parts * part_tokens, last = std::min(end, first + part_tokens);
    if (first >= last) return;
    struct PanelTag;
    // [group][columns / kTileColumns][depth][kTileColumns]
    float* panels = scratch<PanelTag, float>(group * block_floats);
    for (int64_t block = first_block; block < last_block; ++block) {
      const T** rows = blocks.template rows<T>(block);
      const int width = blocks.columns(block);
      for (int c = 0; c < width; c += kTileColumns)
        pack_panel<T>(rows + c, std::min(kTileColumns, width - c), k,
                      panels + (block - first_block) * block_floats + c * depth, kTileColumns);
    }
    const int64_t sums_size = std::max<int64_t>(kFewTokens, kRows) * stride;
    float* sums = scratch<SumsTag, float>(2 * sums_size);
    for (int64_t t = first; t < last; t += kRows) {
      const int count = static_cast<int>(std::min<int64_t>(kRows, last - t));
      // A tile's rows end where x ends: the last few tokens come with some before them, which are computed again.
      const int again = kTiles<T> ? static_cast<int>(std::clamp<int64_t>(tile::kRows - count, 0, t - begin)) : 0;
      const Factor<T>* x_rows = a + (t - begin - again) * a_stride;
      const auto multiply = [&](int64_t block, float* to) {
        const float* panel = panels + (block - first_block) * block_floats;
        const int width = blocks.columns(block);
        for (int c = 0; c < width; c += kTileColumns)
          multiply_tile<T>(again + count, std::min(kTileColumns, width - c), x_rows, a_stride, panel + c * depth,
                           kTileColumns, lanes, nullptr, to + c, stride);
      };
      // The tile unit works through what it was given while the vector units finish the block before.
      for (int64_t block = first_block; block <= last_block; ++block) {
        if (block < last_block) multiply(block, sums + (block & 1) * sums_size);
        if (block > first_block)
          epilogue(block - 1, t, count, sums + ((block - 1) & 1) * sums_size + again * stride, stride);
      }
    }
  });
}

/// x [tokens, k] times the blocks of a weight. The sums of block j reach epilogue(j, first_token, count, sums, stride)
/// a few tokens at a time, in fp32, its to overwrite.
template <typename T, typename Columns, typename Row, typename Epilogue>
void gemm(const Threads& threads, int64_t tokens, int64_t k, const T* x, int64_t x_stride, int64_t block_count,
          int max_columns, Columns&& columns, Row&& row, Epilogue&& epilogue) {
  if (tokens == 0 || block_count == 0) return;
  const Blocks<std::remove_reference_t<Columns>, std::remove_reference_t<Row>> blocks{block_count, max_columns, columns,
                                                                                      row};
  if (tokens <= kFewTokens) return gemm_few_tokens<T>(threads, tokens, k, x, x_stride, blocks, epilogue);
  // Two threads of a core would wait for one tile unit, each with a panel in the cache they share. (Attention keeps all
  // threads: half of its time goes into exponentials.)
  const Threads workers = kTiles<T> ? one_thread_per_core(threads) : threads;
  if (!needs_copy<T>(tokens, k)) {
    if constexpr (!kConverted<T>) gemm_many_tokens<T>(workers, 0, tokens, k, x, x_stride, blocks, epilogue);
    return;
  }
  // The copies are of some 1000 tokens at a time, so that they stay small and cost little packing.
  constexpr int64_t kCopiedTokens = 1024, kTokensPerTask = 32;
  struct Tag;
  const int64_t copies = (tokens + kCopiedTokens - 1) / kCopiedTokens, stride = lanes_of<T>(k) * kPerLane<T>;
  const int64_t size = (tokens + copies - 1) / copies;
  Factor<T>* copy = scratch<Tag, Factor<T>>(std::max<int64_t>(size, tile::kRows) * stride);
  for (int64_t begin = 0; begin < tokens; begin += size) {
    const int64_t end = std::min(tokens, begin + size);
    parallel_for(threads, (end - begin + kTokensPerTask - 1) / kTokensPerTask, [&](int64_t task) {
      const int64_t first = begin + task * kTokensPerTask;
      for (int64_t t = first; t < std::min(end, first + kTokensPerTask); ++t)
        copy_row<T>(x + t * x_stride, k, copy + (t - begin) * stride);
    });
    gemm_many_tokens<T>(workers, begin, end, k, copy, stride, blocks, epilogue);
  }
}

}  // namespace pop::cpu::POP_ISA
