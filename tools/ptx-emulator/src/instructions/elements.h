// Elements of tensor-core matrices as they lie in a register or memory: how many bits, and their value in the
// accumulator's type.
#pragma once

#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {

struct ElementHalf {
  static constexpr int kBits = 16;
  using Acc = float;
  static float value(uint32_t x) { return widen(Half{static_cast<uint16_t>(x)}); }
};
struct ElementBfloat {
  static constexpr int kBits = 16;
  using Acc = float;
  static float value(uint32_t x) { return bits_to_float(x << 16); }
};
struct ElementTf32 {
  static constexpr int kBits = 32;
  using Acc = float;
  static float value(uint32_t x) { return bits_to_float(x & 0xffffe000); }
};
struct ElementE4m3 {
  static constexpr int kBits = 8;
  using Acc = float;
  static float value(uint32_t x) {
    static const auto table = [] {
      std::array<float, 256> t{};
      for (uint32_t k = 0; k < 256; ++k) t[k] = decode(k, kE4m3Format);
      return t;
    }();
    return table[x];
  }
};
struct ElementE5m2 {
  static constexpr int kBits = 8;
  using Acc = float;
  static float value(uint32_t x) { return widen(Half{static_cast<uint16_t>(x << 8)}); }
};
template <class T>
struct ElementByte {
  static constexpr int kBits = 8;
  using Acc = int32_t;
  static int32_t value(uint32_t x) { return static_cast<T>(x); }
};

template <class Element>
inline uint32_t extract(uint32_t reg, int index) {
  if constexpr (Element::kBits == 32)
    return reg;
  else
    return reg >> (index * Element::kBits) & ((1u << Element::kBits) - 1);
}

// rows x k from registers that each hold 8 rows by `4 * kPer` of k; `kRows / 8` registers lie above one another before
// k advances.
template <class Element, int kRows, int kDepth>
inline void unpack(const Warp& w, const uint32_t* slots, typename Element::Acc (&out)[kRows][kDepth]) {
  constexpr int kPer = 32 / Element::kBits, kDown = kRows / 8, kRegisters = kRows * kDepth / (32 * kPer);
  for (int r = 0; r < kRegisters; ++r) {
    const uint32_t* reg = w.lanes<const uint32_t>(slots[r]);
    for (int row = 0; row < 8; ++row) {
      auto* to = &out[r % kDown * 8 + row][r / kDown * 4 * kPer];
      if constexpr (Element::kBits == 16) {
        const auto* from = reinterpret_cast<const uint16_t*>(reg + 4 * row);
        for (int c = 0; c < 8; ++c) to[c] = Element::value(from[c]);
      } else {
        for (int c = 0; c < 4 * kPer; ++c) to[c] = Element::value(extract<Element>(reg[4 * row + c / kPer], c % kPer));
      }
    }
  }
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
