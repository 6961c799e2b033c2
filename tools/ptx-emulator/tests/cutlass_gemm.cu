// A CUTLASS device GEMM, chosen by macros, against float64: D = A B, A row-major, B column-major. Arguments: M N K
// split repetitions.
#include <cutlass/gemm/device/gemm_splitk_parallel.h>
#include <cutlass/gemm/device/gemm_universal.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#ifndef GEMM_ELEMENT
#define GEMM_ELEMENT cutlass::bfloat16_t
#endif
#ifndef GEMM_OUTPUT
#define GEMM_OUTPUT GEMM_ELEMENT
#endif
#ifndef GEMM_TILE
#define GEMM_TILE 128, 128, 32
#endif
#ifndef GEMM_WARP
#define GEMM_WARP 64, 64, 32
#endif
#ifndef GEMM_MMA
#define GEMM_MMA 16, 8, 16
#endif
#ifndef GEMM_STAGES
#define GEMM_STAGES 4
#endif
#ifndef GEMM_ALIGN
#define GEMM_ALIGN 8
#endif
#ifndef GEMM_CLASS
#define GEMM_CLASS cutlass::arch::OpClassTensorOp
#endif
#ifndef GEMM_SWIZZLE
#define GEMM_SWIZZLE cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>
#endif
#ifndef GEMM_OUTPUT_ALIGN
#define GEMM_OUTPUT_ALIGN GEMM_ALIGN
#endif

using Shape = cutlass::gemm::GemmShape<GEMM_TILE>;
using Epilogue = cutlass::epilogue::thread::LinearCombination<GEMM_OUTPUT, GEMM_OUTPUT_ALIGN, float, float>;
#ifdef GEMM_PARALLEL
using Gemm = cutlass::gemm::device::GemmSplitKParallel<
    GEMM_ELEMENT, cutlass::layout::RowMajor, GEMM_ELEMENT, cutlass::layout::ColumnMajor, GEMM_OUTPUT,
    cutlass::layout::RowMajor, float, GEMM_CLASS, cutlass::arch::Sm80, Shape, cutlass::gemm::GemmShape<GEMM_WARP>,
    cutlass::gemm::GemmShape<GEMM_MMA>, Epilogue>;
#else
using Gemm = cutlass::gemm::device::GemmUniversal<
    GEMM_ELEMENT, cutlass::layout::RowMajor, GEMM_ELEMENT, cutlass::layout::ColumnMajor, GEMM_OUTPUT,
    cutlass::layout::RowMajor, float, GEMM_CLASS, cutlass::arch::Sm80, Shape, cutlass::gemm::GemmShape<GEMM_WARP>,
    cutlass::gemm::GemmShape<GEMM_MMA>, Epilogue, GEMM_SWIZZLE, GEMM_STAGES, GEMM_ALIGN, GEMM_ALIGN>;
#endif

template <class T>
T* upload(const std::vector<T>& host) {
  T* device;
  cudaMalloc(&device, host.size() * sizeof(T));
  cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice);
  return device;
}

int main(int argc, char** argv) {
  const auto argument = [&](int k, int otherwise) { return argc > k ? atoi(argv[k]) : otherwise; };
  const int m = argument(1, 512), n = argument(2, m), k = argument(3, m), split = argument(4, 1),
            repeat = argument(5, 1);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<GEMM_ELEMENT> a(size_t(m) * k), b(size_t(n) * k);
  std::vector<GEMM_OUTPUT> d(size_t(m) * n);
  for (auto& x : a) x = GEMM_ELEMENT(normal(random));
  for (auto& x : b) x = GEMM_ELEMENT(normal(random));
  GEMM_ELEMENT *da = upload(a), *db = upload(b);
  GEMM_OUTPUT* dd = upload(d);
#ifdef GEMM_PARALLEL
  typename Gemm::Arguments arguments({m, n, k}, {da, k}, {db, k}, {dd, n}, {dd, n}, {1.f, 0.f}, split);
#else
  typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k}, split, {1.f, 0.f}, da, db, dd,
                                     dd, int64_t(m) * k, int64_t(n) * k, int64_t(m) * n, int64_t(m) * n, k, k, n, n);
#endif
  const size_t bytes = Gemm::get_workspace_size(arguments);
  void* workspace = nullptr;
  if (bytes) cudaMalloc(&workspace, bytes);
  Gemm gemm;
  double best = 1e9;
  for (int r = 0; r < repeat; ++r) {
    const auto began = std::chrono::steady_clock::now();
    const auto status = gemm(arguments, workspace);
    const cudaError_t error = cudaDeviceSynchronize();
    if (status != cutlass::Status::kSuccess || error) {
      printf("%s, %s\n", cutlassGetStatusString(status), cudaGetErrorString(error));
      return 1;
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  cudaMemcpy(d.data(), dd, d.size() * sizeof(GEMM_OUTPUT), cudaMemcpyDeviceToHost);
  // Every output of small problems, a sample of large ones, corners included.
  double worst = 0;
  const size_t samples = std::min<size_t>(d.size(), 20000);
  for (size_t s = 0; s < samples; ++s) {
    const size_t at = samples == d.size() ? s : s < 100 ? d.size() - 1 - s : random() % d.size();
    const size_t row = at / n, column = at % n;
    double sum = 0, size = 0;
    for (int j = 0; j < k; ++j) {
      const double product = double(float(a[row * k + j])) * double(float(b[column * k + j]));
      sum += product;
      size += std::abs(product);
    }
    worst = std::max(worst, std::abs(sum - double(float(d[at]))) / (std::abs(sum) + size / 256));
  }
  printf("%dx%dx%d error %.2e seconds %.4f", m, n, k, worst, best);
  if (void* totals = dlsym(RTLD_DEFAULT, "ptx_emulator_totals")) {
    unsigned long launches, instructions;
    double seconds;
    reinterpret_cast<void (*)(unsigned long*, unsigned long*, double*)>(totals)(&launches, &instructions, &seconds);
    printf(" warp instructions %lu rate %.2f million a second", instructions / repeat, instructions / seconds / 1e6);
  }
  printf("\n");
  return worst > 0.01;
}
