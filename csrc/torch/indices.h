#pragma once

// The values in index tensors, checked on the host: by the CPU operations always, by CUDA's on request, with copies.

#include <sstream>

#include "torch/arguments.h"

namespace pop::indices {

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream out;
  (out << ... << parts);
  arguments::fail(out.str());
}

inline void check_slots(const char* operation, const SlotMapping& slots, int64_t tokens, const PagedCache& cache) {
  for (int64_t t = 0; t < tokens; ++t)
    require(slots[t] >= -1 && slots[t] < cache.blocks * cache.block_size, "pop::", operation, ": slot_mapping[", t,
            "] is ", slots[t],
            ", expected -1 (no write) or a slot below blocks * block_size = ", cache.blocks * cache.block_size);
}

inline void check_ropes(const int32_t* rope_index, int64_t layers, int64_t ropes) {
  for (int64_t l = 0; l < layers; ++l)
    require(rope_index[l] >= 0 && rope_index[l] < ropes, "pop::project_kv: rope_index[", l, "] is ", rope_index[l],
            ", expected 0 to cos' number of ropes less one, ", ropes - 1);
}

inline void check_sequences(const Attention& a) {
  require(a.cu_seqlens_q[0] == 0, "pop::attention: cu_seqlens_q[0] is ", a.cu_seqlens_q[0], ", expected 0");
  require(a.cu_seqlens_q[a.sequences] == a.tokens, "pop::attention: cu_seqlens_q[", a.sequences, "] is ",
          a.cu_seqlens_q[a.sequences], ", expected query's number of tokens ", a.tokens);
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t queries = int64_t{a.cu_seqlens_q[s + 1]} - a.cu_seqlens_q[s], context = a.seqlens_k[s];
    require(queries >= 0 && queries <= a.max_seqlen_q, "pop::attention: cu_seqlens_q give sequence ", s, " ", queries,
            " queries, expected 0 to max_seqlen_q = ", a.max_seqlen_q);
    require((context == 0 || context >= queries) && context <= a.max_seqlen_k, "pop::attention: seqlens_k[", s, "] is ",
            context, ", expected 0 (padding), or at least its ", queries,
            " queries and at most max_seqlen_k = ", a.max_seqlen_k);
    for (int64_t b = 0; b * a.key_cache.block_size < context; ++b) {
      const int32_t block = a.block_tables[s * a.block_table_stride + b];
      require(block >= 0 && block < a.key_cache.blocks, "pop::attention: block_tables[", s, ", ", b, "] is ", block,
              ", expected a block of key_cache, 0 to ", a.key_cache.blocks - 1);
    }
  }
}

}  // namespace pop::indices
