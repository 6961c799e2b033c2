// A CUTLASS 3.x GEMM for sm_90a, TMA and wgmma, chosen by macros, against float64: D = A B, A row-major, B
// column-major. Arguments: M N K repetitions.
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <random>
#include <vector>

#ifndef GEMM_ELEMENT
#define GEMM_ELEMENT cutlass::bfloat16_t
#endif
#ifndef GEMM_ACCUMULATOR
#define GEMM_ACCUMULATOR float
#endif
#ifndef GEMM_OUTPUT
#define GEMM_OUTPUT GEMM_ELEMENT
#endif
#ifndef GEMM_TILE
#define GEMM_TILE 64, 128, 64
#endif
#ifndef GEMM_SCHEDULE
#define GEMM_SCHEDULE Pingpong
#define GEMM_EPILOGUE
#endif
#ifndef GEMM_LAYOUT_B
#define GEMM_LAYOUT_B ColumnMajor
#endif
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

template <int... N>
using Tile = cute::Shape<cute::Int<N>...>;
using Element = GEMM_ELEMENT;
using Output = GEMM_OUTPUT;
using LayoutB = cutlass::layout::GEMM_LAYOUT_B;
using One = Tile<1, 1, 1>;
constexpr int kAlign = 16 / sizeof(Element), kAlignOut = 16 / sizeof(Output);
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile<GEMM_TILE>, One,
    cutlass::epilogue::collective::EpilogueTileAuto, GEMM_ACCUMULATOR, GEMM_ACCUMULATOR, void,
    cutlass::layout::RowMajor, kAlignOut, Output, cutlass::layout::RowMajor, kAlignOut,
    cutlass::epilogue::JOIN(TmaWarpSpecialized, GEMM_EPILOGUE)>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, kAlign, Element, LayoutB,
    kAlign, GEMM_ACCUMULATOR, Tile<GEMM_TILE>, One,
    cutlass::gemm::collective::StageCountAutoCarveout<sizeof(typename Epilogue::SharedStorage)>,
    cutlass::gemm::JOIN(KernelTmaWarpSpecialized, GEMM_SCHEDULE)>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

template <class T>
T* upload(const std::vector<T>& host) {
  T* device;
  cudaMalloc(&device, host.size() * sizeof(T));
  cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  return device;
}

int main(int argc, char** argv) {
  const auto argument = [&](int k, int otherwise) { return argc > k ? atoi(argv[k]) : otherwise; };
  const int m = argument(1, 512), n = argument(2, m), k = argument(3, m), repeat = argument(4, 1);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<Element> a(size_t(m) * k), b(size_t(n) * k);
  std::vector<Output> d(size_t(m) * n);
  const float scale = std::is_same_v<Element, int8_t> ? 20 : 1;
  for (auto& x : a) x = Element(scale * normal(random));
  for (auto& x : b) x = Element(scale * normal(random));
  Element *da = upload(a), *db = upload(b);
  Output* dd;
  cudaMalloc(&dd, d.size() * sizeof(Output));
  constexpr bool kColumns = std::is_same_v<LayoutB, cutlass::layout::ColumnMajor>;
  typename Kernel::StrideA stride_a{};
  typename Kernel::StrideB stride_b{};
  typename Kernel::StrideD stride_d{};
  cute::get<0>(stride_a) = k, cute::get<0>(stride_d) = n;
  cute::get<kColumns ? 0 : 1>(stride_b) = kColumns ? k : n;
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                     {m, n, k, 1},
                                     {da, stride_a, db, stride_b},
                                     {{}, nullptr, {}, dd, stride_d}};
  arguments.epilogue.thread.alpha = 1;
  arguments.epilogue.thread.beta = 0;
  const size_t bytes = Gemm::get_workspace_size(arguments);
  void* workspace = nullptr;
  if (bytes) cudaMalloc(&workspace, bytes);
  Gemm gemm;
  double best = 1e9;
  auto status = gemm.can_implement(arguments);
  for (int r = 0; r < repeat && status == cutlass::Status::kSuccess; ++r) {
    status = gemm.initialize(arguments, workspace);
    if (status != cutlass::Status::kSuccess) break;
    const auto began = std::chrono::steady_clock::now();
    status = gemm.run();
    if (cudaDeviceSynchronize() != cudaSuccess) status = cutlass::Status::kErrorInternal;
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  if (status != cutlass::Status::kSuccess) {
    printf("%s, %s\n", cutlassGetStatusString(status), cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  cudaMemcpy(d.data(), dd, d.size() * sizeof(Output), cudaMemcpyDeviceToHost);
  // Every output of small problems, a sample of large ones.
  double worst = 0;
  const size_t samples = std::min<size_t>(d.size(), 20000);
  for (size_t s = 0; s < samples; ++s) {
    const size_t at = samples == d.size() ? s : s < 100 ? d.size() - 1 - s : random() % d.size();
    const size_t row = at / n, column = at % n;
    double sum = 0, size = 0;
    for (int j = 0; j < k; ++j) {
      const size_t in_b = kColumns ? column * k + j : size_t(j) * n + column;
      const double product = double(float(a[row * k + j])) * double(float(b[in_b]));
      sum += product;
      size += std::abs(product);
    }
    worst = std::max(worst, std::abs(sum - double(float(d[at]))) / (std::abs(sum) + size / 256));
  }
  printf("%dx%dx%d error %.2e seconds %.4f\n", m, n, k, worst, best);
  return worst > 0.01;
}
