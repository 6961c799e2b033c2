// y = x weight^T (+ bias) (+ residual): by tiles, for few tokens, or with K split over blocks.

#include "cuda/multiply.h"
#include "cuda/sums.h"
#include "pop/linear.h"

namespace pop::cuda {
namespace {

constexpr const char* kName = "linear";

struct Store {
  static constexpr bool kPaired = false;

  int64_t columns;
  const void *bias, *residual;
  int64_t residual_stride;
  void* y;
  bool y_is_float32;
  float* partial;  // [splits, tokens, columns] where K is split, else null

  __device__ int64_t weight_row(int tile, int width, int r) const {
    const int64_t row = int64_t{tile} * width + r;
    return row < columns ? row : -1;
  }

  /// Eight columns of a token, of which `count` exist.
  template <typename T>
  __device__ void store(float (&v)[8], int64_t token, int64_t column, int count) const {
    const T* const b = bias ? static_cast<const T*>(bias) + column : nullptr;
    const T* const r = residual ? static_cast<const T*>(residual) + token * residual_stride + column : nullptr;
    const int64_t at = token * columns + column;
    if (columns % 8 == 0) {
      if (b) add<T>(v, *reinterpret_cast<const Vector*>(b));
      if (r) add<T>(v, *reinterpret_cast<const Vector*>(r));
      if (y_is_float32)
        store_floats(static_cast<float*>(y) + at, v);
      else
        *reinterpret_cast<Vector*>(static_cast<T*>(y) + at) = pack<T>(v);
      return;
    }
    // A row of y may start anywhere.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= count) break;
      if (b) v[i] += static_cast<float>(b[i]);
      if (r) v[i] += static_cast<float>(r[i]);
      if (y_is_float32)
        static_cast<float*>(y)[at + i] = v[i];
      else
        static_cast<T*>(y)[at + i] = T(v[i]);
    }
  }

  template <typename T, int kRows, int kColumns, int kThreads>
  __device__ void finish(const float* sums, int token0, int tokens, int tile) const {
    for (int unit = threadIdx.x % kThreads; unit < kRows * (kColumns / 8); unit += kThreads) {
      const int row = unit / (kColumns / 8), chunk = unit % (kColumns / 8), token = token0 + row;
      const int64_t column = int64_t{tile} * kColumns + chunk * 8;
      if (token >= tokens || column >= columns) continue;
      float v[8];
      load_sums(v, sums + row * (kColumns + kSumsPadding), chunk);
      if (partial) {
        float* const to = partial + (int64_t{blockIdx.y} * tokens + token) * columns + column;
        store_floats(to, v);  // columns is a multiple of 8 here
      } else {
        store<T>(v, token, column, static_cast<int>(min(int64_t{8}, columns - column)));
      }
    }
  }
};

struct CombineParameters {
  int64_t tokens;
  int splits;
  Store store;
};

/// y from the sums of the splits, added in their order.
template <typename T>
__global__ void combine_splits(const __grid_constant__ CombineParameters p) {
  const int64_t chunks = p.store.columns / 8, unit = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (unit >= p.tokens * chunks) return;
  float v[8] = {};
  for (int s = 0; s < p.splits; ++s) {
    const float* const from = p.store.partial + (s * p.tokens * chunks + unit) * 8;
    add(v, load_floats(from));
  }
  p.store.store<T>(v, unit / chunks, unit % chunks * 8, 8);
}

/// Into how many parts K goes: as many as fill the device with tiles, each at least 512 deep.
int splits(const Linear& a, const Device& device) {
  if (a.tokens <= kSkinnyTokens || a.out % 8) return 1;
  const int64_t tiles = ceil_div(a.tokens, SmallTile::kRows) * ceil_div(a.out, SmallTile::kColumns);
  return static_cast<int>(std::clamp<int64_t>(std::min(device.multiprocessors * 2 / tiles, a.in / 512), 1, 16));
}

template <typename T>
void run(const Linear& a, void* workspace, Stream stream) {
  using Skinny = SkinnyShapes<SkinnyTile<8, 16>, SkinnyTile<16, 16>, SkinnyTile<32, 32>, SkinnyTile<64, 32>>;
  const int parts = splits(a, current_device(kName));
  const Store store{a.out,
                    a.bias,
                    a.residual,
                    a.residual_stride,
                    a.y,
                    a.y_is_float32,
                    parts > 1 ? static_cast<float*>(workspace) : nullptr};
  const GemmParameters<Store> p{.tokens = static_cast<int>(a.tokens),
                                .k = static_cast<int>(a.in),
                                .x = a.x,
                                .x_stride = a.x_stride,
                                .weight = a.weight,
                                .rows = a.out,
                                .weight_stride = a.weight_stride,
                                .epilogue = store};
  multiply<T>(kName, Skinny{}, p, parts, stream);
  if (parts > 1) {
    const auto blocks = static_cast<unsigned>(ceil_div(a.tokens * a.out / 8, 256));
    launch<&combine_splits<T>>(kName, dim3(blocks), 256, 0, stream, CombineParameters{a.tokens, parts, store});
  }
}

}  // namespace

int64_t linear_workspace(const Linear& a) {
  const int parts = splits(a, current_device(kName));
  return parts > 1 ? parts * a.tokens * a.out * int64_t{sizeof(float)} : 0;
}

void linear(const Linear& a, void* workspace, Stream stream) {
  if (a.tokens == 0 || a.out == 0) return;
  a.dtype == DType::kBFloat16 ? run<bf16>(a, workspace, stream) : run<fp16>(a, workspace, stream);
}

}  // namespace pop::cuda
