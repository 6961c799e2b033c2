#pragma once

// Vectors of floats for the instruction set this file is compiled for. Every file of csrc/cpu is compiled once per
// instruction set, in a namespace of its own (POP_ISA); GCC's vector extensions carry the arithmetic, intrinsics only
// what they cannot express.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512BF16__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define POP_INLINE inline __attribute__((always_inline))

namespace pop::cpu::POP_ISA {

#if defined(__AVX512BF16__)
inline constexpr int kLanes = 16;
inline constexpr bool kBf16Dot = true;  // vdpbf16ps multiplies pairs of bf16 into fp32
#elif defined(POP_EMULATED_TILES)
inline constexpr int kLanes = 16;       // the compiler makes such a vector of what the processor has
inline constexpr bool kBf16Dot = true;  // in plain arithmetic
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
inline constexpr bool kBf16Dot = false;
#else
inline constexpr int kLanes = 4;
inline constexpr bool kBf16Dot = false;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));
using Half = uint16_t __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

template <typename To, typename From>
POP_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

POP_INLINE float to_float(float x) { return x; }
POP_INLINE float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

POP_INLINE Vec broadcast(float x) { return x - Vec{}; }

/// Of pairs of bf16, the first or the second of each, as floats.
POP_INLINE Vec even(Int pairs) { return bit_cast<Vec>(pairs << 16); }
POP_INLINE Vec odd(Int pairs) { return bit_cast<Vec>(pairs & -65536); }

POP_INLINE Vec widen(Half h) { return bit_cast<Vec>(__builtin_convertvector(h, Int) << 16); }

/// Round to nearest even; NaN stays NaN (the quiet bit is set, as rounding could carry a NaN's payload into infinity).
POP_INLINE Half narrow(Vec x) {
#if defined(__AVX512BF16__)
  return bit_cast<Half>(_mm512_cvtneps_pbh(x));
#else
  const Int bits = bit_cast<Int>(x);
  const Int rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Int nan = bits | 0x400000;
  const Int is_nan = x != x;
  const Int chosen = (is_nan & nan) | (~is_nan & rounded);
  return __builtin_convertvector((chosen >> 16) & 0xffff, Half);
#endif
}

POP_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
POP_INLINE Vec load(const bf16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  return widen(h);
}
POP_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
POP_INLINE void store(bf16* p, Vec v) {
  const Half h = narrow(v);
  std::memcpy(p, &h, sizeof h);
}

/// a to p, b behind it.
template <typename T>
POP_INLINE void store_two(T* p, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {  // one store: a tile's row is loaded whole
    const __m512bh both = _mm512_cvtne2ps_pbh(b, a);
    std::memcpy(p, &both, sizeof both);
    return;
  }
#endif
  store(p, a), store(p + kLanes, b);
}

/// The first n elements, zeros behind them.
template <typename T>
POP_INLINE Vec load(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <typename T>
POP_INLINE void store(T* p, Vec v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

/// body(i, n) over [0, size) in steps of a vector; n is kLanes but for the tail.
template <typename Body>
POP_INLINE void for_each_vector(int64_t size, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, std::integral_constant<int, kLanes>{});
  if (i < size) body(i, size - i);
}
template <typename T>
POP_INLINE Vec load(const T* p, std::integral_constant<int, kLanes>) {
  return load(p);
}
template <typename T>
POP_INLINE void store(T* p, Vec v, std::integral_constant<int, kLanes>) {
  store(p, v);
}

POP_INLINE Vec select(Int condition, Vec a, Vec b) { return condition ? a : b; }
POP_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

template <int Step = kLanes / 2, typename Op>
POP_INLINE float reduce(Vec v, Op op) {
  Int index;
  for (int i = 0; i < kLanes; ++i) index[i] = i ^ Step;
  v = op(v, __builtin_shuffle(v, index));
  if constexpr (Step == 1) {
    return v[0];
  } else {
    return reduce<Step / 2>(v, op);
  }
}
POP_INLINE float reduce_add(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return a + b; });
}
POP_INLINE float reduce_max(Vec v) {
  return reduce(v, [](Vec a, Vec b) { return max(a, b); });
}

/// Transposes a kLanes x kLanes matrix held as rows: log2(kLanes) rounds of exchanging halves, quarters, ... between
/// rows.
template <int Step = kLanes / 2>
POP_INLINE void transpose(Vec (&rows)[kLanes]) {
  Int low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & Step) ? kLanes + (i ^ Step) : i;
    high[i] = (i & Step) ? kLanes + i : (i ^ Step);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const Vec a = rows[i], b = rows[i + Step];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + Step] = __builtin_shuffle(a, b, high);
  }
  if constexpr (Step > 1) transpose<Step / 2>(rows);
}

