#pragma once

// Shared memory by its own 32-bit addresses, with constant offsets inside the instructions: what the compiler cannot
// see through a generic pointer, it would add up for each access.

#include <cstdint>
#include <utility>

namespace pop::cuda {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A value to be held in a register: the compiler would work it out anew in every round of a loop.
__device__ inline uint32_t held(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// f(0), ..., f(kCount - 1), each a constant.
template <int kCount, typename F>
__device__ inline void unrolled(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

/// Four 8x8 matrices of 16-bit elements, of which each lane names a row (`address + kOffset`).
template <int kOffset = 0>
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address), "n"(kOffset));
}

/// The same, each matrix transposed.
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address));
}

/// Starts a copy of `bytes` bytes, 16 or 0; zeros fill up 16.
template <int kOffset = 0>
__device__ inline void copy_async(uint32_t address, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2], 16, %3;"
               :
               : "r"(address), "n"(kOffset), "l"(from), "r"(bytes));
}

}  // namespace pop::cuda
