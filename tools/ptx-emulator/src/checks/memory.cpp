// Memory: where the lanes' accesses go, less those that must not be.
#include <algorithm>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

bool LaunchChecker::in_frame(const Warp& w, uint32_t lane, uint64_t offset, uint32_t bytes) const {
  (void)lane;
  for (const Frame* f = w.frame; f; f = f->caller)
    for (const auto& [variable, at] : f->code->local_offsets) {
      const uint64_t start = uint64_t{f->local_base} + at;
      if (offset >= start && offset + bytes <= start + variable->bytes) return true;
    }
  return false;
}

void LaunchChecker::locate(Warp& w, const InstructionEffects& k, uint32_t slot, bool narrow, int64_t offset,
                           Space space, uint32_t bytes, uint32_t lanes, const uint32_t* sizes, Access& a,
                           uint32_t alignment) {
  a.lanes = 0, a.bytes = bytes;
  const bool check = settings.checks & kCheckMemory;
  uint32_t refused = 0;
  for (uint32_t m = lanes; m; m &= m - 1) {
    const uint32_t l = first(m);
    uint64_t at = narrow ? uint64_t{w.lanes<uint32_t>(slot)[l] + static_cast<uint32_t>(offset)}
                         : w.lanes<uint64_t>(slot)[l] + static_cast<uint64_t>(offset);
    const uint64_t given = at;
    Space s = space;
    if (s == Space::kGeneric)
      s = (at & kWindowMask) == kSharedWindow  ? Space::kShared
          : (at & kWindowMask) == kLocalWindow ? Space::kLocal
                                               : Space::kGlobal;
    if (s == Space::kConst || s == Space::kParam) s = Space::kGlobal;
    if (s == Space::kShared) at &= 0xffffffffu;
    if (s == Space::kLocal) at &= ~kWindowMask;
    const uint32_t size = sizes ? sizes[l] : bytes;
    a.address[l] = at, a.space[l] = s, a.region[l] = nullptr;
    const auto refuse = [&](Rule rule, const char* name, const std::string& message, const Region* region) {
      refused |= 1u << l;
      if (check && once(rule, k.id, 0)) report(name, message, w, k, l, given, space_name(s), region);
    };
    if (at & (alignment - 1)) {
      refuse(kMisaligned, "misaligned",
             std::to_string(alignment) + "-byte access to " + space_name(s) + " address " + hex(given), nullptr);
      continue;
    }
    if (s == Space::kShared) {
      if (at + size > w.shared_bytes) {
        refuse(kBounds, "out-of-bounds",
               std::to_string(size) + " bytes at shared address " + std::to_string(at) + "; the block has " +
                   std::to_string(w.shared_bytes),
               nullptr);
        continue;
      }
      a.host[l] = w.shared + at;
      a.any_shared = true;
    } else if (s == Space::kLocal) {
      if (at + size > w.local_stride || (check && !in_frame(w, l, at, size))) {
        refuse(
            kBounds, "out-of-bounds",
            std::to_string(size) + " bytes at local address " + std::to_string(at) + ", in no variable of the thread",
            nullptr);
        continue;
      }
      a.host[l] = w.local + uint64_t{l} * w.local_stride + at;
    } else {
      a.host[l] = reinterpret_cast<uint8_t*>(at);
      a.any_global = true;
      Region* const region = size ? find_region(at) : nullptr;
      a.region[l] = region;
      if (check && size && !(region && at + size <= region->base + region->bytes)) {
        if ((at >= parameters_ && at + size <= parameters_ + parameter_bytes_) ||
            (at >= workspace_ && at + size <= workspace_ + workspace_bytes_)) {
          a.lanes |= 1u << l;
          continue;
        }
        a.region[l] = nullptr;
        if (const std::string gone = region ? "" : Memory::instance().freed(at); !gone.empty()) {
          refuse(kFreed, "use-after-free", std::to_string(size) + " bytes at " + hex(at) + ", in freed " + gone,
                 nullptr);
          continue;
        }
        // The nearest allocation says most.
        auto next = std::upper_bound(regions_.begin(), regions_.end(), at,
                                     [](uintptr_t x, const std::shared_ptr<Region>& r) { return x < r->base; });
        const Region* near = region;
        std::string where = "in no allocation";
        const auto consider = [&](const Region& r) {
          const uint64_t distance = at < r.base ? r.base - at : at - (r.base + r.bytes);
          if (distance > (1u << 20)) return;
          near = &r;
          where = std::to_string(distance) + (at < r.base ? " bytes before '" : " bytes after '") + region_name(r) +
                  "' of " + std::to_string(r.bytes) + " bytes";
        };
        if (region)
          where = "across the end of '" + region_name(*region) + "' of " + std::to_string(region->bytes) + " bytes";
        else {
          if (next != regions_.end()) consider(**next);
          if (next != regions_.begin()) consider(**std::prev(next));
        }
        refuse(kBounds, "out-of-bounds", std::to_string(size) + " bytes at " + hex(at) + ", " + where, near);
        continue;
      }
    }
    a.lanes |= 1u << l;
  }
  refused_ = refused;
}

void LaunchChecker::locate_rows(Warp& w, const InstructionEffects& k, Access& a) {
  const uint32_t rows = k.elements >= 4 ? kAllLanes : (1u << (8 * k.elements)) - 1;
  locate(w, k, k.address, k.narrow, k.offset, Space::kShared, 16, rows, nullptr, a, 16);
}

}  // namespace ptx_emulator
