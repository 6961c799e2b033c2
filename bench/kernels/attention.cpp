// attention: a prompt of one sequence; or for up to 64 tokens, as many sequences that decode one each. Models with
// sliding windows have both kinds of layers.

#include "pop/attention.h"

#include "bench.h"

namespace {

using namespace bench;

void run(Bench& b, const Model& model, int64_t tokens) {
  const bool decode = tokens <= kMostDecodeTokens;
  const int64_t size = model.head_size, heads = model.query_heads, kv_heads = model.kv_heads, group = heads / kv_heads;
  const int64_t context = !decode        ? tokens
                          : b.software() ? std::min(b.options.context, kCutContext)
                                         : b.options.context;
  const int64_t sequences = decode ? tokens : 1, queries = decode ? 1 : tokens, blocks = cache_blocks(context);
  const int64_t cached = sequences * blocks * kCacheBlock * kv_heads * size;
  std::vector<int64_t> windows{0};
  if (model.window) windows.push_back(model.window);
  for (const int64_t window : windows) {
    double pairs = 0, keys = 0;  // that queries see, of one sequence
    for (int64_t i = context - queries; i < context; ++i)
      pairs += static_cast<double>(window ? std::min(i + 1, window) : i + 1);
    keys = static_cast<double>(window ? std::min(context, queries - 1 + window) : context);
    const double bytes = 2.0 * (2.0 * static_cast<double>(tokens * heads * size) +
                                2.0 * static_cast<double>(sequences * kv_heads * size) * keys);
    const int sets = b.sets(bytes);
    Buffer<bf16> query(random_values<bf16>(tokens * heads * size), sets);
    Buffer<bf16> key_cache(random_values<bf16>(cached), sets), value_cache(random_values<bf16>(cached), sets);
    std::vector<int32_t> table, starts{0};
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t i = 0; i < blocks; ++i) table.push_back(static_cast<int32_t>((sequences - s) * blocks - 1 - i));
      starts.push_back(static_cast<int32_t>((s + 1) * queries));
    }
    Buffer<int32_t> block_tables(table, sets), cu_seqlens_q(starts, sets);
    Buffer<int32_t> seqlens_k(std::vector<int32_t>(sequences, static_cast<int32_t>(context)), sets);
    Buffer<bf16> out(tokens * heads * size, sets);
    const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(size)));
    const auto arguments = [&](int set) {
      return pop::Attention{.dtype = pop::DType::kBFloat16,
                            .tokens = tokens,
                            .sequences = sequences,
                            .query_heads = heads,
                            .query = query[set],
                            .query_token_stride = heads * size,
                            .query_head_stride = size,
                            .key_cache = paged_cache(key_cache[set], sequences * blocks, kv_heads, size),
                            .value_cache = paged_cache(value_cache[set], sequences * blocks, kv_heads, size),
                            .block_tables = block_tables[set],
                            .block_table_stride = blocks,
                            .cu_seqlens_q = cu_seqlens_q[set],
                            .seqlens_k = seqlens_k[set],
                            .max_seqlen_q = queries,
                            .max_seqlen_k = context,
                            .softmax_scale = scale,
                            .window_size = window,
                            .spans = nullptr,
                            .span_stride = 0,
                            .out = out[set]};
    };
    Buffer<char> workspace(pop::cuda::attention_workspace(arguments(0)), 1);
    b.run(model,
          {.part = std::string(decode ? "decode" : "prompt") + (window         ? ", sliding"
                                                                : model.window ? ", full"
                                                                               : ""),
           .tokens = tokens,
           .shape = shape(sequences, queries, context, heads, size),
           .operations = 4.0 * static_cast<double>(sequences * heads * size) * pairs,
           .bytes = bytes,
           .rounding = kUnit,
           .tolerance = 2 * kUnit,
           .launch = [&](int set, cudaStream_t s) { pop::cuda::attention(arguments(set), workspace[0], s); },
           .download = [&] { out.download(); },
           .output =
               [&](uint64_t random) {
                 const int64_t at = static_cast<int64_t>(random % static_cast<uint64_t>(tokens * heads * size));
                 const int64_t token = at / (heads * size), head = at / size % heads, element = at % size;
                 const int64_t sequence = token / queries, last = context - queries + token % queries;
                 double total = 0;
                 Expected e{};
                 for (int64_t j = window ? std::max<int64_t>(0, last - window + 1) : 0; j <= last; ++j) {
                   const int64_t block = table[sequence * blocks + j / kCacheBlock];
                   const int64_t key = ((block * kCacheBlock + j % kCacheBlock) * kv_heads + head / group) * size;
                   const double p = std::exp(double{scale} * dot(query, at - element, key_cache, key, size).value);
                   total += p;
                   e.value += p * value_cache.at(key + element);
                   e.magnitude += p * std::abs(value_cache.at(key + element));
                 }
                 return std::pair(out.at(at), Expected{e.value / total, e.magnitude / total});
               }});
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::main("attention", argc, argv, run); }
