// project_kv: keys and values of all layers that prefill at two thirds of the depth skips.

#include "pop/project_kv.h"

#include "bench.h"

namespace {

using namespace bench;

void run(Bench& b, const Model& model, int64_t tokens) {
  const int64_t in = model.hidden, size = model.head_size, heads = model.kv_heads, layers = model.skipped();
  const int64_t rows = layers * 2 * heads * size, blocks = cache_blocks(tokens), ropes = model.window ? 2 : 1;
  const int64_t cached = blocks * kCacheBlock * heads * size;  // a layer's keys, or values
  const double bytes = 2.0 * static_cast<double>(tokens * in + rows * in + tokens * rows) +
                       4.0 * static_cast<double>(ropes * tokens * size) + 8.0 * static_cast<double>(tokens);
  const int sets = b.sets(bytes);
  Buffer<bf16> hidden(random_values<bf16>(tokens * in, 3), sets);
  Buffer<bf16> weight(random_values<bf16>(rows * in, 1 / std::sqrt(static_cast<float>(in))), sets);
  Buffer<float> norms(random_values<float>(layers * size, 0.2f, 1), sets);
  Buffer<float> cosines(angles(ropes, tokens, size, std::cos), sets),
      sines(angles(ropes, tokens, size, std::sin), sets);
  std::vector<int32_t> rope;
  for (int64_t l = 0; l < layers; ++l)
    rope.push_back(ropes > 1 && (model.layers - layers + l + 1) % model.window_period == 0);
  Buffer<int32_t> rope_index(rope, sets);
  const std::vector<int64_t> slot = reversed_slots(tokens);
  Buffer<int64_t> slot_mapping(slot, sets);
  Buffer<bf16> cache(layers * 2 * cached, sets);  // [layers, keys and values, blocks, kCacheBlock, heads, size]
  const auto arguments = [&](int set) {
    return pop::ProjectKv{.dtype = pop::DType::kBFloat16,
                          .tokens = tokens,
                          .in = in,
                          .layers = layers,
                          .hidden = hidden[set],
                          .hidden_stride = in,
                          .weight = weight[set],
                          .bias = nullptr,
                          .k_norm = model.qk_norm ? norms[set] : nullptr,
                          .eps = kEps,
                          .cos = cosines[set],
                          .sin = sines[set],
                          .rope_index = rope_index[set],
                          .slot_mapping = {slot_mapping[set]},
                          .key_caches = paged_cache(cache[set], blocks, heads, size),
                          .value_caches = paged_cache(cache[set] + cached, blocks, heads, size),
                          .key_layer_stride = 2 * cached,
                          .value_layer_stride = 2 * cached};
  };
  Buffer<char> workspace(pop::cuda::project_kv_workspace(arguments(0)), 1);
  b.run(model, {.part = std::to_string(layers) + " layers",
                .tokens = tokens,
                .shape = shape(tokens, rows, in),
                .operations = 2.0 * static_cast<double>(tokens) * static_cast<double>(rows * in),
                .bytes = bytes,
                .rounding = kUnit,
                .tolerance = 0.05 * kUnit,
                .launch = [&](int set, cudaStream_t s) { pop::cuda::project_kv(arguments(set), workspace[0], s); },
                .download = [&] { cache.download(); },
                .output =
                    [&](uint64_t random) {
                      const int64_t at = static_cast<int64_t>(random % static_cast<uint64_t>(tokens * rows));
                      const int64_t token = at / rows, row = at % rows, element = row % size, head = row / size;
                      const int64_t layer = head / (2 * heads), is_value = head / heads % 2;
                      const double squares = dot(hidden, token * in, hidden, token * in, in).value;
                      const double scale = 1 / std::sqrt(squares / static_cast<double>(in) + double{kEps});
                      std::vector<Expected> sums;
                      for (int64_t i = 0; i < size; ++i) {
                        const Expected e = dot(hidden, token * in, weight, (head * size + i) * in, in);
                        sums.push_back({scale * e.value, scale * e.magnitude});
                      }
                      if (!is_value)
                        sums = finish_head(sums, model.qk_norm ? &norms : nullptr, layer * size, cosines, sines,
                                           (rope[layer] * tokens + token) * size / 2);
                      const int64_t in_cache = (layer * 2 + is_value) * cached;
                      return std::pair(cache.at(in_cache + (slot[token] * heads + head % heads) * size + element),
                                       sums[element]);
                    }});
}

}  // namespace

int main(int argc, char** argv) { return bench::main("project_kv", argc, argv, run); }
