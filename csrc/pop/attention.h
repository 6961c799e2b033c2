#pragma once

#include "pop/types.h"

namespace pop {

/// Causal grouped-query attention over a paged cache. Sequence s has the queries [cu_seqlens_q[s], cu_seqlens_q[s +
/// 1]), which are the last of its seqlens_k[s] tokens; query i of the context sees key j iff (j <= i, or both carry
/// the same span id >= 0) and (window_size == 0 or j > i - window_size). A sequence of seqlens_k[s] = 0 is padding: its
/// rows of the output are zeros.
struct Attention {
  DType dtype;
  int64_t tokens, sequences, query_heads;
  const void* query;  // [tokens, query_heads, head_size], contiguous in head_size
  int64_t query_token_stride, query_head_stride;
  PagedCache key_cache, value_cache;
  const int32_t* block_tables;  // [sequences, >= blocks of the longest context]
  int64_t block_table_stride;
  const int32_t* cu_seqlens_q;  // [sequences + 1]
  const int32_t* seqlens_k;     // [sequences]
  int64_t max_seqlen_q, max_seqlen_k;
  float softmax_scale;
  int64_t window_size;
  const int32_t* spans;  // [sequences, >= max_seqlen_k] or null
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
