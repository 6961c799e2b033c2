// Where wgmma finds its matrices: descriptors of shared memory, and what an instruction multiplies.
#pragma once

#include <cstdint>

#include "tensor_map.h"

namespace ptx_emulator {

struct Warp;

// A wgmma is one operation of four warps: none of it is over before all four have come to it. Groups are counted by
// their commits: `commit_multiplications` says whether others may wait for this one, `multiplications_over` whether
// all four warps have committed all but the newest groups of this warp.
bool commit_multiplications(Warp& w);
bool multiplications_over(const Warp& w, int64_t newest);

// A matrix in shared memory. `rows`: of A, or columns of B; k: the direction that is summed over.
struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base;                    // base offset
  Swizzle swizzle;

  explicit MatrixDescriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        base(bits >> 49 & 7),
        swizzle(kModes[bits >> 62]) {}

  // The 16 bytes of row `row` that begin at byte `chunk` * 16 of k: k lies along 16-byte chunks.
  uint32_t along_k(uint32_t row, uint32_t chunk) const {
    const uint32_t width = 16u << static_cast<uint32_t>(swizzle);
    return swizzled(start + row % 8 * width + row / 8 * stride + chunk * (swizzle == Swizzle::kNone ? leading : 16),
                    swizzle);
  }
  // The 16 bytes of k-row `k` that hold rows 8 * chunk ... 8 * chunk + 7 (of 2-byte elements).
  uint32_t along_rows(uint32_t chunk, uint32_t k) const {
    if (swizzle == Swizzle::kNone) return start + chunk * stride + k % 8 * 16 + k / 8 * leading;
    const uint32_t chunks = 1u << static_cast<uint32_t>(swizzle);
    return swizzled(start + chunk % chunks * 16 + chunk / chunks * leading + k % 8 * (16 * chunks) + k / 8 * stride,
                    swizzle);
  }

 private:
  static constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
};

// Instruction::immediate of wgmma.mma_async. Its slots: scale-d, A (a descriptor or four registers), B, accumulators.
struct WgmmaForm {
  bool a_in_registers, a_transposed, b_transposed, a_negated, b_negated, saturates;
  uint16_t columns;

  static WgmmaForm of(int64_t immediate) {
    const auto bit = [&](int k) { return (immediate >> k & 1) != 0; };
    return {bit(0), bit(1), bit(2), bit(3), bit(4), bit(5), static_cast<uint16_t>(immediate >> 16 & 0x1ff)};
  }
  int64_t immediate() const {
    return a_in_registers | a_transposed << 1 | b_transposed << 2 | a_negated << 3 | b_negated << 4 | saturates << 5 |
           int64_t{columns} << 16;
  }
  uint32_t a_slots() const { return a_in_registers ? 4 : 1; }
};

// Calls f(offset of 16 bytes, row or 8 rows from it, chunk of k or row of k) for each piece of a matrix of `rows` from
// `first`; transposed: the rows lie along the 16 bytes.
template <class F>
void for_each_chunk(const MatrixDescriptor& d, uint32_t first, uint32_t rows, bool transposed, F f) {
  if (!transposed) {
    for (uint32_t row = first; row < first + rows; ++row)
      for (uint32_t chunk = 0; chunk < 2; ++chunk) f(d.along_k(row, chunk), row - first, chunk);
  } else {
    for (uint32_t chunk = first / 8; chunk < (first + rows) / 8; ++chunk)
      for (uint32_t k = 0; k < 16; ++k) f(d.along_rows(chunk, k), chunk * 8 - first, k);
  }
}

}  // namespace ptx_emulator
