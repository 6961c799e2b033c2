#pragma once

// What sm_90a adds, a line of PTX each: mbarriers, boxes of tensors copied by TMA, the asynchronous proxy's fence,
// named barriers, registers moved between warpgroups. Kernels that use it have a body where POP_SM90A is 1, and are
// launched where `runs_sm90a` says that this body is loaded.

#include <cuda.h>

#include <cstdint>

#include "pop/types.h"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define POP_SM90A 1
#else
#define POP_SM90A 0
#endif

namespace pop::cuda {

/// Whether the current device runs this library's code for sm_90a, which not every build has.
bool runs_sm90a(const char* operation);

/// A tensor as TMA copies it to shared memory: in boxes, whose rows of 128 bytes are swizzled as in HeadTile. Sizes,
/// strides and boxes count elements, from the contiguous dimension on, which has no stride.
struct TensorBoxes {
  static constexpr int kDimensions = 4;
  const void* data;
  cuuint64_t sizes[kDimensions], strides[kDimensions - 1];
  cuuint32_t box[kDimensions];
};
CUtensorMap tensor_map(const char* operation, DType dtype, const TensorBoxes&);

// An mbarrier, by its address in shared memory, counts arrivals and bytes. Each phase ends when both are complete;
// phases have parity 0, 1, 0, ...

__device__ inline void initialize_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// After initialising barriers, and before the threads meet that use them.
__device__ inline void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive_barrier(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives, and lets the phase wait for bytes of copies, too.
__device__ inline void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Waits for the end of the present phase if that has this parity; otherwise it is over.
__device__ inline void wait_barrier(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{ .reg .pred done; WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra WAIT; }" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}

/// Starts the copy of a box to shared memory, whose bytes the barrier counts.
__device__ inline void load_box(const CUtensorMap& map, uint32_t barrier, uint32_t to, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

/// What this thread has written to shared memory, TMA and wgmma see from here on.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Barrier 1 to 15 of the block, for so many of its threads: waits for the others, or lets them go on.
__device__ inline void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

/// Registers that each thread of this warpgroup keeps, or has from now on.
template <int kRegisters>
__device__ inline void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace pop::cuda
