#include <mutex>

#include "cuda/device.h"
#include "pop/device.h"

namespace pop::cuda {
namespace {

cudaFuncAttributes attributes(const Kernel& kernel) {
  cudaFuncAttributes result;
  check("load_kernels", cudaFuncGetAttributes(&result, kernel.function));
  return result;
}

}  // namespace

int load_kernels() {
  static std::once_flag loaded[kMaxDevices];
  int device, count = 0;
  check("load_kernels", cudaGetDevice(&device));
  const auto load = [] {
    for (const Kernel* k = Kernel::first; k; k = k->next) attributes(*k);
  };
  if (device < kMaxDevices)
    std::call_once(loaded[device], load);
  else
    load();
  for (const Kernel* k = Kernel::first; k; k = k->next) ++count;
  return count;
}

Image loaded_image() {
  const cudaFuncAttributes found = attributes(*Kernel::first);
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
