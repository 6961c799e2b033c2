// y = act(x gate^T) * (x up^T): one multiplication, in whose tiles eight rows of the gate alternate with eight of up.

#include "cuda/multiply.h"
#include "cuda/sums.h"
#include "pop/gated_linear.h"

namespace pop::cuda {
namespace {

constexpr const char* kName = "gated_linear";

struct Gate {
  static constexpr bool kPaired = true;

  int64_t columns;  // of y
  bool gelu;
  void* y;

  __device__ int64_t weight_row(int tile, int width, int r) const {
    const int64_t column = int64_t{tile} * (width / 2) + r / 16 * 8 + r % 8;
    return column < columns ? column + (r & 8 ? columns : 0) : -1;
  }

  /// SiLU is g sigmoid(g); tanh-GELU is g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)), without cancellation.
  __device__ float combine(float gate, float up) const {
    const float z = gelu ? 1.5957691216f * (gate + 0.044715f * gate * gate * gate) : gate;
    return __fdividef(gate, 1.0f + __expf(-z)) * up;
  }

  template <typename T, int kRows, int kColumns, int kThreads>
  __device__ void finish(const float* sums, int token0, int tokens, int tile) const {
    for (int unit = threadIdx.x % kThreads; unit < kRows * (kColumns / 8); unit += kThreads) {
      const int row = unit / (kColumns / 8), chunk = unit % (kColumns / 8), token = token0 + row;
      const int64_t column = int64_t{tile} * kColumns + chunk * 8;
      if (token >= tokens || column >= columns) continue;
      float v[8];
      load_sums(v, sums + row * (kColumns + kSumsPadding), chunk);
      *reinterpret_cast<Vector*>(static_cast<T*>(y) + token * columns + column) = pack<T>(v);
    }
  }
};

template <typename T>
void run(const GatedLinear& a, Stream stream) {
  using Skinny = SkinnyShapes<SkinnyTile<8, 32>, SkinnyTile<16, 32>, SkinnyTile<32, 32>, SkinnyTile<64, 32>>;
  const GemmParameters<Gate> p{.tokens = static_cast<int>(a.tokens),
                               .k = static_cast<int>(a.in),
                               .x = a.x,
                               .x_stride = a.x_stride,
                               .weight = a.weight,
                               .rows = 2 * a.out,
                               .weight_stride = a.weight_stride,
                               .epilogue = {a.out, a.activation == Activation::kGeluTanh, a.y}};
  multiply<T>(kName, Skinny{}, p, 1, stream);
}

}  // namespace

void gated_linear(const GatedLinear& a, Stream stream) {
  if (a.tokens == 0 || a.out == 0) return;
  a.dtype == DType::kBFloat16 ? run<bf16>(a, stream) : run<fp16>(a, stream);
}

}  // namespace pop::cuda
