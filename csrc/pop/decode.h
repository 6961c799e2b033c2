#pragma once

#include "pop/types.h"

// What a decode step needs beside the layers, so that all of it can be captured in one graph: embeddings, the advance
// of positions and slots, and the rows of RoPE's tables.

namespace pop {

/// y[t] = scale * weight[token_ids[t]], rounded once; zeros for an id outside of [0, vocabulary).
struct Embedding {
  DType dtype;
  int64_t tokens, vocabulary, hidden;
  const int64_t* token_ids;
  const void* weight;
  int64_t weight_stride;
  float scale;
  void* y;  // contiguous
};

/// out[0, r, t, i] = cos[r, positions[axes[i], t], i] and out[1, ...] that of sin; axes may be null (all 0). Zeros for
/// a position outside of the tables.
struct RopeGather {
  int64_t ropes, table_rows, half, tokens, num_axes;
  const float *cos, *sin;    // [ropes, table_rows, half]
  const int64_t* positions;  // [num_axes, tokens]
  const int64_t* axes;       // [half] or null
  float* out;                // [2, ropes, tokens, half]
};

/// The next token of every sequence: where it goes. seqlens_k[s] counts the tokens so far, 0 marks a padded row, which
/// stays one: its slot is -1. Otherwise seqlens_k[s] grows by one, the new token's index n = seqlens_k[s] - 1 gives
/// positions[s] = n + shifts[s], and slot_mapping[s] is its slot by the block table; -1 where that has no column for
/// it. step, if not null, grows by one.
struct DecodeAdvance {
  int64_t sequences, columns, block_size;
  const int32_t* block_tables;
  int64_t block_table_stride;
  const int64_t* shifts;
  int32_t* seqlens_k;
  int64_t *positions, *slot_mapping;
  int32_t* step;
};

namespace cpu {
void embedding(const Embedding&);
void rope_gather(const RopeGather&);
void decode_advance(const DecodeAdvance&);
}  // namespace cpu

namespace cuda {
void embedding(const Embedding&, Stream);
void rope_gather(const RopeGather&, Stream);
void decode_advance(const DecodeAdvance&, Stream);
}  // namespace cuda

}  // namespace pop
