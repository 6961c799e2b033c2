#pragma once

// wgmma as attention uses it: 64 rows of a warpgroup by 128 or 64 columns. Its sums are those of mma.m16n8, 8 columns
// after 8.

#include <cstdint>

#include "cuda/numbers.h"

namespace pop::cuda {

/// A matrix in shared memory, of columns of 64 elements, swizzled (HeadTile): 1024 bytes from 8 rows to the next 8.
/// `column_bytes`: from one column to the next, where they are what wgmma's columns lie along.
__device__ inline uint64_t matrix_descriptor(uint32_t at, int column_bytes = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{1024 / 16} << 32 | static_cast<uint64_t>(column_bytes / 16) << 16 | at / 16;
}

/// The compiler knows of nothing that happens between wgmma and its wait: registers are named, to be left alone.
template <int kTiles>
__device__ __forceinline__ void fence_registers(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

/// Before wgmma, of all sums that come to be used until the next fence.
template <int... kTiles>
__device__ __forceinline__ void wgmma_fence(float (&... sums)[kTiles][4]) {
  (fence_registers(sums), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until all but the newest kPending groups are over, which had these sums.
template <int kPending, int... kTiles>
__device__ __forceinline__ void wgmma_wait(float (&... sums)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (fence_registers(sums), ...);
}

#define POP_SUMS4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define POP_SUMS16(d, n) POP_SUMS4(d, n), POP_SUMS4(d, n + 1), POP_SUMS4(d, n + 2), POP_SUMS4(d, n + 3)
#define POP_SUMS32(d, n) POP_SUMS16(d, n), POP_SUMS16(d, n + 4)
#define POP_SUMS64(d) POP_SUMS32(d, 0), POP_SUMS32(d, 8)
#define POP_NAMES32                                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define POP_NAMES64                                                                                                  \
  POP_NAMES32                                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
  "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/// Starts sums = a b (+ sums, where `keeps`): a [64 rows, 16 deep] and b [columns, 16 deep], both along their depth.
template <typename T>
__device__ __forceinline__ void wgmma(float (&sums)[16][4], uint64_t a, uint64_t b, bool keeps) {
#define POP_MULTIPLY(type)                                                          \
  asm volatile(                                                                     \
      "{ .reg .pred keeps; setp.ne.b32 keeps, %66, 0;"                              \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" POP_NAMES64 \
      "}, %64, %65, keeps, 1, 1, 0, 0; }"                                           \
      : POP_SUMS64(sums)                                                            \
      : "l"(a), "l"(b), "r"(static_cast<int>(keeps)))
  if constexpr (std::is_same_v<T, bf16>)
    POP_MULTIPLY("bf16");
  else
    POP_MULTIPLY("f16");
#undef POP_MULTIPLY
}

/// Starts sums += a b: `a` are mma's registers of 16 rows for each warp; b [16 deep, columns] lies along its columns.
template <typename T, int kTiles>
__device__ __forceinline__ void wgmma(float (&sums)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kTiles == 16 || kTiles == 8);
  constexpr bool kBf16 = std::is_same_v<T, bf16>;
#define POP_MULTIPLY(columns, type, names, from, ...)                                                                  \
  asm volatile(                                                                                                        \
      "{ .reg .pred keeps; setp.ne.b32 keeps, 1, 0;"                                                                   \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " from ", keeps, 1, 1, 1; }" \
      : __VA_ARGS__                                                                                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (kTiles == 16 && kBf16)
    POP_MULTIPLY("128", "bf16", POP_NAMES64, "{%64, %65, %66, %67}, %68", POP_SUMS64(sums));
  else if constexpr (kTiles == 16)
    POP_MULTIPLY("128", "f16", POP_NAMES64, "{%64, %65, %66, %67}, %68", POP_SUMS64(sums));
  else if constexpr (kBf16)
    POP_MULTIPLY("64", "bf16", POP_NAMES32, "{%32, %33, %34, %35}, %36", POP_SUMS32(sums, 0));
  else
    POP_MULTIPLY("64", "f16", POP_NAMES32, "{%32, %33, %34, %35}, %36", POP_SUMS32(sums, 0));
#undef POP_MULTIPLY
}

#undef POP_SUMS4
#undef POP_SUMS16
#undef POP_SUMS32
#undef POP_SUMS64
#undef POP_NAMES32
#undef POP_NAMES64

}  // namespace pop::cuda
