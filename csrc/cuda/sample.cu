// A block a row. Greedy reads the row once; sampling again for the sum and the draw, top-k and top-p four times more
// each, as a radix search for the smallest score kept. The row, 0.5 MB for 128k tokens, stays in the L2 cache.

#include "cuda/device.h"
#include "pop/sample.h"

namespace pop::cuda {
namespace {

using namespace sampling;

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr uint32_t kAll = 0xffffffffu;

struct Shared {
  uint64_t warps[kWarps];
  uint64_t histogram[256];
  uint64_t sum;
  uint32_t prefix;
};

/// One row's scores; computed anew wherever they are read.
struct Scores {
  const float* logits;
  const uint8_t* seen;
  SampleSettings settings;
  int64_t count;
  __device__ float operator()(int64_t i) const { return score(logits[i], seen && seen[i], settings); }
};

template <typename Combine>
__device__ uint64_t reduce(uint64_t value, Shared& shared, Combine combine) {
#pragma unroll
  for (int o = 16; o > 0; o /= 2) value = combine(value, __shfl_xor_sync(kAll, value, o));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared.warps[0];
  for (int w = 1; w < kWarps; ++w) value = combine(value, shared.warps[w]);
  return value;
}

/// As on the CPU (cpu/sample.cpp): the smallest kept score, by its digits from the highest down.
template <typename Amount>
__device__ uint32_t threshold_at(const Scores& scores, uint32_t least, uint64_t target, Shared& shared, Amount amount) {
  uint64_t above = 0;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < 256; bin += kThreads) shared.histogram[bin] = 0;
    __syncthreads();
    uint32_t bin = 0;
    uint64_t pending = 0;  // a thread's neighbours in value go to the same bin: one atomic addition for a run of them
    for (int64_t i = threadIdx.x; i < scores.count; i += kThreads) {
      const float x = scores(i);
      const uint32_t key = order(x);
      if (key < least || (shift < 24 && key >> (shift + 8) != prefix)) continue;
      const uint32_t next = key >> shift & 255;
      if (next != bin && pending) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&shared.histogram[bin]), pending);
        pending = 0;
      }
      bin = next;
      pending += amount(x);
    }
    if (pending) atomicAdd(reinterpret_cast<unsigned long long*>(&shared.histogram[bin]), pending);
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      while (digit > 0 && above + shared.histogram[digit] < target) above += shared.histogram[digit--];
      shared.prefix = prefix << 8 | static_cast<uint32_t>(digit);
      shared.sum = above;
    }
    __syncthreads();
    prefix = shared.prefix, above = shared.sum;
  }
  return max(prefix, least);
}

/// The index at which the running sum of the kept weights exceeds `uniform` of their total, or `otherwise`. Each warp
/// has a stretch of the row; that in which the sum lies is looked through.
__device__ int64_t draw(const Scores& scores, float largest, uint32_t threshold, double uniform, int64_t otherwise,
                        Shared& shared) {
  const int64_t stretch = (scores.count + kThreads - 1) / kThreads * 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float min_p = scores.settings.min_p;
  const auto kept = [&](int64_t i) {
    return i < scores.count ? kept_weight(scores(i), largest, threshold, min_p) : uint64_t{0};
  };
  uint64_t sum = 0;
  for (int64_t i = warp * stretch + lane; i < min((warp + 1) * stretch, scores.count); i += 32) sum += kept(i);
#pragma unroll
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(kAll, sum, o);
  __syncthreads();
  if (lane == 0) shared.warps[warp] = sum;
  __syncthreads();
  uint64_t total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.warps[w];
  uint64_t rest = share(uniform, total);
  if (total == 0) return warp == 0 ? otherwise : -1;
  int chosen = 0;
  while (chosen < kWarps - 1 && rest >= shared.warps[chosen]) rest -= shared.warps[chosen++];
  if (warp != chosen) return -1;  // another warp's
  for (int64_t start = warp * stretch; start < (warp + 1) * stretch; start += 32) {
    uint64_t running = kept(start + lane);
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
      const uint64_t other = __shfl_up_sync(kAll, running, o);
      if (lane >= o) running += other;
    }
    const uint32_t beyond = __ballot_sync(kAll, rest < running);
    if (beyond) return start + __ffs(beyond) - 1;
    rest -= __shfl_sync(kAll, running, 31);
  }
  return otherwise;
}

__global__ __launch_bounds__(kThreads) void sample_kernel(const __grid_constant__ Sample p) {
  __shared__ Shared shared;
  const int64_t row = blockIdx.x;
  uint8_t* const seen = p.seen ? p.seen + row * p.vocabulary : nullptr;
  const SampleSettings settings = p.settings ? p.settings[row] : SampleSettings{0, 0, 1, 0, 1};
  const Scores scores{p.logits + row * p.logits_stride, seen, settings, p.vocabulary};

  uint64_t best = 0;  // the score's order, then the lowest index
  for (int64_t i = threadIdx.x; i < p.vocabulary; i += kThreads) {
    const uint64_t candidate = uint64_t{order(scores(i))} << 32 | (kAll - static_cast<uint32_t>(i));
    best = max(best, candidate);
  }
  best = reduce(best, shared, [](uint64_t a, uint64_t b) { return max(a, b); });
  const uint32_t key = static_cast<uint32_t>(best >> 32);
  const float largest = in_order(key);
  int64_t token = key == 0 ? int64_t{-1} : int64_t{kAll - static_cast<uint32_t>(best)};
  bool mine = threadIdx.x == 0;
  if (settings.temperature > 0 && key != 0) {
    if (isinf(largest)) {
      token = -1;
    } else {
      uint32_t threshold = 1;
      if (settings.top_k >= 1 && settings.top_k < static_cast<float>(p.vocabulary))
        threshold = threshold_at(scores, threshold, static_cast<uint64_t>(settings.top_k), shared,
                                 [](float) { return uint64_t{1}; });
      if (settings.top_p < 1) {
        uint64_t total = 0;
        for (int64_t i = threadIdx.x; i < p.vocabulary; i += kThreads)
          total += kept_weight(scores(i), largest, threshold, 0);
        total = reduce(total, shared, [](uint64_t a, uint64_t b) { return a + b; });
        const uint64_t target = max(uint64_t{1}, share_up(settings.top_p, total));
        threshold = threshold_at(scores, threshold, target, shared,
                                 [=](float x) { return kept_weight(x, largest, threshold, 0); });
      }
      const int64_t step = p.step ? draw_of(*p.step, p.draws) : 0;
      const int64_t drawn = draw(scores, largest, threshold, p.uniforms[step * p.rows + row], token, shared);
      mine = drawn >= 0 && threadIdx.x % 32 == 0;  // one warp's first lane; or all warps', with the same token
      token = drawn;
    }
  }
  __syncthreads();  // `seen` is read above
  if (!mine) return;
  p.tokens[row] = token;
  if (seen && token >= 0) seen[token] = 1;
}

}  // namespace

void sample(const Sample& a, Stream stream) {
  if (a.rows == 0) return;
  launch<&sample_kernel>("sample", dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), 0, stream, a);
}

}  // namespace pop::cuda
