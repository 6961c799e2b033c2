// CUTLASS's device GEMMs beside linear, on the same operands in the same run: prompts, in three tile shapes of its
// multistage main loop.

#include <cutlass/gemm/device/gemm_universal.h>

#include "bench.h"

namespace {

using namespace bench;
using Element = cutlass::bfloat16_t;

template <typename Tile, typename Warp, int kStages>
using Gemm =
    cutlass::gemm::device::GemmUniversal<Element, cutlass::layout::RowMajor, Element, cutlass::layout::ColumnMajor,
                                         Element, cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp,
                                         cutlass::arch::Sm80, Tile, Warp, cutlass::gemm::GemmShape<16, 8, 16>,
                                         cutlass::epilogue::thread::LinearCombination<Element, 8, float, float>,
                                         cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages, 8, 8>;

using cutlass::gemm::GemmShape;
using Large = Gemm<GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 4>;
using Deep = Gemm<GemmShape<128, 128, 64>, GemmShape<64, 64, 64>, 3>;
using Small = Gemm<GemmShape<64, 128, 32>, GemmShape<32, 64, 32>, 4>;

template <typename G>
void launch(const pop::Linear& a, cudaStream_t stream) {
  const auto m = static_cast<int>(a.tokens), n = static_cast<int>(a.out), k = static_cast<int>(a.in);
  const void* const added = a.residual ? a.residual : a.y;  // not read where its factor is 0
  typename G::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k}, 1,
                                  {1.0f, a.residual ? 1.0f : 0.0f}, a.x, a.weight, added, a.y, 0, 0, 0, 0, k, k, n, n);
  const auto status = G()(arguments, nullptr, stream);
  if (status != cutlass::Status::kSuccess) throw std::runtime_error(cutlassGetStatusString(status));
}

void run(Bench& b, const Model& model, int64_t tokens) {
  if (tokens <= kMostDecodeTokens) return;
  const int64_t heads = model.query_heads * model.head_size, hidden = model.hidden;
  const bool residual = !model.sandwich_norms;
  const std::pair<const char*, int64_t> parts[] = {{"attention output", heads}, {"down", model.intermediate}};
  const std::pair<const char*, void (*)(const pop::Linear&, cudaStream_t)> peers[] = {
      {"CUTLASS 128x128x32 x4", launch<Large>},
      {"CUTLASS 128x128x64 x3", launch<Deep>},
      {"CUTLASS 64x128x32 x4", launch<Small>}};
  for (const auto& [part, in] : parts) {
    const int64_t depth = in, count = tokens * hidden;
    const double bytes = 2.0 * static_cast<double>(tokens * depth + hidden * depth + (1 + residual) * count);
    const int sets = b.sets(bytes);
    Buffer<bf16> x(random_values<bf16>(tokens * depth), sets), weight(random_values<bf16>(hidden * depth), sets);
    Buffer<bf16> added(random_values<bf16>(residual ? count : 0), sets), y(count, sets);
    const auto arguments = [&](int set) {
      return pop::Linear{
          pop::DType::kBFloat16,           tokens, depth,  hidden, x[set], depth, weight[set], depth, nullptr,
          residual ? added[set] : nullptr, hidden, y[set], false};
    };
    Buffer<char> workspace(pop::cuda::linear_workspace(arguments(0)), 1);
    for (const auto& [name, peer] : peers) {
      const auto launch_peer = peer;
      Case c{.part = part,
             .tokens = tokens,
             .shape = shape(tokens, hidden, depth),
             .operations = 2.0 * static_cast<double>(count) * static_cast<double>(depth),
             .bytes = bytes,
             .rounding = kUnit,
             .tolerance = 0.05 * kUnit,
             .launch = [&](int set, cudaStream_t s) { pop::cuda::linear(arguments(set), workspace[0], s); },
             .download = [&] { y.download(); },
             .output =
                 [&](uint64_t random) {
                   const int64_t at = static_cast<int64_t>(random % static_cast<uint64_t>(count));
                   Expected e = dot(x, at / hidden * depth, weight, at % hidden * depth, depth);
                   if (residual) e.value += added.at(at), e.magnitude += std::abs(added.at(at));
                   return std::pair(y.at(at), e);
                 },
             .peer = name,
             .peer_launch = [&, launch_peer](int set, cudaStream_t s) { launch_peer(arguments(set), s); }};
      b.run(model, c);
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return bench::main("linear beside CUTLASS", argc, argv, run); }
