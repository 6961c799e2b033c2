// Parts of the language that compilers turn into unusual PTX.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "check.h"

namespace cg = cooperative_groups;

__global__ void across_the_grid(int* x) {
  atomicAdd(x, 1);
  cg::this_grid().sync();
  if (threadIdx.x == 0) x[1 + blockIdx.x] = *(volatile int*)x;
}
__global__ void groups(int* out) {
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  const auto quad = cg::tiled_partition<4>(warp);
  int value =
      cg::reduce(warp, int(threadIdx.x), cg::plus<int>()) + cg::reduce(quad, int(threadIdx.x), cg::greater<int>());
  if (threadIdx.x % 3 == 0) {
    const auto some = cg::coalesced_threads();
    value += 1000 * some.size() + some.thread_rank();
  }
  out[threadIdx.x] = value;
}
__global__ void halves(float* out) {
  const __half2 a = __floats2half2_rn(1.5f, threadIdx.x), b = __hfma2(a, a, __float2half2_rn(0.25f));
  const __nv_bfloat162 c = __hmax2(__floats2bfloat162_rn(2.f, threadIdx.x), __float2bfloat162_rn(3.f));
  out[threadIdx.x] = __low2float(b) + __high2float(b) + __low2float(c) + 100 * __high2float(c) +
                     float(__hgt(a.x, a.y)) + float(__nv_fp8_e4m3(float(threadIdx.x))) +
                     float(hexp2(__float2half(3.f))) + __half2float(hsqrt(a.x));
}
__global__ void switches(int* out) {
  int v = threadIdx.x;
  for (int k = 0; k < 20; ++k) switch ((v + k) % 11) {
      case 0:
        v += 3;
        break;
      case 1:
        v ^= 5;
        break;
      case 2:
        v *= 3;
        break;
      case 3:
        continue;
      case 4:
        v -= k;
        break;
      case 5:
        v = __brev(v) >> 24;
        break;
      case 6:
        v += __popc(v);
        break;
      case 7:
        v = __clz(v);
        break;
      case 8:
        v = __funnelshift_l(v, k, 3) & 255;
        break;
      case 9:
        if (v > 100) return;
        v += 40;
        break;
      default:
        v = __byte_perm(v, k, 0x4501) & 1023;
    }
  out[threadIdx.x] = v;
}
__global__ void stack(int* out) {
  int a[32];
  for (int k = 0; k < 32; ++k) a[(k * 7 + threadIdx.x) & 31] = k;
  out[threadIdx.x] = a[threadIdx.x & 31] * 100 + a[(threadIdx.x * 5) & 31];
}
__global__ void heap(int** out) {
  int* p = (int*)malloc(64);
  p[3] = threadIdx.x;
  out[threadIdx.x] = p;
}
__global__ void give_back(int** p, int* out) {
  out[threadIdx.x] = p[threadIdx.x][3];
  free(p[threadIdx.x]);
}
__global__ void wide(unsigned long long* out, long long a, unsigned long long b) {
  out[0] = __umul64hi(b, b);
  out[1] = a / 7 * 3 + a % 13;
  out[2] = b / 1000003 + __ffsll(b);
  out[3] = (unsigned long long)((unsigned __int128)(b)*b >> 77);
  out[4] = __double2ull_rz(1e18 * (a < 0)) + __double_as_longlong(__ddiv_ru(1.0, 3.0));
}

int main() {
  int* x;
  OK(cudaMallocManaged(&x, 4096));
  memset(x, 0, 4096);
  void* arguments[] = {&x};
  OK(cudaLaunchCooperativeKernel((void*)across_the_grid, 50, 64, arguments, 0, 0));
  OK(cudaDeviceSynchronize());
  for (int k = 0; k < 50; ++k) EXPECT(x[1 + k] == 3200);
  EXPECT(cudaLaunchCooperativeKernel((void*)across_the_grid, 100000, 64, arguments, 0, 0) ==
         cudaErrorCooperativeLaunchTooLarge);
  cudaGetLastError();
  groups<<<1, 32>>>(x);
  OK(cudaDeviceSynchronize());
  for (int k = 0; k < 32; ++k) EXPECT(x[k] == 496 + (k | 3) + (k % 3 ? 0 : 11000 + k / 3));
  float* f;
  OK(cudaMallocManaged(&f, 4096));
  halves<<<1, 8>>>(f);
  OK(cudaDeviceSynchronize());
  for (int k = 0; k < 8; ++k) {
    const float square = 2.5f + k * k + 0.25f;
    EXPECT(std::abs(f[k] - (square + 3 + 100 * std::max(3, k) + (1.5f > k) + k + 8 + 1.224609375f)) < 1e-3f);
  }
  switches<<<2, 96>>>(x);
  OK(cudaDeviceSynchronize());
  int sum = 0;
  for (int k = 0; k < 96; ++k) sum = sum * 31 + x[k];
  printf("switches %d\n", sum);
  stack<<<1, 64>>>(x);
  OK(cudaDeviceSynchronize());
  for (int t = 0; t < 64; ++t) {
    int a[32];
    for (int k = 0; k < 32; ++k) a[(k * 7 + t) & 31] = k;
    EXPECT(x[t] == a[t & 31] * 100 + a[(t * 5) & 31]);
  }
  int** pointers;
  OK(cudaMallocManaged(&pointers, 4096));
  heap<<<1, 64>>>(pointers);
  give_back<<<1, 64>>>(pointers, x);
  OK(cudaDeviceSynchronize());
  EXPECT(x[63] == 63);
  unsigned long long* w;
  OK(cudaMallocManaged(&w, 64));
  const long long a = -123456789012345;
  const unsigned long long b = 0xfedcba9876543210;
  wide<<<1, 1>>>(w, a, b);
  OK(cudaDeviceSynchronize());
  const unsigned __int128 square = (unsigned __int128)b * b;
  EXPECT(w[0] == (unsigned long long)(square >> 64) && w[1] == (unsigned long long)(a / 7 * 3 + a % 13));
  EXPECT(w[2] == b / 1000003 + __builtin_ffsll((long long)b) && w[3] == (unsigned long long)(square >> 77));
  EXPECT(w[4] == 1000000000000000000ull + 0x3fd5555555555556ull);
  puts("fine");
}
