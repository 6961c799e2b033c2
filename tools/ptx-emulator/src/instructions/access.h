// How instructions reach memory: the host addresses of a warp's lanes, and the order and scope that a statement asks
// for (PTX ISA 8, 9.7.9). Included by the semantics files.
#pragma once

#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {

[[noreturn]] inline void fault(int code, const char* what, uint64_t address, int lane) {
  char text[160];
  std::snprintf(text, sizeof(text), "%s 0x%llx (lane %d)", what, static_cast<unsigned long long>(address), lane);
  throw KernelFault{code, text};
}

// The accesses of one warp instruction: host pointers of the active lanes.
struct Pointers {
  alignas(64) uint8_t* at[kLanes];
};

template <bool kNarrow>
inline void addresses(const Warp& w, uint32_t slot, int64_t offset, uint64_t (&out)[kLanes]) {
  if constexpr (kNarrow) {
    const uint32_t* base = w.lanes<uint32_t>(slot);
    for (int l = 0; l < kLanes; ++l) out[l] = static_cast<uint32_t>(base[l] + static_cast<uint32_t>(offset));
  } else {
    const uint64_t* base = w.lanes<uint64_t>(slot);
    for (int l = 0; l < kLanes; ++l) out[l] = base[l] + static_cast<uint64_t>(offset);
  }
}

// The one place that knows the state spaces.
template <Space kSpace, bool kNarrow>
inline void locate(const Warp& w, uint32_t slot, int64_t offset, uint32_t bytes, Pointers& p) {
  alignas(64) uint64_t a[kLanes];
  addresses<kNarrow>(w, slot, offset, a);
  uint64_t low_bits = 0;
  for (int l = 0; l < kLanes; ++l) low_bits |= w.active >> l & 1 ? a[l] : 0;
  if (low_bits & (bytes - 1)) {
    for (int l = 0; l < kLanes; ++l)
      if ((w.active >> l & 1) && (a[l] & (bytes - 1))) fault(kMisalignedAddress, "misaligned address", a[l], l);
  }
  const auto shared = [&](int l, uint64_t offset) {
    if (offset + bytes > w.shared_bytes) fault(kIllegalAddress, "shared memory address out of range", offset, l);
    return w.shared + offset;
  };
  const auto local = [&](int l, uint64_t offset) {
    if (offset + bytes > w.local_stride) fault(kIllegalAddress, "local memory address out of range", offset, l);
    return w.local + static_cast<uint64_t>(l) * w.local_stride + offset;
  };
  if constexpr (kSpace == Space::kShared) {
    uint64_t largest = 0;
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t at = w.active >> l & 1 ? a[l] & 0xffffffffu : 0;
      largest = std::max(largest, at);
      p.at[l] = w.shared + at;
    }
    if (largest + bytes > w.shared_bytes)
      for (int l = 0; l < kLanes; ++l)
        if (w.active >> l & 1) shared(l, a[l] & 0xffffffffu);
  } else if constexpr (kSpace == Space::kLocal) {
    for (uint32_t m = w.active; m; m &= m - 1) {
      const int l = first_lane(m);
      p.at[l] = local(l, a[l] & ~kWindowMask);
    }
  } else if constexpr (kSpace == Space::kGlobal) {
    for (int l = 0; l < kLanes; ++l) p.at[l] = reinterpret_cast<uint8_t*>(a[l]);
  } else {
    uint64_t windows = 0;
    for (int l = 0; l < kLanes; ++l) {
      windows |= w.active >> l & 1 ? a[l] & kWindowMask : 0;
      p.at[l] = reinterpret_cast<uint8_t*>(a[l]);
    }
    if (windows == 0) return;
    for (uint32_t m = w.active; m; m &= m - 1) {
      const int l = first_lane(m);
      if ((a[l] & kWindowMask) == kSharedWindow)
        p.at[l] = shared(l, a[l] - kSharedWindow);
      else if ((a[l] & kWindowMask) == kLocalWindow)
        p.at[l] = local(l, a[l] - kLocalWindow);
    }
  }
}

enum class Order : uint8_t { kWeak, kVolatile, kRelaxed, kAcquire, kRelease, kAcqRel };

inline Order take_order(Decoder& d) {
  auto& m = d.modifiers();
  m.take("weak");
  Order order = Order::kWeak;
  if (m.take("volatile"))
    order = Order::kVolatile;
  else if (m.take("relaxed"))
    order = Order::kRelaxed;
  else if (m.take("acquire"))
    order = Order::kAcquire;
  else if (m.take("release"))
    order = Order::kRelease;
  else if (m.take("acq_rel"))
    order = Order::kAcqRel;
  else if (m.take("mmio"))
    order = Order::kRelaxed;
  return order;
}
inline int take_scope(Decoder& d) { return d.modifiers().take_one({"cta", "cluster", "gpu", "sys"}); }

}  // namespace PTX_ISA
}  // namespace ptx_emulator
