// gated_linear: gate and up projections and the activation.

#include "pop/gated_linear.h"

#include "bench.h"

namespace {

using namespace bench;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void run(Bench& b, const Model& model, int64_t tokens) {
  const int64_t in = model.hidden, out = model.intermediate;
  const double bytes = 2.0 * static_cast<double>(tokens * in + 2 * out * in + tokens * out);
  const int sets = b.sets(bytes);
  Buffer<bf16> x(random_values<bf16>(tokens * in), sets);
  Buffer<bf16> weight(random_values<bf16>(2 * out * in, 1 / std::sqrt(static_cast<float>(in))), sets);
  Buffer<bf16> y(tokens * out, sets);
  b.run(model,
        {.part = model.gelu ? "tanh-GELU" : "SiLU",
         .tokens = tokens,
         .shape = shape(tokens, 2 * out, in),
         .operations = 4.0 * static_cast<double>(tokens) * static_cast<double>(out * in),
         .bytes = bytes,
         .rounding = kUnit,
         .tolerance = 0.05 * kUnit,
         .launch =
             [&](int set, cudaStream_t s) {
               pop::cuda::gated_linear({.dtype = pop::DType::kBFloat16,
                                        .tokens = tokens,
                                        .in = in,
                                        .out = out,
                                        .x = x[set],
                                        .x_stride = in,
                                        .weight = weight[set],
                                        .weight_stride = in,
                                        .activation = model.gelu ? pop::Activation::kGeluTanh : pop::Activation::kSiLU,
                                        .y = y[set]},
                                       s);
             },
         .download = [&] { y.download(); },
         .output =
             [&](uint64_t random) {
               const int64_t at = static_cast<int64_t>(random % static_cast<uint64_t>(tokens * out));
               const int64_t row = at / out * in, column = at % out;
               const Expected gate = dot(x, row, weight, column * in, in);
               const Expected up = dot(x, row, weight, (out + column) * in, in);
               const double g = gate.value;
               const double argument = model.gelu ? 2 * std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g) : g;
               return std::pair(y.at(at), Expected{g * sigmoid(argument) * up.value, gate.magnitude * up.magnitude});
             }});
}

}  // namespace

int main(int argc, char** argv) { return bench::main("gated_linear", argc, argv, run); }
