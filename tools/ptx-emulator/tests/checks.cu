// What nvcc makes of broken and of right kernels: one mode each, chosen by the first argument.
#include <cooperative_groups.h>
#include <cuda_pipeline.h>
#include <dlfcn.h>

#include <string>

#include "check.h"

__global__ void accumulate(const float* x, float* out, int n) {
  float sum;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];  // accumulator
  out[threadIdx.x] = sum;
}
__global__ void every_other(float* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = 1;
}
__global__ void fill(float* out, float value) { out[blockIdx.x * blockDim.x + threadIdx.x] = value; }
__global__ void transpose(const float* x, float* out, bool barrier) {
  __shared__ float tile[16][17];
  tile[threadIdx.y][threadIdx.x] = x[threadIdx.y * 16 + threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.y * 16 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];  // transpose
}

// Right: the last block adds what the others wrote.
__device__ unsigned int blocks_done;
__global__ void reduce(const float* x, float* parts, float* out) {
  __shared__ float sums[4];
  __shared__ bool last;
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
    __threadfence();
    last = atomicAdd(&blocks_done, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int i = 0; i < gridDim.x; ++i) total += parts[i];
    *out = total;
  }
}
__global__ void rounds(float* x, int n) {
  auto grid = cooperative_groups::this_grid();
  const int i = grid.thread_rank();
  for (int round = 0; round < 3; ++round) {
    const float next = x[(i + 1) % n];
    grid.sync();
    x[i] = next;
    grid.sync();
  }
}
__global__ void pipeline(const float* x, float* out, int n) {
  __shared__ float stages[2][128];
  const int t = threadIdx.x, other = t ^ 64;
  float sum = 0;
  __pipeline_memcpy_async(&stages[0][t], x + t, 4);
  __pipeline_commit();
  for (int k = 0; k < n; ++k) {
    if (k + 1 < n) __pipeline_memcpy_async(&stages[(k + 1) % 2][t], x + (k + 1) * 128 + t, 4);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    sum += stages[k % 2][other];
    __syncthreads();
  }
  out[t] = sum;
}
struct Pair {
  char tag;
  float value;
};
__device__ __noinline__ float indirect(const float* values, int i) { return values[i & 7]; }
__global__ void local(const float* x, float* out, Pair* pairs, int n) {
  float values[8];
  for (int i = 0; i < 8; ++i) values[i] = x[(threadIdx.x + i) % n];
  Pair pair;  // its padding is copied, never written
  pair.tag = 1, pair.value = indirect(values, threadIdx.x);
  pairs[threadIdx.x] = pair;
  float late;
  if (threadIdx.x < n) late = pair.value * 2;
  if (threadIdx.x < n) out[threadIdx.x] = late + 1;
}

int main(int argc, char** argv) {
  const std::string mode = argv[1];
  std::vector<float> host(1024, 1);
  float *x, *y, *z;
  OK(cudaMalloc(&x, 4096));
  OK(cudaMalloc(&y, 4096));
  OK(cudaMalloc(&z, 4096));
  OK(cudaMemcpy(x, host.data(), 4096, cudaMemcpyHostToDevice));
  if (mode == "accumulator") {
    accumulate<<<1, 32>>>(x, y, 64);
  } else if (mode == "output") {
    every_other<<<1, 32>>>(y);
    OK(cudaMemcpy(host.data(), y, 128, cudaMemcpyDeviceToHost));
  } else if (mode == "freed") {
    OK(cudaFree(y));
    fill<<<1, 32>>>(y, 1);
  } else if (mode == "transpose") {
    transpose<<<1, dim3(16, 16)>>>(x, y, false);
  } else if (mode == "streams" || mode == "event") {
    cudaStream_t a, b;
    cudaEvent_t event;
    OK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    OK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    OK(cudaEventCreate(&event));
    OK(cudaDeviceSynchronize());
    fill<<<1, 32, 0, a>>>(y, 1);
    OK(cudaEventRecord(event, a));
    if (mode == "event") OK(cudaStreamWaitEvent(b, event, 0));
    fill<<<1, 32, 0, b>>>(y, 2);
  } else if (mode.rfind("copies", 0) == 0) {
    // A fill on one stream, a kernel and a copy on another, in each order; the modes with "event" order them.
    cudaStream_t a, b;
    cudaEvent_t event;
    OK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
    OK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
    OK(cudaEventCreate(&event));
    OK(cudaDeviceSynchronize());
    const bool kernel_first = mode.find("kernel") != std::string::npos, copy = mode.find("both") != std::string::npos;
    if (kernel_first)
      fill<<<1, 32, 0, a>>>(y, 1);
    else
      OK(cudaMemsetAsync(y, 0, 4096, a));
    OK(cudaEventRecord(event, a));
    if (mode.find("event") != std::string::npos) OK(cudaStreamWaitEvent(b, event, 0));
    if (copy)
      OK(cudaMemcpyAsync(z, y + 8, 64, cudaMemcpyDeviceToDevice, b));
    else if (kernel_first)
      OK(cudaMemset2DAsync(y + 1, 64, 0, 4, 2, b));
    else
      fill<<<1, 32, 0, b>>>(y, 1);
    OK(cudaMemcpyAsync(x, z, 64, cudaMemcpyDeviceToDevice, b));
  } else if (mode == "stream") {
    cudaStream_t a;
    OK(cudaStreamCreate(&a));
    auto expect = reinterpret_cast<void (*)(int, void*)>(dlsym(RTLD_DEFAULT, "ptx_emulator_expect_stream"));
    expect(1, a);
    fill<<<1, 32, 0, a>>>(y, 1);
    fill<<<1, 32>>>(y, 2);  // stream
    expect(0, nullptr);
    fill<<<1, 32>>>(y, 3);
  } else if (mode == "right") {
    transpose<<<1, dim3(16, 16)>>>(x, y, true);
    OK(cudaDeviceSynchronize());
    reduce<<<8, 128>>>(x, y, z);
    OK(cudaMemcpy(host.data(), z, 4, cudaMemcpyDeviceToHost));
    EXPECT(host[0] == 1024);
    int n = 256;
    void* arguments[] = {&x, &n};
    OK(cudaLaunchCooperativeKernel((void*)rounds, dim3(2), dim3(128), arguments, 0, nullptr));
    pipeline<<<1, 128>>>(x, y, 8);
    OK(cudaMemcpy(host.data(), y, 512, cudaMemcpyDeviceToHost));
    for (int t = 0; t < 128; ++t) EXPECT(host[t] == 8);
    Pair* pairs;
    OK(cudaMalloc(&pairs, 64 * sizeof(Pair)));
    local<<<1, 64>>>(x, y, pairs, 40);
    OK(cudaMemcpy(host.data(), y, 160, cudaMemcpyDeviceToHost));
    EXPECT(host[39] == 3);
  }
  OK(cudaDeviceSynchronize());
  puts("done");
}
