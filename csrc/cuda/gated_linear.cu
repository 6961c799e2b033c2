// y = act(x gate^T) * (x up^T): one multiplication, in whose tiles eight rows of the gate alternate with eight of up.

#include "cuda/gemm.h"
#include "cuda/skinny_gemm.h"
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
    for (int unit = threadIdx.x; unit < kRows * (kColumns / 8); unit += kThreads) {
      const int row = unit / (kColumns / 8), chunk = unit % (kColumns / 8), token = token0 + row;
      const int64_t column = int64_t{tile} * kColumns + chunk * 8;
      if (token >= tokens || column >= columns) continue;
      float v[8];
      load_sums(v, sums + row * (kColumns + kSumsPadding), chunk);
      *reinterpret_cast<Vector*>(static_cast<T*>(y) + token * columns + column) = pack<T>(v);
    }
  }
};

using Large = Tile<128, 128, 64, 64>;
using Small = Tile<64, 128, 32, 64>;

template <typename T>
void run(const GatedLinear& a, Stream stream) {
  GemmParameters<Gate> p{.tokens = static_cast<int>(a.tokens),
                         .k = static_cast<int>(a.in),
                         .x = a.x,
                         .x_stride = a.x_stride,
                         .weight = a.weight,
                         .weight_stride = a.weight_stride,
                         .epilogue = {a.out, a.activation == Activation::kGeluTanh, a.y}};
  if (a.tokens <= kSkinnyTokens) {
    p.column_tiles = ceil_div(a.out, 16);
    if (a.tokens <= 8)
      launch_skinny_gemm<T, SkinnyTile<8, 32>>(kName, p, stream);
    else if (a.tokens <= 16)
      launch_skinny_gemm<T, SkinnyTile<16, 32>>(kName, p, stream);
    else if (a.tokens <= 32)
      launch_skinny_gemm<T, SkinnyTile<32, 32>>(kName, p, stream);
    else
      launch_skinny_gemm<T, SkinnyTile<64, 32>>(kName, p, stream);
    return;
  }
  const Device device = current_device(kName);
  p.column_tiles = ceil_div(a.out, Large::kColumns / 2);
  if (prefer_large<Large, Small>(a.tokens, p.column_tiles, device))
    launch_tiles<T, Large>(kName, p, 1, stages(device), stream);
  else
    launch_tiles<T, Small>(kName, p, 1, stages(device), stream);
}

}  // namespace

void gated_linear(const GatedLinear& a, Stream stream) {
  if (a.tokens == 0 || a.out == 0) return;
  a.dtype == DType::kBFloat16 ? run<bf16>(a, stream) : run<fp16>(a, stream);
}

}  // namespace pop::cuda
