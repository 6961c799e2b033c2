#include "check.h"

__device__ int counter = 3;
__constant__ float weights[4];
__managed__ int shared_with_host = 5;
template <class T>
__global__ void scale(T* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = x[i] * weights[i & 3] + counter;
}
__global__ void managed() { shared_with_host += 2; }
extern __shared__ float dynamic[];
__global__ void reverse(float* x) {
  dynamic[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = dynamic[blockDim.x - 1 - threadIdx.x];
}
__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
__global__ void recurse(int* x) { x[threadIdx.x] = fibonacci(threadIdx.x); }
struct Shape {
  virtual __device__ int area() const { return 0; }
};
struct Square : Shape {
  int a;
  __device__ Square(int a) : a(a) {}
  __device__ int area() const override { return a * a; }
};
struct Strip : Shape {
  int a;
  __device__ Strip(int a) : a(a) {}
  __device__ int area() const override { return a; }
};
__global__ void virtual_calls(int* x) {
  Square q(threadIdx.x);
  Strip s(threadIdx.x);
  const Shape* p = threadIdx.x & 1 ? (Shape*)&q : (Shape*)&s;
  x[threadIdx.x] = p->area();
}
__global__ void histogram(const unsigned char* x, int* h) {
  __shared__ int part[256];
  part[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&part[x[blockIdx.x * 256 + threadIdx.x]], 1);
  __syncthreads();
  atomicAdd(&h[threadIdx.x], part[threadIdx.x]);
}
__global__ void doubles(double* x) {
  x[threadIdx.x] = sin(x[threadIdx.x]) + pow(x[threadIdx.x], 1.5) + erf(x[threadIdx.x]);
}
int main() {
  float *d, h[100], w[4] = {1, 2, 3, 4};
  OK(cudaMalloc(&d, sizeof(h)));
  for (int i = 0; i < 100; i++) h[i] = i;
  OK(cudaMemcpy(d, h, sizeof(h), cudaMemcpyHostToDevice));
  OK(cudaMemcpyToSymbol(weights, w, sizeof(w)));
  scale<<<1, 128>>>(d, 100);
  OK(cudaGetLastError());
  OK(cudaMemcpy(h, d, sizeof(h), cudaMemcpyDeviceToHost));
  for (int i = 0; i < 100; i++) EXPECT(h[i] == i * w[i & 3] + 3);
  int seven = 7, back;
  OK(cudaMemcpyToSymbol(counter, &seven, 4));
  OK(cudaMemcpyFromSymbol(&back, counter, 4));
  EXPECT(back == 7);
  void* address;
  size_t size;
  OK(cudaGetSymbolAddress(&address, weights));
  OK(cudaGetSymbolSize(&size, weights));
  EXPECT(size == 16 && *(float*)address == 1);
  managed<<<1, 1>>>();
  OK(cudaDeviceSynchronize());
  EXPECT(shared_with_host == 7);
  reverse<<<1, 100, 400>>>(d);
  OK(cudaMemcpy(h, d, 400, cudaMemcpyDefault));
  EXPECT(h[99] == 3);
  OK(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, 160 * 1024));
  reverse<<<1, 1, 160 * 1024>>>(d);
  OK(cudaGetLastError());
  int* m;
  OK(cudaMallocManaged(&m, 1024));
  recurse<<<1, 16>>>(m);
  OK(cudaDeviceSynchronize());
  EXPECT(m[15] == 610 && m[10] == 55);
  virtual_calls<<<1, 32>>>(m);
  OK(cudaDeviceSynchronize());
  EXPECT(m[9] == 81 && m[8] == 8);
  unsigned char* bytes;
  OK(cudaMallocHost(&bytes, 2560));
  for (int i = 0; i < 2560; i++) bytes[i] = i % 7;
  OK(cudaMemset(m, 0, 1024));
  histogram<<<10, 256>>>(bytes, m);
  OK(cudaDeviceSynchronize());
  EXPECT(m[0] == 366 && m[6] == 365);
  double* x;
  OK(cudaMallocManaged(&x, 32 * 8));
  for (int i = 0; i < 32; i++) x[i] = i * 0.37;
  doubles<<<1, 32>>>(x);
  OK(cudaDeviceSynchronize());
  for (int i = 0; i < 32; i++) {
    double v = i * 0.37, e = sin(v) + pow(v, 1.5) + erf(v);
    EXPECT(fabs(x[i] - e) <= 1e-14 * (1 + fabs(e)));
  }
  float* pitched;
  size_t pitch;
  OK(cudaMallocPitch(&pitched, &pitch, 20, 3));
  OK(cudaMemset2D(pitched, pitch, 0, 20, 3));
  OK(cudaMemcpy2D(pitched, pitch, h, 40, 20, 3, cudaMemcpyHostToDevice));
  EXPECT(pitched[pitch / 4 * 2 + 4] == h[24]);
  OK(cudaHostRegister(h, sizeof(h), 0));
  EXPECT(cudaHostRegister(h, 4, 0) == cudaErrorHostMemoryAlreadyRegistered);
  OK(cudaHostUnregister(h));
  cudaGetLastError();
  cudaPointerAttributes a;
  OK(cudaPointerGetAttributes(&a, d + 3));
  EXPECT(a.type == cudaMemoryTypeDevice);
  OK(cudaPointerGetAttributes(&a, h));
  EXPECT(a.type == cudaMemoryTypeUnregistered);
  OK(cudaFree(d));
  OK(cudaFreeHost(bytes));
  EXPECT(cudaFree(h) == cudaErrorInvalidValue);
  puts("fine");
}
