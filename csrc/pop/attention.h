#pragma once

#include "pop/types.h"

namespace pop {

/// Causal grouped-query attention over a paged cache. Sequence s has the queries [query_starts[s], query_starts[s +
/// 1]), which are the last of its context_lens[s] tokens; query i of the context sees key j iff (j <= i, or both carry
/// the same span id >= 0) and (window == 0 or j > i - window).
struct Attention {
  DType dtype;
  int64_t tokens, sequences, query_heads;
  const void* query;  // [tokens, query_heads, head_size], contiguous in head_size
  int64_t query_token_stride, query_head_stride;
  PagedCache key_cache, value_cache;
  const int32_t* block_tables;  // [sequences, >= blocks of the longest context]
  int64_t block_table_stride;
  const int32_t* query_starts;  // [sequences + 1]
  const int32_t* context_lens;  // [sequences]
  int64_t max_query_len, max_context_len;
  float scale;
  int64_t window;
  const int32_t* spans;  // [sequences, >= max_context_len] or null
  int64_t span_stride;
  void* out;  // [tokens, query_heads, head_size], contiguous
};

namespace cpu {
void attention(const Attention&, const Threads&);
}

namespace cuda {
/// Bytes of device memory that `attention` uses while it runs, on the current device; 0 for none.
int64_t attention_workspace(const Attention&);
void attention(const Attention&, void* workspace, Stream);
}  // namespace cuda

}  // namespace pop
