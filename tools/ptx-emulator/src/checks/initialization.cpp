// Never-written values. Beside a frame's registers lie three words for each of its words: for byte k of a register, the
// lanes in which it was never written; which arithmetic instruction first used such a value (0: it was only copied);
// and which load brought it.
#include <algorithm>
#include <cstring>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

uint32_t* LaunchChecker::shadow(const Warp& w, uint32_t slot, int which) const {
  return w.frame->shadow + static_cast<size_t>(which) * (w.frame->code->frame_bytes / 4) + (slot >> 2);
}

uint32_t LaunchChecker::bad(const Warp& w, const LaneSlot& s) const {
  if (s.slot == kNever) return 0;
  const uint32_t* b = shadow(w, s.slot, 0);
  uint32_t all = b[0];
  for (uint32_t k = 1; k < s.bytes; ++k) all |= b[k];
  return all;
}

void LaunchChecker::set(Warp& w, const LaneSlot& s, uint32_t lanes, uint32_t bad_lanes, uint32_t origin,
                        uint32_t loaded) {
  if (s.slot == kNever) return;
  uint32_t* b = shadow(w, s.slot, 0);
  for (uint32_t k = 0; k < std::max<uint32_t>(s.bytes, 1); ++k) b[k] = (b[k] & ~lanes) | (bad_lanes & lanes);
  if (bad_lanes & lanes) *shadow(w, s.slot, 1) = origin, *shadow(w, s.slot, 2) = loaded;
}

// Something outside of the registers depends on the value. `copies`: a value that was only copied may pass.
void LaunchChecker::observe(Warp& w, const InstructionEffects& effects, const LaneSlot& s, uint32_t lanes,
                            const char* what, bool copies) {
  const uint32_t found = bad(w, s) & lanes;
  if (!found) return;
  const uint32_t origin = *shadow(w, s.slot, 1), loaded = *shadow(w, s.slot, 2);
  if (copies && !origin) return;
  const uint32_t at = origin ? origin - 1 : effects.id, lane = first(found);
  if (once(kUninit, at, 0)) {
    Finding f;
    f.rule = "uninitialized";
    f.spot = spot_of(w.shadow->id, at, lane);
    f.space = loaded ? "memory" : "register";
    f.message = std::string("a value that was never written ") + (loaded ? "(it was loaded) " : "") + "is " +
                (origin ? "computed with, and the result is " : "") + what;
    if (loaded)
      f.second_role = "loaded at", f.second = spot_of(w.shadow->id, loaded - 1, lane);
    else if (origin && at != effects.id)
      f.second_role = "came to light at", f.second = spot(w, effects, lane);
    Findings::instance().add(std::move(f));
  }
  uint32_t* b = shadow(w, s.slot, 0);
  for (uint32_t k = 0; k < std::max<uint32_t>(s.bytes, 1); ++k) b[k] &= ~found;
}

void LaunchChecker::new_frame(Warp& w, Frame& frame, uint32_t lanes) {
  if (!(settings.checks & kCheckInit)) return;
  const Code& code = *frame.code;
  if (!frame.shadow) {
    w.storage.push_back(aligned_bytes(size_t{code.frame_bytes} * 3));
    frame.shadow = reinterpret_cast<uint32_t*>(w.storage.back().get());
  }
  for (const LaneSlot& s : code.registers)
    for (uint32_t k = 0; k < std::max<uint32_t>(s.bytes, 1); ++k) {
      frame.shadow[(s.slot >> 2) + k] = kAllLanes;
      frame.shadow[(s.slot >> 2) + code.frame_bytes / 4] = 0;
      frame.shadow[(s.slot >> 2) + code.frame_bytes / 2] = 0;
    }
  if (w.local_stride)
    for (uint32_t m = lanes; m; m &= m - 1)
      std::memset(w.shadow->local_unwritten.get() + size_t{first(m)} * w.local_stride + frame.local_base, 0xff,
                  std::min(code.local_bytes, w.local_stride - frame.local_base));
}

void LaunchChecker::copy_local(Warp& w, uint32_t lane, uint32_t to, uint32_t from, uint32_t bytes) {
  uint8_t* l = w.shadow->local_unwritten.get();
  if (l) std::memmove(l + size_t{lane} * w.local_stride + to, l + size_t{lane} * w.local_stride + from, bytes);
}

void LaunchChecker::system_reads(Warp& w, uint32_t lane, uint64_t address, uint32_t bytes) {
  if (!(settings.checks & kCheckInit) || !bytes) return;
  const uint8_t* unwritten = nullptr;
  if ((address & kWindowMask) == kSharedWindow)
    unwritten = w.shadow->block->unwritten.data() + (address & ~kWindowMask);
  else if ((address & kWindowMask) == kLocalWindow)
    unwritten = w.shadow->local_unwritten.get() + size_t{lane} * w.local_stride + (address & ~kWindowMask);
  else if (Region* const r = find_region(address); r && r->unwritten.data() && r->holds(address, bytes))
    unwritten = r->unwritten.data() + (address - r->base);
  if (!unwritten || std::none_of(unwritten, unwritten + bytes, [](uint8_t b) { return b; })) return;
  const Code& code = *w.frame->code;
  const InstructionEffects& k = code.effects[static_cast<size_t>(w.current - code.instructions.data())];
  if (once(kUninit, k.id, 2))
    report("uninitialized", "a value that was never written is used by a system function", w, k, lane, address,
           (address & kWindowMask) == kLocalWindow ? "local" : "global", nullptr);
}

