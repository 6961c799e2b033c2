#pragma once

// Shapes of real models, and how the PTX emulator's are cut.

#include <algorithm>
#include <cstdint>

namespace bench {

struct Model {
  const char* name;
  int64_t hidden, intermediate, layers, query_heads, kv_heads, head_size, vocabulary;
  bool qk_norm, gelu, sandwich_norms;  // sandwich norms: the residual is added after a norm, not by a projection
  int64_t window, window_period;       // all layers but every period-th see `window` keys; 0: all of them see all

  /// Layers that prefill at two thirds of the depth skips.
  int64_t skipped() const { return layers - (2 * layers + 1) / 3; }
};

// From the config.json (its text_config where it has one) of meta-llama/Llama-3.1-8B, Qwen/Qwen3-VL-8B-Instruct,
// google/gemma-3-4b-pt and HuggingFaceTB/SmolLM2-135M.
inline constexpr Model kModels[] = {
    {"Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256, false, false, false, 0, 0},
    {"Qwen3-VL-8B", 4096, 12288, 36, 32, 8, 128, 151936, true, false, false, 0, 0},
    {"Gemma-3-4B", 2560, 10240, 34, 8, 4, 256, 262208, true, true, true, 1024, 6},
    {"SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, false, false, false, 0, 0},
};
inline constexpr int64_t kDecodeTokens[] = {1, 8, 64}, kPromptTokens[] = {512, 2048, 8192};
inline constexpr int64_t kMostDecodeTokens = 64;  // more are a prompt
inline constexpr int64_t kDecodeContext = 4096;   // that each decoded token sees

/// The model with sizes that the PTX emulator can bear: ratios of heads and shapes of a head stay.
inline Model cut(Model m) {
  m.hidden = std::min<int64_t>(m.hidden, 2048);
  m.intermediate = std::min<int64_t>(m.intermediate, 2048);
  m.query_heads = m.query_heads / m.kv_heads * 2;
  m.kv_heads = 2;
  m.vocabulary = 4096;
  m.layers = 6;
  m.window = std::min<int64_t>(m.window, 192);
  return m;
}
inline constexpr int64_t kCutPrompt = 512, kCutContext = 1024;

}  // namespace bench
