// Bulk copies between global and shared memory (cp.async.bulk), plain ones and boxes of tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "machine.h"
#include "tensor_map.h"

namespace ptx_emulator {

// Slots of a bulk copy's instruction. Its count is the box's dimensions (0: a plain copy), its immediate 1 for a store.
enum BulkSlot : uint32_t {
  kBulkShared,  // 64-bit addresses
  kBulkOther,   // the tensor map's, or global memory's
  kBulkBarrier,
  kBulkSize,  // 32 bits, of a plain copy
  kBulkSharedOffset,
  kBulkOtherOffset,
  kBulkBarrierOffset,
  kBulkCoordinates,
};

struct BulkCopy {
  bool store = false, tensor = false;
  uint32_t shared = 0;   // offset in shared memory
  uint32_t barrier = 0;  // offset of a load's mbarrier
  uint32_t bytes = 0;    // of shared memory
  uint64_t global = 0;
  TensorMap map{};
  int32_t coordinates[5] = {};
};

// A copy that must not be: the error's code, and what is wrong.
struct BulkProblem {
  int code = 0;  // 0: none
  const char* rule = "";
  std::string text;
  uint64_t address = 0;
};

// What a lane's instruction asks for. The map is read; the tensor is not touched.
BulkProblem find_bulk_copy(const Warp& w, const Instruction& i, int lane, BulkCopy& copy);

// Whether two stores write the same bytes to the same place.
bool same_store(const BulkCopy& a, const BulkCopy& b);

// Calls piece(offset in shared memory, address in global memory, bytes) for pieces of at most 16 bytes of a box (of
// a plain copy: of 4096); the address is 0 where the box is outside of the tensor.
template <class F>
void for_each_piece(const BulkCopy& c, F piece) {
  if (!c.tensor) {
    for (uint32_t at = 0; at < c.bytes; at += 4096)
      piece(c.shared + at, c.global + at, std::min<uint32_t>(4096, c.bytes - at));
    return;
  }
  const TensorMap& m = c.map;
  const int rank = m.rank;
  const uint32_t inner = m.extent(0), row_bytes = inner * m.element;
  uint32_t index[5] = {};
  for (uint32_t row = c.shared;; row += row_bytes) {
    uint64_t base = m.address;
    bool inside = true;
    for (int d = 1; d < rank; ++d) {
      const int64_t at = int64_t{c.coordinates[d]} + int64_t{index[d]} * m.steps[d];
      inside = inside && at >= 0 && static_cast<uint64_t>(at) < m.sizes[d];
      base += static_cast<uint64_t>(at) * m.strides[d - 1];
    }
    // Elements `first` to `end` of the row are inside.
    const int64_t step = m.steps[0], start = c.coordinates[0];
    const int64_t first = inside ? std::clamp<int64_t>(start < 0 ? (-start + step - 1) / step : 0, 0, inner) : inner;
    const int64_t end =
        inside ? std::clamp<int64_t>((static_cast<int64_t>(m.sizes[0]) - start + step - 1) / step, first, inner)
               : inner;
    const auto emit = [&](int64_t from, int64_t to, bool outside) {
      uint32_t at = static_cast<uint32_t>(from) * m.element;
      const uint32_t stop = static_cast<uint32_t>(to) * m.element;
      while (at < stop) {
        uint32_t bytes = std::min(stop, at / 16 * 16 + 16) - at;
        if (!outside && step != 1) bytes = m.element;
        const uint64_t global =
            outside ? 0 : base + static_cast<uint64_t>(start + int64_t{at / m.element} * step) * m.element;
        piece(swizzled(row + at, m.swizzle), global, bytes);
        at += bytes;
      }
    };
    emit(0, first, true), emit(first, end, false), emit(end, inner, true);
    int d = 1;
    for (; d < rank; ++d) {
      if (++index[d] < m.extent(d)) break;
      index[d] = 0;
    }
    if (d >= rank) return;
  }
}

// Moves the bytes now. Faults where memory is not there.
void carry_out(const BulkCopy& copy, uint8_t* shared);
void fill_outside(const BulkCopy& copy, uint8_t* to, uint32_t bytes);  // what a load brings from outside of the tensor

}  // namespace ptx_emulator
