#pragma once

// What every kernel's host side needs: the current device's limits, and launches whose errors carry the operation's
// name.

#include <cuda_runtime.h>

#include <atomic>
#include <concepts>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "pop/types.h"

namespace pop::cuda {

template <std::integral N, std::integral By>
constexpr auto ceil_div(N n, By by) {
  return (n + by - 1) / by;
}

/// What to do about an error that is the installation's.
inline const char* advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      return "; the kernels need a GPU of compute capability 8.0 or later";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return "; update the NVIDIA driver to one for CUDA 13, or rebuild pop_ext with POP_CUDA_ARCHS set to this GPU's "
             "compute capability (such as 90), so that the driver need not compile PTX";
    default:
      return "";
  }
}

inline void check(const char* operation, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next operation does not report this one's error again
  throw std::runtime_error(std::string("pop::") + operation + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error) + advice(error));
}

inline constexpr int kMaxDevices = 64;

struct Device {
  int index, multiprocessors, shared_per_block;  // bytes, as a kernel may opt in to
};

inline Device current_device(const char* operation) {
  Device d;
  check(operation, cudaGetDevice(&d.index));
  check(operation, cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, d.index));
  check(operation, cudaDeviceGetAttribute(&d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, d.index));
  return d;
}

/// Every kernel that `launch` may run, in a list built before main.
struct Kernel {
  const void* function;
  bool sm90a;  // for that alone: see hopper.h
  const Kernel* next;

  Kernel(const void* f, bool sm90a) : function(f), sm90a(sm90a), next(first) { first = this; }
  static inline const Kernel* first = nullptr;
};
template <auto kKernel, bool kSm90a>
inline const Kernel registered{reinterpret_cast<const void*>(kKernel), kSm90a};

/// Launches kKernel(parameters), which is for sm_90a where they have a kSm90a; a kernel that takes more than 48 KiB of
/// shared memory opts in once per device.
template <auto kKernel, typename Parameters>
void launch(const char* operation, dim3 grid, dim3 block, int shared_bytes, Stream stream,
            const Parameters& parameters) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(Parameters)>);
  constexpr bool kSm90a = requires { Parameters::kSm90a; };
  const void* const kernel = registered<kKernel, kSm90a>.function;
  if (shared_bytes > 48 * 1024) {
    static std::atomic<int> opted_in[kMaxDevices];
    int device;
    check(operation, cudaGetDevice(&device));
    if (device >= kMaxDevices || opted_in[device].load(std::memory_order_relaxed) < shared_bytes) {
      check(operation, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
      if (device < kMaxDevices) opted_in[device].store(shared_bytes, std::memory_order_relaxed);
    }
  }
  // Its own result, and not cudaGetLastError(), which may be an error that another library left behind.
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(operation, cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream));
}

}  // namespace pop::cuda
