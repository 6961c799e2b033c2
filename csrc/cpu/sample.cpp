#include "pop/sample.h"

#include <algorithm>
#include <vector>

namespace pop::cpu {
namespace {

using namespace sampling;

/// The smallest kept score: of those of at least `least`, from the largest down, the one at which the sum of what
/// `amount` gives each reaches `target`.
template <typename Amount>
uint32_t threshold_at(const std::vector<float>& scores, uint32_t least, uint64_t target, Amount amount) {
  uint32_t prefix = 0;
  uint64_t above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    uint64_t histogram[256] = {};
    for (const float x : scores) {
      const uint32_t key = order(x);
      if (key >= least && (shift == 24 || key >> (shift + 8) == prefix)) histogram[key >> shift & 255] += amount(x);
    }
    int digit = 255;
    while (digit > 0 && above + histogram[digit] < target) above += histogram[digit--];
    prefix = prefix << 8 | static_cast<uint32_t>(digit);
  }
  return std::max(prefix, least);
}

int64_t choose(const std::vector<float>& scores, const SampleSettings& s, double uniform) {
  const auto first =
      std::max_element(scores.begin(), scores.end(), [](float a, float b) { return order(a) < order(b); });
  const float largest = *first;
  if (order(largest) == 0) return -1;
  if (!(s.temperature > 0)) return first - scores.begin();
  if (!std::isfinite(largest)) return -1;
  uint32_t threshold = 1;
  if (s.top_k >= 1 && s.top_k < static_cast<float>(scores.size()))
    threshold = threshold_at(scores, threshold, static_cast<uint64_t>(s.top_k), [](float) { return 1; });
  const auto total = [&](float min_p) {
    uint64_t sum = 0;
    for (const float x : scores) sum += kept_weight(x, largest, threshold, min_p);
    return sum;
  };
  if (s.top_p < 1) {
    const uint64_t target = std::max<uint64_t>(1, share_up(s.top_p, total(0)));
    threshold = threshold_at(scores, threshold, target, [&](float x) { return kept_weight(x, largest, threshold, 0); });
  }
  uint64_t rest = share(uniform, total(s.min_p));
  for (size_t i = 0; i < scores.size(); ++i) {
    const uint64_t w = kept_weight(scores[i], largest, threshold, s.min_p);
    if (rest < w) return static_cast<int64_t>(i);
    rest -= w;
  }
  return first - scores.begin();  // min_p above 1: nothing but the largest
}

}  // namespace

void sample(const Sample& p) {
  std::vector<float> scores(p.vocabulary);
  for (int64_t b = 0; b < p.rows; ++b) {
    const SampleSettings s = p.settings ? p.settings[b] : SampleSettings{0, 0, 1, 0, 1};
    uint8_t* seen = p.seen ? p.seen + b * p.vocabulary : nullptr;
    for (int64_t i = 0; i < p.vocabulary; ++i) scores[i] = score(p.logits[b * p.logits_stride + i], seen && seen[i], s);
    const int64_t draw = p.step ? draw_of(*p.step, p.draws) : 0;
    p.tokens[b] = choose(scores, s, p.uniforms ? p.uniforms[draw * p.rows + b] : 0);
    if (seen && p.tokens[b] >= 0) seen[p.tokens[b]] = 1;
  }
}

}  // namespace pop::cpu
