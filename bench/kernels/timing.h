#pragma once

// Time on the device, and the multiplication of cuBLAS, where it is installed, to time beside ours.

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "data.h"

namespace bench {

struct Times {  // seconds
  double median, p10, p90;
};

/// Of one launch: median and spread over `samples` runs of a graph of `launches` launches, which rotate through the
/// sets.
inline Times time_launches(const std::function<void(int set, cudaStream_t)>& launch, int rotation, cudaStream_t stream,
                           int launches, int samples) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaEvent_t begin, end;
  for (int set = 0; set < rotation; ++set) launch(set, stream);  // warms up, and opts kernels in before the capture
  BENCH_OK(cudaStreamSynchronize(stream));
  BENCH_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) launch(i % rotation, stream);
  BENCH_OK(cudaStreamEndCapture(stream, &graph));
  BENCH_OK(cudaGraphInstantiate(&executable, graph, 0));
  BENCH_OK(cudaEventCreate(&begin));
  BENCH_OK(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = -2; i < samples; ++i) {  // two more to warm up
    BENCH_OK(cudaEventRecord(begin, stream));
    BENCH_OK(cudaGraphLaunch(executable, stream));
    BENCH_OK(cudaEventRecord(end, stream));
    BENCH_OK(cudaEventSynchronize(end));
    float milliseconds;
    BENCH_OK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 0) seconds.push_back(milliseconds * 1e-3 / launches);
  }
  BENCH_OK(cudaEventDestroy(begin));
  BENCH_OK(cudaEventDestroy(end));
  BENCH_OK(cudaGraphExecDestroy(executable));
  BENCH_OK(cudaGraphDestroy(graph));
  std::sort(seconds.begin(), seconds.end());
  const auto quantile = [&](int percent) { return seconds[(seconds.size() - 1) * percent / 100]; };
  return {quantile(50), quantile(10), quantile(90)};
}

/// y [tokens, out] = x weight^T in bf16 through cublasGemmEx, whose library is opened while the program runs.
class Cublas {
 public:
  explicit Cublas(cudaStream_t stream) {
    void* const library = dlopen("libcublas.so.13", RTLD_NOW);
    if (!library) return;
    const auto create = reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasCreate_v2"));
    const auto set_stream = reinterpret_cast<int (*)(void*, cudaStream_t)>(dlsym(library, "cublasSetStream_v2"));
    const auto set_workspace = reinterpret_cast<int (*)(void*, void*, size_t)>(dlsym(library, "cublasSetWorkspace_v2"));
    const auto multiply = reinterpret_cast<Multiply>(dlsym(library, "cublasGemmEx"));
    if (!create || !set_stream || !set_workspace || !multiply || create(&handle_)) return;
    // A workspace of its own (the size that cuBLAS advises for Hopper), so that nothing is allocated under capture.
    constexpr size_t kWorkspace = 32 << 20;
    BENCH_OK(cudaMalloc(&workspace_, kWorkspace));
    if (!set_stream(handle_, stream) && !set_workspace(handle_, workspace_, kWorkspace)) multiply_ = multiply;
  }
  ~Cublas() { cudaFree(workspace_); }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  bool present() const { return multiply_; }

  void linear(int64_t tokens, int64_t in, int64_t out, const bf16* x, const bf16* weight, bf16* y) const {
    const float one = 1, zero = 0;
    // cuBLAS's matrices are column-major: y^T [out, tokens] = (weight^T [in, out])^T x^T [in, tokens].
    constexpr int kTransposed = 1, kPlain = 0, kCompute32F = 68, kDefaultAlgorithm = -1;
    const int n = static_cast<int>(tokens), m = static_cast<int>(out), k = static_cast<int>(in);
    const int status = multiply_(handle_, kTransposed, kPlain, m, n, k, &one, weight, CUDA_R_16BF, k, x, CUDA_R_16BF, k,
                                 &zero, y, CUDA_R_16BF, m, kCompute32F, kDefaultAlgorithm);
    if (status) throw std::runtime_error("cublasGemmEx: status " + std::to_string(status));
  }

 private:
  using Multiply = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType_t, int, const void*,
                           cudaDataType_t, int, const void*, void*, cudaDataType_t, int, int, int);
  void *handle_ = nullptr, *workspace_ = nullptr;
  Multiply multiply_ = nullptr;
};

}  // namespace bench
