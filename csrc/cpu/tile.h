#pragma once

// Tiles: eight registers of 16 rows of 64 bytes, as AMX has them. A tile of A holds 16 rows of 32 bf16, a tile of B 16
// pairs of k by 16 columns (a lane is {b[2 i][column], b[2 i + 1][column]}), a tile of C 16 x 16 fp32. The same
// functions come twice: instructions for amx_bf16, and plain arithmetic on thread-local memory for amx_bf16_emulated,
// which runs the same main loops on any processor. Products of int8 would be another dp on the same tiles.
//
// A thread that computes on tiles holds a Scope. It ends with the thread's share of an operation, not with the thread:
// a configured thread makes every context switch save 8 KiB, the threads belong to the caller, and configuring costs
// less than the packing of one vector of weights.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "cpu/simd.h"

namespace pop::cpu::POP_ISA {

#if defined(__AMX_BF16__) || defined(POP_EMULATED_TILES)
inline constexpr bool kHaveTiles = true;
#else
inline constexpr bool kHaveTiles = false;
#endif

/// Whether matrices of T are multiplied on tiles.
template <typename T>
inline constexpr bool kTiles = kHaveTiles && std::is_same_v<T, bf16>;

namespace tile {

inline constexpr int kCount = 8, kRows = 16, kRowBytes = 64;
inline constexpr int kPairs = 16;  // of k, in one dp

#if defined(__AMX_BF16__)

// Own assembly, not the compiler's intrinsics: GCC's tile loads do not say that they read memory, so that stores into
// a buffer may move behind them.

class Scope {
 public:
  Scope() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < kCount; ++i) config.row_bytes[i] = kRowBytes, config.rows[i] = kRows;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Scope() { asm volatile("tilerelease"); }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

template <int N>
POP_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(N));
}
/// Rows lie `stride` bytes apart.
template <int N>
POP_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(N) : "memory");
}
/// Of what passes by once, so that it does not push out of the first cache what comes again.
template <int N>
POP_INLINE void load_once(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(N) : "memory");
}
template <int N>
POP_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(N) : "memory");
}
/// C += A B.
template <int C, int A, int B>
POP_INLINE void dp_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#elif defined(POP_EMULATED_TILES)

struct Registers {
  bool configured;
  alignas(64) Int rows[kCount][kRows];
};
inline thread_local Registers registers;

inline Int (&at(int n)) [kRows] {
  if (!registers.configured) std::fputs("a tile was used outside a Scope\n", stderr), std::abort();
  return registers.rows[n];
}

class Scope {
 public:
  Scope() {
    if (registers.configured) std::fputs("a Scope within a Scope would end it\n", stderr), std::abort();
    registers.configured = true;
    std::memset(registers.rows, 0xff, sizeof registers.rows);  // NaN: ldtilecfg's zeros are not to be relied on
  }
  ~Scope() { registers.configured = false; }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

template <int N>
void zero() {
  for (Int& row : at(N)) row = Int{};
}
template <int N>
void load(const void* p, int64_t stride) {
  for (int r = 0; r < kRows; ++r) std::memcpy(&at(N)[r], static_cast<const char*>(p) + r * stride, kRowBytes);
}
template <int N>
void load_once(const void* p, int64_t stride) {
  load<N>(p, stride);
}
template <int N>
void store(void* p, int64_t stride) {
  for (int r = 0; r < kRows; ++r) std::memcpy(static_cast<char*>(p) + r * stride, &at(N)[r], kRowBytes);
}

/// Numbers below the normal ones count as zero, in and out, whatever the thread's own mode.
POP_INLINE Vec flush(Vec x) {
  const Vec magnitude = bit_cast<Vec>(bit_cast<Int>(x) & 0x7fffffff);
  return select(magnitude < 0x1p-126f, bit_cast<Vec>(bit_cast<Int>(x) & INT32_MIN), x);
}

/// tdpbf16ps as Intel's manual (volume 2) has it: from zero, one sum over the even k and one over the odd k, each step
/// a fused multiply-add (a product of two bf16 is exact in fp32, so rounding the sum is all there is to it); then even
/// + odd, then C + that.
template <int C, int A, int B>
void dp_bf16() {
  const Int(&a)[kRows] = at(A), (&b)[kRows] = at(B);
  for (int r = 0; r < kRows; ++r) {
    Vec even{}, odd{};
    const Vec a_even = flush(bit_cast<Vec>(a[r] << 16)), a_odd = flush(bit_cast<Vec>(a[r] & -65536));
    for (int pair = 0; pair < kPairs; ++pair) {
      even = flush(even + a_even[pair] * flush(bit_cast<Vec>(b[pair] << 16)));
      odd = flush(odd + a_odd[pair] * flush(bit_cast<Vec>(b[pair] & -65536)));
    }
    at(C)[r] = bit_cast<Int>(flush(flush(bit_cast<Vec>(at(C)[r])) + flush(even + odd)));
  }
}

#else

class Scope {};

#endif

}  // namespace tile

struct NoTiles {
  NoTiles() {}  // not trivial, so that an unused one is no warning
};
/// What a thread holds while it multiplies matrices of T.
template <typename T>
using TileScope = std::conditional_t<kTiles<T>, tile::Scope, NoTiles>;

}  // namespace pop::cpu::POP_ISA