/// The transpose of kLanes rows of 4-byte lanes, `offset` bytes after rows[i].
template <typename Row>
POP_INLINE void load_transposed(const Row* rows, int64_t offset, Vec (&lanes)[kLanes]) {
  const auto at = [&](int i) { return reinterpret_cast<const char*>(rows[i]) + offset; };
#if defined(__AVX512BF16__)
  // Quarters of rows are put where they belong by the loads, as only one port exchanges lanes: what is left are the two
  // rounds within quarters, half as many shuffles.
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    Vec quarters[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto quarter = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(at(i)) + 4 * q); };
      __m512 v = _mm512_castps128_ps512(quarter(j));
      v = _mm512_insertf32x4(v, quarter(j + 4), 1);
      v = _mm512_insertf32x4(v, quarter(j + 8), 2);
      quarters[j] = _mm512_insertf32x4(v, quarter(j + 12), 3);
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(quarters[0], quarters[1])),
                  low23 = _mm512_castps_pd(_mm512_unpacklo_ps(quarters[2], quarters[3])),
                  high01 = _mm512_castps_pd(_mm512_unpackhi_ps(quarters[0], quarters[1])),
                  high23 = _mm512_castps_pd(_mm512_unpackhi_ps(quarters[2], quarters[3]));
    lanes[4 * q] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    lanes[4 * q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    lanes[4 * q + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    lanes[4 * q + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
  }
#else
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) std::memcpy(&lanes[i], at(i), sizeof(Vec));
  transpose(lanes);
#endif
}

/// Lane i is the sum over row i's lanes: the rounds of a transposition, adding what each exchanges. `rows` is
/// overwritten.
template <int Step = kLanes / 2>
POP_INLINE Vec sum_rows(Vec (&rows)[kLanes]) {
  Int low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = (i & Step) ? kLanes + (i ^ Step) : i;
    high[i] = (i & Step) ? kLanes + i : (i ^ Step);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Step; ++i)
    rows[i] = __builtin_shuffle(rows[i], rows[i + Step], low) + __builtin_shuffle(rows[i], rows[i + Step], high);
  if constexpr (Step == 1) {
    return rows[0];
  } else {
    return sum_rows<Step / 2>(rows);
  }
}

/// exp(x) to about 2 ulp (and exactly 0 below the normal numbers): 2^n p(f) with n + f = x log2(e), |f| <= 1/2,
/// p the degree-6 polynomial that minimises the relative error of 2^f there. Degree 4 is exact to 2.8e-6: a thousandth
/// of what rounding to bf16 loses.
template <int Degree = 6>
POP_INLINE Vec exp2(Vec t) {
#if defined(__AVX512BF16__)
  const Vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec clamped = select(t < -126.0f, broadcast(-126.0f), select(t > 128.0f, broadcast(128.0f), t));
  const Vec shifted = clamped + magic;
  const Vec f = clamped - (shifted - magic);
#endif
  Vec p;
  if constexpr (Degree == 6) {
    p = broadcast(1.5353362e-4f);
    p = p * f + 1.3398874e-3f;
    p = p * f + 9.6184370e-3f;
    p = p * f + 5.5503324e-2f;
    p = p * f + 2.4022648e-1f;
    p = p * f + 6.9314720e-1f;
  } else {
    static_assert(Degree == 4);
    p = broadcast(9.5828500e-3f);
    p = p * f + 5.5906430e-2f;
    p = p * f + 2.4024099e-1f;
    p = p * f + 6.9312419e-1f;
  }
  p = p * f + 1.0f;
#if defined(__AVX512BF16__)
  return _mm512_scalef_ps(p, t - f);
#else
  const Int exponent = (bit_cast<Int>(shifted) - bit_cast<Int>(magic)) << 23;
  const Vec scaled = bit_cast<Vec>(bit_cast<Int>(p) + exponent);
  const Vec result = select(t < -126.0f, Vec{}, scaled);
  return select(t != t, t, select(t >= 128.0f, broadcast(__builtin_inff()), result));
#endif
}

/// In blocks, whose sums are then added up: a long sum of positive numbers rounds most of what it adds.
template <typename T>
POP_INLINE float sum_of_squares(const T* x, int64_t size) {
  constexpr int64_t kBlock = 32 * kLanes;
  Vec total{};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    Vec sum{};
    for_each_vector(size - begin < kBlock ? size - begin : kBlock, [&](int64_t i, auto n) {
      const Vec v = load(x + begin + i, n);
      sum += v * v;
    });
    total += sum;
  }
  return reduce_add(total);
}

inline constexpr float kLog2E = 1.44269504088896340736f;

POP_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp2(x * -kLog2E)); }
POP_INLINE Vec silu(Vec x) { return x * sigmoid(x); }

/// The tanh form of GELU: x (1 + tanh(u)) / 2 = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
POP_INLINE Vec gelu_tanh(Vec x) {
  constexpr float kTwoSqrt2OverPi = 1.59576912160573071176f;
  return x * sigmoid(kTwoSqrt2OverPi * (x + 0.044715f * (x * x * x)));
}

}  // namespace pop::cpu::POP_ISA
