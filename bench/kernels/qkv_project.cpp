// qkv_project: queries, keys and values of a layer, with their norms where the model has them, RoPE, and the cache.

#include "pop/qkv_project.h"

#include "bench.h"

namespace {

using namespace bench;

void run(Bench& b, const Model& model, int64_t tokens) {
  const int64_t in = model.hidden, size = model.head_size, queries = model.query_heads, keys = model.kv_heads;
  const int64_t heads = queries + 2 * keys, blocks = cache_blocks(tokens), cached = blocks * kCacheBlock * keys * size;
  const double bytes = 2.0 * static_cast<double>(tokens * in + heads * size * in + tokens * heads * size) +
                       4.0 * static_cast<double>(tokens * size) + 8.0 * static_cast<double>(tokens);
  const int sets = b.sets(bytes);
  Buffer<bf16> x(random_values<bf16>(tokens * in), sets);
  Buffer<bf16> weight(random_values<bf16>(heads * size * in, 1 / std::sqrt(static_cast<float>(in))), sets);
  Buffer<float> norms(random_values<float>(2 * size, 0.2f, 1), sets);  // of q, then of k
  Buffer<float> cosines(angles(1, tokens, size, std::cos), sets), sines(angles(1, tokens, size, std::sin), sets);
  const std::vector<int64_t> slot = reversed_slots(tokens);
  Buffer<int64_t> slot_mapping(slot, sets);
  Buffer<bf16> query(tokens * queries * size, sets), key_cache(cached, sets), value_cache(cached, sets);
  b.run(model, {.part = model.qk_norm ? "with norms" : "",
                .tokens = tokens,
                .shape = shape(tokens, heads * size, in),
                .operations = 2.0 * static_cast<double>(tokens) * static_cast<double>(heads * size * in),
                .bytes = bytes,
                .rounding = kUnit,
                .tolerance = 0.05 * kUnit,
                .launch =
                    [&](int set, cudaStream_t s) {
                      pop::cuda::qkv_project({.dtype = pop::DType::kBFloat16,
                                              .tokens = tokens,
                                              .in = in,
                                              .query_heads = queries,
                                              .x = x[set],
                                              .x_stride = in,
                                              .weight = weight[set],
                                              .bias = nullptr,
                                              .q_norm = model.qk_norm ? norms[set] : nullptr,
                                              .k_norm = model.qk_norm ? norms[set] + size : nullptr,
                                              .eps = kEps,
                                              .cos = cosines[set],
                                              .sin = sines[set],
                                              .slot_mapping = {slot_mapping[set]},
                                              .key_cache = paged_cache(key_cache[set], blocks, keys, size),
                                              .value_cache = paged_cache(value_cache[set], blocks, keys, size),
                                              .query = query[set]},
                                             s);
                    },
                .download = [&] { query.download(), key_cache.download(), value_cache.download(); },
                .output =
                    [&](uint64_t random) {
                      const int64_t at = static_cast<int64_t>(random % static_cast<uint64_t>(tokens * heads * size));
                      const int64_t token = at / (heads * size), head = at / size % heads, element = at % size;
                      std::vector<Expected> sums;
                      for (int64_t i = 0; i < size; ++i)
                        sums.push_back(dot(x, token * in, weight, (head * size + i) * in, in));
                      const bool is_query = head < queries, is_value = head >= queries + keys;
                      if (!is_value)
                        sums = finish_head(sums, model.qk_norm ? &norms : nullptr, is_query ? 0 : size, cosines, sines,
                                           token * size / 2);
                      const int64_t in_cache = (slot[token] * keys + (head - queries) % keys) * size + element;
                      const double value = is_query   ? query.at((token * queries + head) * size + element)
                                           : is_value ? value_cache.at(in_cache)
                                                      : key_cache.at(in_cache);
                      return std::pair(value, sums[element]);
                    }});
}

}  // namespace

int main(int argc, char** argv) { return bench::main("qkv_project", argc, argv, run); }
