#pragma once

// Which form of the multiplication runs: the only place that chooses.

#include <algorithm>

#include "cuda/gemm.h"
#include "cuda/gemm_hopper.h"
#include "cuda/skinny_gemm.h"

namespace pop::cuda {

inline constexpr int kSkinnyTokens = 64;  // up to so many, reading the weight is what takes the time

using LargeTile = Tile<128, 128, 64, 64>;
using SmallTile = Tile<64, 128, 32, 64>;

/// Shapes for up to kSkinnyTokens, the fewest tokens first.
template <typename... Shape>
struct SkinnyShapes {};

template <typename T, typename Shape, typename Epilogue>
void launch_skinny(const char* operation, GemmParameters<Epilogue>& p, Stream stream) {
  p.column_tiles = static_cast<int>(ceil_div(p.rows, Shape::kColumns));
  launch<&skinny_gemm<T, Shape, Epilogue>>(operation, dim3(p.column_tiles), Shape::kThreads,
                                           Shape::template shared_bytes<Epilogue>(), stream, p);
}

/// All tokens and column tiles. K is divided among `splits` blocks of a tile.
template <typename T, typename Tile, typename Epilogue>
void launch_tiles(const char* operation, GemmParameters<Epilogue>& p, int splits, const Device& device, Stream stream) {
  // Three stages leave room for two blocks where a multiprocessor has 100 KiB of shared memory.
  p.stages = device.shared_per_block >= 160 * 1024 ? 4 : 3;
  p.split_k = ceil_div(ceil_div(p.k, splits), kTileK) * kTileK;
  p.column_tiles = static_cast<int>(ceil_div(p.rows, Tile::kColumns));
  const dim3 grid(ceil_div(p.tokens, Tile::kRows) * p.column_tiles, splits);
  launch<&tile_gemm<T, Tile, Epilogue>>(operation, grid, Tile::kThreads,
                                        Tile::template shared_bytes<Epilogue>(p.stages), stream, p);
}

/// Whether large tiles finish first: they multiply more for each byte, small ones fill the device more evenly.
template <typename Large, typename Small>
bool prefer_large(int64_t tokens, int64_t rows, const Device& device) {
  const auto rounds = [&](int tile_rows, int tile_columns, int blocks) {
    return ceil_div(ceil_div(tokens, tile_rows) * ceil_div(rows, tile_columns), device.multiprocessors * blocks);
  };
  return rounds(Large::kRows, Large::kColumns, Large::kBlocks) * 64 * Large::kBlocks <=
         rounds(Small::kRows, Small::kColumns, Small::kBlocks) * 36 * Small::kBlocks;
}

/// The Hopper tiles that finish first: the narrow ones fill the device more evenly, but read more for each sum. Those
/// of 256 columns only, where these are what a tile must hold.
template <typename T, int kLeastColumns, typename Epilogue>
void launch_hopper(const char* operation, const GemmParameters<Epilogue>& p, const Device& device, Stream stream) {
  using Wide = HopperTile<256>;
  const auto rounds = [&](int columns) {
    return ceil_div(ceil_div(p.tokens, Wide::kRows) * ceil_div(p.rows, columns), device.multiprocessors);
  };
  if constexpr (kLeastColumns <= 128) {
    if (rounds(128) * 11 < rounds(256) * 20)
      return launch_hopper_tiles<T, HopperTile<128>>(operation, p, device.multiprocessors, stream);
  }
  launch_hopper_tiles<T, Wide>(operation, p, device.multiprocessors, stream);
}

/// The first of the skinny shapes that holds all tokens; beyond them, tiles: Hopper's where the
/// device has them. With `splits` above 1, small tiles.
template <typename T, typename Large = LargeTile, typename Small = SmallTile, typename Epilogue, typename... Shape>
void multiply(const char* operation, SkinnyShapes<Shape...>, GemmParameters<Epilogue> p, int splits, Stream stream) {
  if (p.tokens <= kSkinnyTokens) {
    bool launched = false;
    const auto try_shape = [&]<typename S>(std::type_identity<S>) {
      if (launched || p.tokens > S::kTokens) return;
      launch_skinny<T, S>(operation, p, stream);
      launched = true;
    };
    (try_shape(std::type_identity<Shape>{}), ...);
    return;
  }
  const Device device = current_device(operation);
  if (splits == 1 && runs_sm90a(operation) && boxes_take(p.x, p.tokens, p.k, p.x_stride) &&
      boxes_take(p.weight, p.rows, p.k, p.weight_stride))
    return launch_hopper<T, Small::kColumns>(operation, p, device, stream);
  if (splits == 1 && prefer_large<Large, Small>(p.tokens, p.rows, device))
    launch_tiles<T, Large>(operation, p, splits, device, stream);
  else
    launch_tiles<T, Small>(operation, p, splits, device, stream);
}

}  // namespace pop::cuda
