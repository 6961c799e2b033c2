// CUTLASS 3.x: an SM80 collective (cp.async multistage, predicated) made of CuTe atoms, against float64.
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cmath>
#include <cstdio>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/default_epilogue.hpp>
#include <cutlass/gemm/collective/collective_mma.hpp>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <random>
#include <vector>

using namespace cute;
using Element = cutlass::bfloat16_t;
using Products = TiledMMA<MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>, Layout<Shape<_2, _2, _1>>, Tile<_32, _32, _16>>;
using Swizzled = decltype(composition(Swizzle<2, 3, 3>{}, Layout<Shape<_8, _32>, Stride<_32, _1>>{}));
using FromShared = Copy_Atom<SM75_U32x4_LDSM_N, Element>;
using FromGlobal = decltype(make_tiled_copy(Copy_Atom<SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>, Element>{},
                                            Layout<Shape<_32, _4>, Stride<_4, _1>>{}, Layout<Shape<_1, _8>>{}));
using StrideA = cutlass::gemm::TagToStrideA_t<cutlass::layout::RowMajor>;
using StrideB = cutlass::gemm::TagToStrideB_t<cutlass::layout::ColumnMajor>;
using StrideC = cutlass::gemm::TagToStrideC_t<cutlass::layout::RowMajor>;
using Mainloop =
    cutlass::gemm::collective::CollectiveMma<cutlass::gemm::MainloopSm80CpAsync<3>, Shape<_128, _128, _32>, Element,
                                             StrideA, Element, StrideB, Products, FromGlobal, Swizzled, FromShared,
                                             cute::identity, FromGlobal, Swizzled, FromShared, cute::identity>;
using Epilogue =
    cutlass::epilogue::collective::DefaultEpilogue<float, StrideC, StrideC,
                                                   cutlass::epilogue::thread::LinearCombination<float, 1, float, float>,
                                                   cutlass::gemm::EpilogueDefault>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<
    cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>>;

int main() {
  const int m = 200, n = 136, k = 264;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<Element> a(m * k), b(n * k);
  for (auto& x : a) x = Element(normal(random));
  for (auto& x : b) x = Element(normal(random));
  Element *da, *db;
  float* dd;
  cudaMalloc(&da, a.size() * 2);
  cudaMalloc(&db, b.size() * 2);
  cudaMallocManaged(&dd, m * n * 4);
  cudaMemcpy(da, a.data(), a.size() * 2, cudaMemcpyHostToDevice);
  cudaMemcpy(db, b.data(), b.size() * 2, cudaMemcpyHostToDevice);
  Gemm gemm;
  const StrideA sa = make_stride(int64_t(k), _1{}, int64_t(0));
  const StrideC sc = make_stride(int64_t(n), _1{}, int64_t(0));
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k, 1}, {da, sa, db, sa}, {{1.f, 0.f}, dd, sc, dd, sc}};
  const auto status = gemm(arguments);
  const cudaError_t error = cudaDeviceSynchronize();
  if (status != cutlass::Status::kSuccess || error) {
    printf("%s, %s\n", cutlassGetStatusString(status), cudaGetErrorString(error));
    return 1;
  }
  double worst = 0;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) sum += double(float(a[i * k + l])) * double(float(b[j * k + l]));
      worst = std::max(worst, std::abs(sum - dd[i * n + j]) / (1 + std::abs(sum)));
    }
  printf("%dx%dx%d error %.2e\n", m, n, k, worst);
  return worst > 1e-4;
}
