// D = A B for sm_90a in its own words: A [m, k], B [n, k], D [m, n], bf16. A producer warp fills a ring of tiles by
// TMA, two warpgroups multiply 64 x 128 each, and D goes out by TMA again. Persistent.
#include <cuda_bf16.h>

#include <cstdint>

namespace {
constexpr int kRows = 128, kColumns = 128, kDepth = 64, kStages = 3;
constexpr uint32_t kA = kRows * kDepth * 2, kB = kColumns * kDepth * 2;

struct alignas(64) Map {
  uint64_t opaque[16];
};

__device__ uint32_t shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra WAIT; }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ void load(const Map& map, uint32_t barrier, uint32_t to, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// K-major, rows of 128 bytes, swizzled: 1024 bytes to the next 8 rows.
__device__ uint64_t descriptor(uint32_t at) {
  return uint64_t{(at & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

#define EIGHT(d, i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
__device__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int keeps) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, "
      "0, 0; }"
      : EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56)
      : "l"(a), "l"(b), "r"(keeps));
}
}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) gemm(const __grid_constant__ Map a, const __grid_constant__ Map b,
                                                          const __grid_constant__ Map out, int m, int n, int k) {
  extern __shared__ __align__(1024) unsigned char tiles[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t base = shared(tiles), full = shared(barriers), empty = full + 8 * kStages;
  const uint32_t staged = base + kStages * (kA + kB);  // D, two halves of 64 columns for each warpgroup
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), columns = (n + kColumns - 1) / kColumns;
  const int count = columns * ((m + kRows - 1) / kRows), steps = (k + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * s));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(empty + 8 * s));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int stage = 0, parity = 0;
  const auto advance = [&] {
    if (++stage == kStages) stage = 0, parity ^= 1;
  };
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x != 256) return;
    for (int tile = blockIdx.x; tile < count; tile += gridDim.x)
      for (int step = 0; step < steps; ++step, advance()) {
        wait(empty + 8 * stage, parity ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + 8 * stage), "r"(kA + kB)
                     : "memory");
        load(a, full + 8 * stage, base + stage * kA, step * kDepth, tile / columns * kRows);
        load(b, full + 8 * stage, base + kStages * kA + stage * kB, step * kDepth, tile % columns * kColumns);
      }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const uint32_t mine = staged + group * 2 * 64 * 128;
  for (int tile = blockIdx.x; tile < count; tile += gridDim.x) {
    float d[64];
#pragma unroll
    for (float& x : d) x = 0;
    int before = -1;
    for (int step = 0; step < steps; ++step, advance()) {
      wait(full + 8 * stage, parity);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      const uint64_t ad = descriptor(base + stage * kA + group * 64 * 128),
                     bd = descriptor(base + kStages * kA + stage * kB);
#pragma unroll
      for (int i = 0; i < kDepth / 16; ++i) multiply(d, ad + 2 * i, bd + 2 * i, step + i);
      asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
      asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (before >= 0 && threadIdx.x % 128 == 0) arrive(empty + 8 * before);
      before = stage;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (threadIdx.x % 128 == 0) arrive(empty + 8 * before);
    // The last tile's store must have read what is written now.
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
#pragma unroll
    for (int i = 0; i < 64; i += 8) {  // 16 columns: two tiles of 8 x 8 for each half of the rows
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(d[i + 2 * j], d[i + 2 * j + 1]);
        packed[j] = reinterpret_cast<const uint32_t&>(pair);
      }
      // Lane l gives row l % 16 of the 16-byte column l / 16.
      const int row = warp * 16 + lane % 16, chunk = i / 4 + lane / 16;
      uint32_t at = chunk / 8 * 64 * 128 + row * 128 + chunk % 8 * 16;
      at ^= (at >> 7 & 7) << 4;
      asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(mine + at), "r"(packed[0]),
                   "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                   : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
    if (threadIdx.x % 128 == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&out),
                     "r"(mine + half * 64 * 128), "r"(tile % columns * kColumns + half * 64),
                     "r"(tile / columns * kRows + group * 64)
                     : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
