#include <mutex>

#include "cuda/device.h"
#include "cuda/hopper.h"
#include "pop/device.h"

namespace pop::cuda {
namespace {

cudaFuncAttributes attributes(const Kernel& kernel) {
  cudaFuncAttributes result;
  check("load_kernels", cudaFuncGetAttributes(&result, kernel.function));
  return result;
}

/// Calls f for each kernel that the current device runs.
template <typename F>
void for_each_kernel(F&& f) {
  const bool sm90a = runs_sm90a("load_kernels");
  for (const Kernel* k = Kernel::first; k; k = k->next)
    if (sm90a || !k->sm90a) f(*k);
}

}  // namespace

int load_kernels() {
  static std::once_flag loaded[kMaxDevices];
  int device, count = 0;
  check("load_kernels", cudaGetDevice(&device));
  const auto load = [] { for_each_kernel(attributes); };
  if (device < kMaxDevices)
    std::call_once(loaded[device], load);
  else
    load();
  for_each_kernel([&](const Kernel&) { ++count; });
  return count;
}

Image loaded_image() {
  const Kernel* k = Kernel::first;
  while (k->sm90a) k = k->next;
  const cudaFuncAttributes found = attributes(*k);
  return {found.binaryVersion, found.ptxVersion};
}

bool capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  check("capturing", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void read(const char* operation, void* to, const void* from, size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(operation, cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
  check(operation, cudaStreamSynchronize(stream));
}

}  // namespace pop::cuda
