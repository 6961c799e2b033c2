#pragma once

// wgmma as the multiplication uses it, beside attention's: 64 rows of a warpgroup by 256 columns.

#include "cuda/attention_wgmma.h"

namespace pop::cuda {

#define POP_SUMS4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define POP_SUMS16(d, n) POP_SUMS4(d, n), POP_SUMS4(d, n + 1), POP_SUMS4(d, n + 2), POP_SUMS4(d, n + 3)
#define POP_SUMS64(d, n) POP_SUMS16(d, n), POP_SUMS16(d, n + 4), POP_SUMS16(d, n + 8), POP_SUMS16(d, n + 12)
#define POP_NAMES128                                                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, " \
  "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, " \
  "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

/// Starts sums = a b (+ sums, where `keeps`): a [64 rows, 16 deep] and b [columns, 16 deep], both along their depth.
template <typename T>
__device__ __forceinline__ void wgmma(float (&sums)[32][4], uint64_t a, uint64_t b, bool keeps) {
#define POP_MULTIPLY(type)                                                           \
  asm volatile(                                                                      \
      "{ .reg .pred keeps; setp.ne.b32 keeps, %130, 0;"                              \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" POP_NAMES128 \
      "}, %128, %129, keeps, 1, 1, 0, 0; }"                                          \
      : POP_SUMS64(sums, 0), POP_SUMS64(sums, 16)                                    \
      : "l"(a), "l"(b), "r"(static_cast<int>(keeps)))
  if constexpr (std::is_same_v<T, bf16>)
    POP_MULTIPLY("bf16");
  else
    POP_MULTIPLY("f16");
#undef POP_MULTIPLY
}

#undef POP_SUMS4
#undef POP_SUMS16
#undef POP_SUMS64
#undef POP_NAMES128

}  // namespace pop::cuda
