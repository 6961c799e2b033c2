#include "check.h"

__global__ void nothing() {}
__global__ void __launch_bounds__(64) small() {}
__global__ void wild(int* p) { *p = 1; }
__global__ void check(int n) { assert(n == 3); }
__global__ void speak(int n) { printf("%d %s %5.2f %c %llu %%\n", n, "text", 1.5, 'x', 1ull << 40); }
int main() {
  int* p = nullptr;
  EXPECT(cudaMalloc(nullptr, 4) == cudaErrorInvalidValue &&
         cudaMemcpy(nullptr, &p, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
  EXPECT(cudaPeekAtLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue &&
         cudaGetLastError() == cudaSuccess);
  EXPECT(!strcmp(cudaGetErrorString(cudaErrorInvalidValue), "invalid argument") &&
         !strcmp(cudaGetErrorName(cudaErrorIllegalAddress), "cudaErrorIllegalAddress"));
  nothing<<<0, 1>>>();
  EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
  nothing<<<1, 1025>>>();
  EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
  small<<<1, 65>>>();
  EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
  nothing<<<1, 1, 100000>>>();
  EXPECT(cudaGetLastError() == cudaErrorInvalidValue);
  EXPECT(cudaStreamSynchronize((cudaStream_t)0x12340) == cudaErrorInvalidResourceHandle &&
         cudaEventRecord((cudaEvent_t)&p) == cudaErrorInvalidResourceHandle);
  EXPECT(cudaLaunchKernel((void*)&p, 1, 1, nullptr, 0, 0) == cudaErrorInvalidDeviceFunction &&
         cudaSetDevice(1) == cudaErrorInvalidDevice);
  OK(cudaMalloc(&p, 64));
  EXPECT(cudaMemcpy(p, (void*)0x10, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidValue &&
         cudaMemcpy(p, &p, 65, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
  size_t huge = ~size_t(0) / 2;
  void* q;
  EXPECT(cudaMalloc(&q, huge) == cudaErrorMemoryAllocation);
  EXPECT(cudaGraphicsUnregisterResource(nullptr) == cudaErrorNotSupported);
  cudaGetLastError();
  speak<<<1, 2>>>(4);
  OK(cudaDeviceSynchronize());
  wild<<<1, 1>>>((int*)64);
  EXPECT(cudaDeviceSynchronize() == cudaErrorIllegalAddress && cudaMalloc(&p, 4) == cudaErrorIllegalAddress);
  OK(cudaDeviceReset());
  check<<<1, 2>>>(3);
  OK(cudaDeviceSynchronize());
  check<<<1, 2>>>(4);
  EXPECT(cudaDeviceSynchronize() == cudaErrorAssert);
  OK(cudaDeviceReset());
  int value;
  OK(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0));
  cudaDeviceProp prop;
  OK(cudaGetDeviceProperties(&prop, 0));
  EXPECT(value == prop.multiProcessorCount);
  printf("%d.%d %d %zu\n", prop.major, prop.minor, value, prop.sharedMemPerBlockOptin);
  OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&value, small, 64, 0));
  EXPECT(value == 32);
  cudaFuncAttributes fa;
  OK(cudaFuncGetAttributes(&fa, small));
  EXPECT(fa.maxThreadsPerBlock == 64);
}
