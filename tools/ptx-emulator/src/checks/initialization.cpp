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

// What the destinations hold after an instruction that touches no memory.
void LaunchChecker::flow(Warp& w, const Instruction& i, const InstructionEffects& k) {
  if (k.flow == Flow::kNone) return;
  const uint32_t active = w.active;
  uint32_t any = 0;
  for (const LaneSlot& s : k.sources) any |= bad(w, s);
  const auto clean = [&] {
    for (const LaneSlot& d : k.destinations)
      if (d.slot != kNever) {
        uint32_t* b = shadow(w, d.slot, 0);
        for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) b[j] &= ~active;
      }
  };
  const bool cross = k.flow == Flow::kShuffle || k.flow == Flow::kAcross || k.flow == Flow::kMultiply;
  if (k.flow == Flow::kFine || (!(any & active) && !cross) || (!any && k.flow != Flow::kShuffle)) return clean();
  // Where the trouble came from: the first source that has any.
  uint32_t origin = 0, loaded = 0;
  for (const LaneSlot& s : k.sources)
    if (bad(w, s)) {
      origin = *shadow(w, s.slot, 1), loaded = *shadow(w, s.slot, 2);
      if (origin) break;
    }
  const auto mark = [&](const LaneSlot& d, uint32_t byte, uint32_t lanes) {
    uint32_t& b = shadow(w, d.slot, 0)[byte];
    b = (b & ~active) | (lanes & active);
    if (lanes & active) *shadow(w, d.slot, 1) = origin, *shadow(w, d.slot, 2) = loaded;
  };
  const auto byte_of = [&](const LaneSlot& s, uint32_t byte) {
    return s.slot == kNever || byte >= std::max<uint32_t>(s.bytes, 1) ? 0 : shadow(w, s.slot, 0)[byte];
  };
  switch (k.flow) {
    case Flow::kCopy: {
      std::vector<uint32_t> bytes;
      uint32_t total = 0;
      for (const LaneSlot& d : k.destinations) total += std::max<uint32_t>(d.bytes, 1);
      for (const LaneSlot& s : k.sources) {
        const uint32_t width = s.slot != kNever ? std::max<uint32_t>(s.bytes, 1)
                                                : total / static_cast<uint32_t>(std::max<size_t>(k.sources.size(), 1));
        for (uint32_t j = 0; j < width; ++j) bytes.push_back(byte_of(s, j));
      }
      size_t at = 0;
      for (const LaneSlot& d : k.destinations)
        for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j, ++at)
          if (d.slot != kNever) mark(d, j, at < bytes.size() ? bytes[at] : 0);
      return;
    }
    case Flow::kBytewise:
    case Flow::kAnd:
    case Flow::kOr: {
      const LaneSlot& d = k.destinations[0];
      if (d.slot == kNever) return;
      uint32_t result[8] = {};
      for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) {
        for (const LaneSlot& s : k.sources) result[j] |= byte_of(s, j);
        if (k.flow == Flow::kBytewise || k.sources.size() != 2) continue;
        // A written byte (or predicate) that decides alone.
        for (size_t n = 0; n < 2; ++n) {
          const uint32_t from = i.slots[1 + n];
          uint32_t decides = 0;
          if (d.bytes == 0) {
            const uint32_t p = w.predicate(from);
            decides = k.flow == Flow::kAnd ? ~p : p;
          } else {
            for (uint32_t l = 0; l < kLanes; ++l)
              decides |= uint32_t{w.registers[from + l * d.bytes + j] == (k.flow == Flow::kAnd ? 0 : 0xff)} << l;
          }
          result[j] &= ~(decides & ~byte_of(k.sources[n], j));
        }
      }
      for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kSelect: {
      const LaneSlot& d = k.destinations[0];
      if (d.slot == kNever || k.sources.size() < 3) return;
      const uint32_t p = w.predicate(i.slots[3]), unsure = bad(w, k.sources[2]);
      uint32_t result[8] = {};
      for (uint32_t j = 0; j < d.bytes; ++j)
        result[j] = (byte_of(k.sources[0], j) & p) | (byte_of(k.sources[1], j) & ~p) | unsure;
      if (unsure & active && !origin) origin = k.id + 1;
      for (uint32_t j = 0; j < d.bytes; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kPermute: {
      const LaneSlot& d = k.destinations[0];
      if (d.slot == kNever) return;
      uint32_t result[4];
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t pick = static_cast<uint32_t>(k.groups) >> (4 * j) & 7;
        result[j] = byte_of(k.sources[pick / 4], pick % 4);
      }
      for (uint32_t j = 0; j < 4; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kExtend: {
      const LaneSlot &d = k.destinations[0], s = k.sources[0];
      if (d.slot == kNever) return;
      uint32_t result[8];
      const uint32_t from = std::min<uint32_t>(k.element, std::max<uint32_t>(s.bytes, 1));
      for (uint32_t j = 0; j < d.bytes; ++j) result[j] = j < from ? byte_of(s, j) : k.sign ? byte_of(s, from - 1) : 0;
      for (uint32_t j = 0; j < d.bytes; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kShift: {
      const LaneSlot &d = k.destinations[0], s = k.sources[0];
      if (d.slot == kNever) return;
      uint32_t result[8] = {};
      for (int j = 0; j < d.bytes; ++j)
        for (const int64_t bit : {8 * j - k.groups, 8 * j + 7 - k.groups})
          if (bit >= 0) {
            const auto byte = static_cast<uint32_t>(bit / 8);
            result[j] |= byte < s.bytes ? byte_of(s, byte) : k.sign ? byte_of(s, s.bytes - 1u) : 0;
          }
      for (uint32_t j = 0; j < d.bytes; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kShuffle: {
      // As the instruction itself finds its lanes; a lane that does not execute it has nothing to give.
      const size_t at = i.kind == Kind::kWarpSync ? 1 : 1;
      const uint32_t *b = w.lanes<uint32_t>(i.slots[at + 3]), *c = w.lanes<uint32_t>(i.slots[at + 4]);
      const Statement& s = w.frame->code->function->statements[i.statement];
      const auto is = [&](const char* name) {
        return std::find(s.modifiers.begin(), s.modifiers.end(), name) != s.modifiers.end();
      };
      const int mode = is("up") ? 0 : is("down") ? 1 : is("bfly") ? 2 : 3;
      uint32_t from[4] = {}, absent = 0;
      for (uint32_t m = active; m; m &= m - 1) {
        const int l = static_cast<int>(first(m));
        const int bval = static_cast<int>(b[l] & 31), cval = static_cast<int>(c[l] & 31),
                  mask = static_cast<int>(c[l] >> 8 & 31), most = (l & mask) | (cval & ~mask), least = l & mask;
        int j = mode == 0 ? l - bval : mode == 1 ? l + bval : mode == 2 ? l ^ bval : least | (bval & ~mask);
        if (!(mode == 0 ? j >= most : j <= most)) j = l;
        j &= 31;
        absent |= (~active >> j & 1) << l;
        for (uint32_t byte = 0; byte < 4; ++byte) from[byte] |= (byte_of(k.sources[0], byte) >> j & 1) << l;
      }
      if (absent && !origin) origin = k.id + 1;
      const LaneSlot& d = k.destinations[0];
      for (uint32_t byte = 0; byte < 4; ++byte) from[byte] |= absent;
      if (d.slot != kNever)
        for (uint32_t byte = 0; byte < 4; ++byte) mark(d, byte, from[byte]);
      for (size_t n = 1; n < k.destinations.size(); ++n) set(w, k.destinations[n], active, 0, 0, 0);
      return;
    }
    case Flow::kMultiply:
      return flow_multiply(w, k);
    default:
      break;
  }
  if (!origin) origin = k.id + 1;
  uint32_t result = any & active;
  if (k.flow == Flow::kAcross) result = result ? active : 0;
  if (k.flow == Flow::kCompare) {
    // p = compare(a, b) op c: a written c may decide.
    const uint32_t others = bad(w, k.sources[0]) | bad(w, k.sources[1]), c = bad(w, k.sources[2]);
    const uint32_t value = w.predicate(k.compare_slot) ^ (k.compare_negated ? kAllLanes : 0);
    const uint32_t decides = (k.decides_zero ? ~value : value) & ~c;
    result = ((others & ~decides) | c) & active;
  }
  for (const LaneSlot& d : k.destinations) set(w, d, active, result, origin, loaded);
}

// Never-written elements spoil the rows of A and the columns of B that they lie in (see instructions/tensor.cpp for
// where these are), accumulators themselves.
void LaunchChecker::flow_multiply(Warp& w, const InstructionEffects& k) {
  const size_t a = static_cast<size_t>(k.k_registers_a), b = static_cast<size_t>(k.registers_b),
               tiles = static_cast<size_t>(k.m) / 8;
  uint32_t rows = 0, columns = 0, origin = 0, loaded = 0;
  const auto lanes_to_eight = [](uint32_t lanes) {
    uint32_t eight = 0;
    for (uint32_t r = 0; r < 8; ++r) eight |= uint32_t{(lanes >> (4 * r) & 15) != 0} << r;
    return eight;
  };
  for (size_t r = 0; r < k.sources.size(); ++r) {
    const uint32_t lanes = bad(w, k.sources[r]);
    if (!lanes) continue;
    if (!origin) origin = *shadow(w, k.sources[r].slot, 1);
    if (!loaded) loaded = *shadow(w, k.sources[r].slot, 2);
    if (r < a)
      rows |= lanes_to_eight(lanes) << (r % tiles * 8);
    else if (r < a + b)
      columns |= lanes_to_eight(lanes);
  }
  if (!origin) origin = k.id + 1;
  for (size_t tile = 0; tile < tiles; ++tile) {
    uint32_t even = 0, odd = 0;  // lanes whose element is spoilt
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t row = rows >> (tile * 8 + l / 4) & 1;
      even |= (row | (columns >> (l % 4 * 2) & 1)) << l;
      odd |= (row | (columns >> (l % 4 * 2 + 1) & 1)) << l;
    }
    const auto accumulator = [&](size_t pair) -> uint32_t {
      const size_t at = a + b + (k.half_in ? tile : tile * 2 + pair);
      return at < k.sources.size() ? bad(w, k.sources[at]) : 0;
    };
    const uint32_t e = even | accumulator(0), o = odd | accumulator(1);
    if (k.half_out) {
      if (tile < k.destinations.size()) set(w, k.destinations[tile], w.active, e | o, origin, loaded);
    } else if (tile * 2 + 1 < k.destinations.size()) {
      set(w, k.destinations[tile * 2], w.active, e, origin, loaded);
      set(w, k.destinations[tile * 2 + 1], w.active, o, origin, loaded);
    }
  }
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
