// rms_norm of hidden states, with the residual after it where the model has sandwich norms.

#include "pop/rms_norm.h"

#include "bench.h"

namespace {

using namespace bench;

void run(Bench& b, const Model& model, int64_t tokens) {
  const int64_t hidden = model.hidden, count = tokens * hidden;
  const bool residual = model.sandwich_norms;
  const double bytes = 2.0 * static_cast<double>((2 + residual) * count) + 4.0 * static_cast<double>(hidden);
  const int sets = b.sets(bytes);
  Buffer<bf16> x(random_values<bf16>(count), sets), added(random_values<bf16>(residual ? count : 0), sets);
  Buffer<float> weight(random_values<float>(hidden, 0.2f, 1), sets);
  Buffer<bf16> y(count, sets);
  b.run(model, {.part = residual ? "and residual" : "",
                .tokens = tokens,
                .shape = shape(tokens, hidden),
                .operations = 0,
                .bytes = bytes,
                .rounding = kUnit,
                .tolerance = 0.05 * kUnit,
                .launch =
                    [&](int set, cudaStream_t s) {
                      pop::cuda::rms_norm({.dtype = pop::DType::kBFloat16,
                                           .tokens = tokens,
                                           .hidden = hidden,
                                           .x = x[set],
                                           .x_stride = hidden,
                                           .weight = weight[set],
                                           .eps = kEps,
                                           .residual = residual ? added[set] : nullptr,
                                           .residual_stride = hidden,
                                           .y = y[set]},
                                          s);
                    },
                .download = [&] { y.download(); },
                .output =
                    [&](uint64_t random) {
                      const int64_t at = static_cast<int64_t>(random % static_cast<uint64_t>(count));
                      const double squares = dot(x, at / hidden * hidden, x, at / hidden * hidden, hidden).value;
                      const double scale = 1 / std::sqrt(squares / static_cast<double>(hidden) + double{kEps});
                      Expected e;
                      e.value = x.at(at) * scale * weight.at(at % hidden);
                      e.magnitude = std::abs(e.value);
                      if (residual) e.value += added.at(at), e.magnitude += std::abs(added.at(at));
                      return std::pair(y.at(at), e);
                    }});
}

}  // namespace

int main(int argc, char** argv) { return bench::main("rms_norm", argc, argv, run); }
