#include "bulk_copy.h"

#include <cstring>

#include "guarded.h"
#include "mbarrier.h"

namespace ptx_emulator {

bool land_on_mbarrier(uint8_t* at, uint32_t bytes) {
  uint64_t bits;
  std::memcpy(&bits, at, 8);
  Mbarrier b(bits);
  if (!b.valid()) throw KernelFault{kIllegalInstruction, "a bulk copy's mbarrier was not initialised"};
  const Mbarrier::Outcome outcome = b.apply(0, -int64_t{bytes}, 0, true);
  if (outcome == Mbarrier::Outcome::kTooManyBytes)
    throw KernelFault{kIllegalInstruction, "a bulk copy brings more bytes than its mbarrier counts"};
  bits = b.bits();
  std::memcpy(at, &bits, 8);
  return outcome == Mbarrier::Outcome::kCompleted;
}

namespace {

uint64_t address_of(const Warp& w, const Instruction& i, BulkSlot base, BulkSlot offset, int lane) {
  return w.lanes<uint64_t>(i.slots[base])[lane] + static_cast<uint64_t>(static_cast<int32_t>(i.slots[offset]));
}

std::string at_address(uint64_t address) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

// An offset in shared memory, of a generic or a shared address.
uint64_t shared_offset(uint64_t address) {
  return (address & kWindowMask) == kSharedWindow ? address - kSharedWindow : address;
}

}  // namespace

BulkProblem find_bulk_copy(const Warp& w, const Instruction& i, int lane, BulkCopy& c) {
  const auto misaligned = [](const std::string& what, uint64_t address, int alignment) {
    return BulkProblem{
        kMisalignedAddress, "misaligned",
        what + " " + at_address(address) + " of a bulk copy is not a multiple of " + std::to_string(alignment),
        address};
  };
  c.store = i.immediate & 1, c.tensor = i.count != 0;
  const uint64_t shared = shared_offset(address_of(w, i, kBulkShared, kBulkSharedOffset, lane)),
                 other = address_of(w, i, kBulkOther, kBulkOtherOffset, lane);
  if (c.tensor) {
    if (other % 64) return misaligned("tensor map address", other, 64);
    if (!guarded([&] { std::memcpy(static_cast<void*>(&c.map), reinterpret_cast<const void*>(other), sizeof(c.map)); }))
      return {kIllegalAddress, "out-of-bounds", "no tensor map can be read at " + at_address(other), other};
    if (!c.map.valid())
      return {kIllegalInstruction, "tensor-map", "the memory at " + at_address(other) + " is no tensor map", other};
    if (c.map.rank != i.count)
      return {kIllegalInstruction, "tensor-map",
              "a copy of " + std::to_string(i.count) + " dimensions has a tensor map of " + std::to_string(c.map.rank),
              other};
    for (uint32_t d = 0; d < i.count; ++d) c.coordinates[d] = w.lanes<int32_t>(i.slots[kBulkCoordinates + d])[lane];
    c.bytes = c.map.box_bytes(), c.global = c.map.address;
  } else {
    c.bytes = w.lanes<uint32_t>(i.slots[kBulkSize])[lane], c.global = other;
    if (c.bytes % 16) return misaligned("size", c.bytes, 16);
    if (other % 16) return misaligned("global address", other, 16);
  }
  const int alignment = c.tensor ? 128 : 16;
  if (shared % static_cast<uint64_t>(alignment)) return misaligned("shared address", shared, alignment);
  if (shared + c.bytes > w.shared_bytes)
    return {kIllegalAddress, "out-of-bounds",
            std::to_string(c.bytes) + " bytes at shared address " + std::to_string(shared) + "; the block has " +
                std::to_string(w.shared_bytes),
            shared};
  c.shared = static_cast<uint32_t>(shared);
  if (!c.store) {
    const uint64_t barrier = shared_offset(address_of(w, i, kBulkBarrier, kBulkBarrierOffset, lane));
    if (barrier % 8) return misaligned("mbarrier address", barrier, 8);
    if (barrier + 8 > w.shared_bytes)
      return {kIllegalAddress, "out-of-bounds",
              "an mbarrier at shared address " + std::to_string(barrier) + "; the block has " +
                  std::to_string(w.shared_bytes),
              barrier};
    c.barrier = static_cast<uint32_t>(barrier);
  }
  return {};
}

bool same_store(const BulkCopy& a, const BulkCopy& b) {
  return a.store && b.store && a.shared == b.shared && a.bytes == b.bytes && a.global == b.global &&
         std::equal(a.coordinates, a.coordinates + 5, b.coordinates) && !std::memcmp(&a.map, &b.map, sizeof(a.map));
}

void fill_outside(const BulkCopy& c, uint8_t* to, uint32_t bytes) {
  std::memset(to, 0, bytes);
  if (!c.map.fill_nan) return;
  // CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA: a NaN of all ones after the sign.
  for (uint32_t k = 0; k < bytes; ++k) to[k] = k % c.map.element == c.map.element - 1u ? 0x7f : 0xff;
}

void carry_out(const BulkCopy& c, uint8_t* shared) {
  for_each_piece(c, [&](uint32_t at, uint64_t global, uint32_t bytes) {
    if (c.store) {
      if (global) std::memcpy(reinterpret_cast<void*>(global), shared + at, bytes);
    } else if (global) {
      std::memcpy(shared + at, reinterpret_cast<const void*>(global), bytes);
    } else {
      fill_outside(c, shared + at, bytes);
    }
  });
}

}  // namespace ptx_emulator
