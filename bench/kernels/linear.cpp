// linear: the projections back to the hidden state, with the residual where the model adds it there, and the logits.

#include "bench.h"

namespace {

using namespace bench;

void run(Bench& b, const Model& model, int64_t tokens) {
  struct Part {
    const char* name;
    int64_t in, out;
    bool residual, float32;
  };
  const bool residual = !model.sandwich_norms;
  std::vector<Part> parts{{"attention output", model.query_heads * model.head_size, model.hidden, residual, false},
                          {"down", model.intermediate, model.hidden, residual, false}};
  if (tokens <= kMostDecodeTokens) parts.push_back({"logits", model.hidden, model.vocabulary, false, true});
  for (const Part& p : parts) {
    const double bytes = 2.0 * static_cast<double>(tokens * p.in + p.out * p.in + p.residual * tokens * p.out) +
                         (p.float32 ? 4.0 : 2.0) * static_cast<double>(tokens * p.out);
    const int sets = b.sets(bytes);
    Buffer<bf16> x(random_values<bf16>(tokens * p.in), sets), weight(random_values<bf16>(p.out * p.in), sets);
    Buffer<bf16> added(random_values<bf16>(p.residual ? tokens * p.out : 0), sets);
    Buffer<bf16> y(p.float32 ? 0 : tokens * p.out, sets);
    Buffer<float> y32(p.float32 ? tokens * p.out : 0, sets);
    const auto arguments = [&](int set) {
      return pop::Linear{.dtype = pop::DType::kBFloat16,
                         .tokens = tokens,
                         .in = p.in,
                         .out = p.out,
                         .x = x[set],
                         .x_stride = p.in,
                         .weight = weight[set],
                         .weight_stride = p.in,
                         .bias = nullptr,
                         .residual = p.residual ? added[set] : nullptr,
                         .residual_stride = p.out,
                         .y = p.float32 ? static_cast<void*>(y32[set]) : y[set],
                         .y_is_float32 = p.float32};
    };
    Buffer<char> workspace(pop::cuda::linear_workspace(arguments(0)), 1);
    Case c{.part = p.name,
           .tokens = tokens,
           .shape = shape(tokens, p.out, p.in),
           .operations = 2.0 * static_cast<double>(tokens) * static_cast<double>(p.out * p.in),
           .bytes = bytes,
           .rounding = p.float32 ? 0x1p-24 : kUnit,
           .tolerance = p.float32 ? static_cast<double>(p.in) * 0x1p-24 : 0.05 * kUnit,  // float32 sums of `in`
           .launch = [&](int set, cudaStream_t s) { pop::cuda::linear(arguments(set), workspace[0], s); },
           .download = [&] { y.download(), y32.download(); },
           .output =
               [&](uint64_t random) {
                 const int64_t at = static_cast<int64_t>(random % static_cast<uint64_t>(tokens * p.out));
                 Expected e = dot(x, at / p.out * p.in, weight, at % p.out * p.in, p.in);
                 if (p.residual) e.value += added.at(at), e.magnitude += std::abs(added.at(at));
                 return std::pair(p.float32 ? y32.at(at) : y.at(at), e);
               }};
    // cuBLAS without residual and with bf16 out: what it does at least as fast as anything.
    const Cublas cublas(b.stream);
    Buffer<bf16> other(cublas.present() ? tokens * p.out : 0, sets);
    if (cublas.present() && !b.software()) {
      c.peer = "cuBLAS";
      c.peer_launch = [&](int set, cudaStream_t) {
        cublas.linear(tokens, p.in, p.out, x[set], weight[set], other[set]);
      };
    }
    b.run(model, c);
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::main("linear", argc, argv, run); }
