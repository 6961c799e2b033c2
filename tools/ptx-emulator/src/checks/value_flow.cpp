// How never-written bytes pass from the registers that an instruction reads to those that it writes.
#include <algorithm>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

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
      const uint32_t *b = w.lanes<uint32_t>(i.slots[4]), *c = w.lanes<uint32_t>(i.slots[5]);
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
}  // namespace ptx_emulator