void LaunchChecker::write_local(Warp& w, uint32_t lane, uint32_t at, uint32_t bytes) {
  uint8_t* l = w.shadow->local_unwritten.get();
  if (l) std::memset(l + size_t{lane} * w.local_stride + at, 0, bytes);
}

uint8_t* LaunchChecker::unwritten(Warp& w, const Access& a, uint32_t lane, int64_t delta) const {
  if (a.space[lane] == Space::kShared)
    return w.shadow->block->unwritten.data() ? w.shadow->block->unwritten.data() + a.address[lane] + delta : nullptr;
  if (a.space[lane] == Space::kLocal)
    return w.shadow->local_unwritten.get() + size_t{lane} * w.local_stride + a.address[lane] + delta;
  Region* const r = a.region[lane];
  return r && r->unwritten.data() ? r->unwritten.data() + (a.address[lane] - r->base) + delta : nullptr;
}

void LaunchChecker::flow_load(Warp& w, const InstructionEffects& k, const Access& a) {
  if (k.destinations.empty()) return;
  for (uint32_t e = 0; e < k.elements && e < k.destinations.size(); ++e) {
    const LaneSlot& d = k.destinations[e];
    if (d.slot == kNever) continue;
    uint32_t masks[8] = {};
    uint32_t any = 0;
    for (uint32_t m = a.lanes; m; m &= m - 1) {
      const uint32_t l = first(m);
      const uint8_t* from = unwritten(w, a, l, int64_t{e} * k.element);
      if (!from) continue;
      uint64_t bytes = 0;
      std::memcpy(&bytes, from, k.element);
      if (!bytes) continue;
      any |= 1u << l;
      for (uint32_t j = 0; j < k.element; ++j) masks[j] |= uint32_t{from[j] != 0} << l;
    }
    if (k.touch == Touch::kAtomic && k.reads) any = 0, std::memset(masks, 0, sizeof(masks));
    uint32_t* b = shadow(w, d.slot, 0);
    for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) {
      const uint32_t found = any ? (j < k.element ? masks[j] : k.sign ? masks[k.element - 1] : 0) : 0;
      b[j] = (b[j] & ~w.active) | found;
    }
    if (any) *shadow(w, d.slot, 1) = 0, *shadow(w, d.slot, 2) = k.id + 1;
  }
}

void LaunchChecker::flow_store(Warp& w, const InstructionEffects& k, const Access& a) {
  for (uint32_t e = 0; e < k.elements; ++e) {
    const LaneSlot s = e < k.sources.size() ? k.sources[e] : LaneSlot{};
    if (s.slot != kNever) observe(w, k, s, a.lanes, "stored", true);
    const uint32_t found = bad(w, s) & a.lanes;
    for (uint32_t m = a.lanes; m; m &= m - 1) {
      const uint32_t l = first(m);
      uint8_t* to = unwritten(w, a, l, int64_t{e} * k.element);
      if (!to) continue;
      if (!(found >> l & 1)) {
        std::memset(to, 0, k.element);
        continue;
      }
      const uint32_t* b = shadow(w, s.slot, 0);
      for (uint32_t j = 0; j < k.element; ++j) to[j] = b[j] >> l & 1 ? 0xff : 0;
    }
  }
}

// ldmatrix and stmatrix: lane 4 r + t holds word t of row r (transposed: its two halves are of two rows).
void LaunchChecker::flow_matrix(Warp& w, const InstructionEffects& k, const Access& a) {
  uint8_t* const base = w.shadow->block->unwritten.data();
  const bool store = k.touch == Touch::kMatrixStore;
  const std::vector<LaneSlot>& slots = store ? k.sources : k.destinations;
  for (uint32_t e = 0; e < k.elements && e < slots.size(); ++e) {
    const LaneSlot& d = slots[e];
    if (store && d.slot != kNever) observe(w, k, d, w.active, "stored", true);
    uint32_t masks[4] = {}, any = 0;
    const uint32_t found = store && d.slot != kNever ? bad(w, d) : 0;
    for (uint32_t r = 0; r < 8; ++r) {
      const uint32_t lane = 8 * e + r;
      if (!(a.lanes >> lane & 1)) continue;
      uint8_t* row = base + a.address[lane];
      if (store) {
        if (!found) {
          std::memset(row, 0, 16);
          continue;
        }
        for (uint32_t c = 0; c < 16; ++c) {
          const uint32_t l = k.sign ? c / 2 * 4 + r / 2 : r * 4 + c / 4, byte = k.sign ? r % 2 * 2 + c % 2 : c % 4;
          row[c] = shadow(w, d.slot, 0)[byte] >> l & 1 ? 0xff : 0;
        }
        continue;
      }
      uint64_t halves[2];
      std::memcpy(halves, row, 16);
      if (!(halves[0] | halves[1])) continue;
      any = 1;
      for (uint32_t c = 0; c < 16; ++c) {
        if (!row[c]) continue;
        const uint32_t l = k.sign ? c / 2 * 4 + r / 2 : r * 4 + c / 4, byte = k.sign ? r % 2 * 2 + c % 2 : c % 4;
        masks[byte] |= 1u << l;
      }
    }
    if (store || d.slot == kNever) continue;
    uint32_t* b = shadow(w, d.slot, 0);
    for (uint32_t j = 0; j < 4; ++j) b[j] = (b[j] & ~w.active) | (masks[j] & w.active);
    if (any) *shadow(w, d.slot, 1) = 0, *shadow(w, d.slot, 2) = k.id + 1;
  }
}

}  // namespace ptx_emulator
