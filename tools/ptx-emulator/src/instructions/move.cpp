// Movement between registers, and addresses between state spaces (PTX ISA 9.7.9).
#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

template <class T>
void copy_run(Warp& w, const Instruction& i) {
  T* d = w.lanes<T>(i.slots[0]);
  const T* a = w.lanes<T>(i.slots[1]);
  if (w.active == kAllLanes)
    std::memcpy(d, a, sizeof(T) * kLanes);
  else
    store_lanes(d, a, w.active);
}

// mov between one register and a vector of smaller ones; slots: the wide register, then the parts from the low end.
template <class Whole, class Part, bool kPack>
void pack_run(Warp& w, const Instruction& i) {
  Whole* whole = w.lanes<Whole>(i.slots[0]);
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  alignas(64) Whole value[kLanes];
  if constexpr (kPack) {
    for (int l = 0; l < kLanes; ++l) value[l] = 0;
    for (int k = 0; k < kParts; ++k) {
      const Part* part = w.lanes<Part>(i.slots[1 + k]);
      for (int l = 0; l < kLanes; ++l)
        value[l] |= static_cast<Whole>(static_cast<Whole>(part[l]) << (8 * sizeof(Part) * k));
    }
    store_lanes(whole, value, w.active);
  } else {
    std::memcpy(value, whole, sizeof(value));
    for (int k = 0; k < kParts; ++k) {
      Part* part = w.lanes<Part>(i.slots[1 + k]);
#pragma GCC ivdep
      for (int l = 0; l < kLanes; ++l)
        if (w.active >> l & 1) part[l] = static_cast<Part>(value[l] >> (8 * sizeof(Part) * k));
    }
  }
}

template <bool kPack>
void move_vector(Decoder& d, Type type) {
  const Operand& vector = d.operand(kPack ? 1 : 0);
  const size_t parts = vector.elements.size();
  const int whole = type_bytes(type);
  if (parts == 0 || whole % static_cast<int>(parts) != 0) d.fail("the vector does not fill the register");
  const int part = whole / static_cast<int>(parts);
  std::vector<uint32_t> slots;
  const Type part_type = part == 1 ? Type::kB8 : part == 2 ? Type::kB16 : Type::kB32;
  slots.push_back(kPack ? d.destination(0, type) : d.source(1, type));
  for (const Operand& element : vector.elements)
    slots.push_back(kPack ? d.source(element, part_type) : d.destination(element, part));
  Handler handler = nullptr;
  if (whole == 2 && part == 1) handler = pack_run<uint16_t, uint8_t, kPack>;
  if (whole == 4 && part == 2) handler = pack_run<uint32_t, uint16_t, kPack>;
  if (whole == 4 && part == 1) handler = pack_run<uint32_t, uint8_t, kPack>;
  if (whole == 8 && part == 4) handler = pack_run<uint64_t, uint32_t, kPack>;
  if (whole == 8 && part == 2) handler = pack_run<uint64_t, uint16_t, kPack>;
  if (whole == 8 && part == 1) handler = pack_run<uint64_t, uint8_t, kPack>;
  if (!handler) d.fail("this packing is not possible");
  d.emit(handler, slots);
}

// Addresses in the frame's local memory and in parameter space are relative to where those begin.
bool in_frame_or_parameters(Decoder& d, const Operand& o) {
  return o.kind == Operand::Kind::kVariable &&
         (d.code().local_offsets.contains(o.variable) || o.variable->space == Space::kParam);
}

Decoder::Address address_of(Decoder& d, const Operand& variable) {
  Operand wrapped;
  wrapped.kind = Operand::Kind::kAddress;
  wrapped.elements.push_back(variable);
  wrapped.offset = variable.offset;
  return d.address(wrapped, Space::kGeneric);
}

void move(Decoder& d) {
  const Type type = d.require_type();
  d.expect_operands(2, 2);
  const Operand& from = d.operand(1);
  if (type == Type::kPred) {
    const uint32_t a = d.predicate(from);
    d.emit(
        [](Warp& w, const Instruction& i) {
          uint32_t& r = w.predicate(i.slots[0]);
          r = (r & ~w.active) | (w.predicate(i.slots[1]) & w.active);
        },
        {d.destination(0, type), a});
    return;
  }
  if (from.kind == Operand::Kind::kVector) return move_vector<true>(d, type);
  if (d.operand(0).kind == Operand::Kind::kVector) return move_vector<false>(d, type);
  const uint32_t r = d.destination(0, type);
  if (from.kind == Operand::Kind::kSpecial) {
    // The clock counts the warp's own instructions: it never goes back, and repeats from run to run.
    if (from.name == "%clock64" || from.name == "%clock" || from.name == "%clock_hi") {
      if (type_bytes(type) != (from.name == "%clock64" ? 8 : 4)) d.fail("'" + from.name + "' has another width");
      const int64_t shift = from.name == "%clock_hi" ? 32 : 0;
      d.emit(type_bytes(type) == 8 ? Handler{[](Warp& w, const Instruction& i) {
               alignas(64) uint64_t v[kLanes];
               for (uint64_t& x : v) x = w.issued;
               store_lanes(w.lanes<uint64_t>(i.slots[0]), v, w.active);
             }}
                                   : Handler{[](Warp& w, const Instruction& i) {
                                       alignas(64) uint32_t v[kLanes];
                                       for (uint32_t& x : v) x = static_cast<uint32_t>(w.issued >> i.immediate);
                                       store_lanes(w.lanes<uint32_t>(i.slots[0]), v, w.active);
                                     }},
             {r}, shift);
      return;
    }
    if (from.name == "%globaltimer" || from.name == "%globaltimer_lo" || from.name == "%globaltimer_hi") {
      if (type_bytes(type) != (from.name == "%globaltimer" ? 8 : 4)) d.fail("'" + from.name + "' has another width");
      const int64_t shift = from.name == "%globaltimer_hi" ? 32 : 0;
      d.emit(type_bytes(type) == 8 ? Handler{[](Warp& w, const Instruction& i) {
               timespec now{};
               clock_gettime(CLOCK_MONOTONIC, &now);
               alignas(64) uint64_t v[kLanes];
               for (uint64_t& x : v)
                 x = static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
               store_lanes(w.lanes<uint64_t>(i.slots[0]), v, w.active);
             }}
                                   : Handler{[](Warp& w, const Instruction& i) {
                                       timespec now{};
                                       clock_gettime(CLOCK_MONOTONIC, &now);
                                       const uint64_t time = static_cast<uint64_t>(now.tv_sec) * 1000000000u +
                                                             static_cast<uint64_t>(now.tv_nsec);
                                       alignas(64) uint32_t v[kLanes];
                                       for (uint32_t& x : v) x = static_cast<uint32_t>(time >> i.immediate);
                                       store_lanes(w.lanes<uint32_t>(i.slots[0]), v, w.active);
                                     }},
             {r}, shift);
      return;
    }
  }
  if (in_frame_or_parameters(d, from)) {
    const Decoder::Address address = address_of(d, from);
    if (type_bytes(type) == 4)
      d.emit(map<uint32_t, uint64_t, uint32_t>([](uint64_t a, uint32_t b) { return static_cast<uint32_t>(a) + b; }),
             {r, address.base, d.constant(static_cast<uint64_t>(address.offset), 4)});
    else
      d.emit(map<uint64_t, uint64_t, uint64_t>([](uint64_t a, uint64_t b) { return a + b; }),
             {r, address.base, d.constant(static_cast<uint64_t>(address.offset), 8)});
    return;
  }
  if (from.kind == Operand::Kind::kLabel || type == Type::kB8) d.fail("unexpected operand");
  const uint32_t a = d.source(1, type);
  with_bits(d, type, [&]<class T>(T) { d.emit(copy_run<T>, {r, a}); });
}

// Shared and local addresses are offsets in their own space, and lie in a window of the generic one.
void convert_address(Decoder& d) {
  const bool from_generic = d.modifiers().take("to");
  const Space space = d.modifiers().take_space();
  const Type type = d.require_type();
  if (space == Space::kGeneric) d.fail("cvta needs a state space");
  if (type != Type::kU64 && type != Type::kU32) d.fail("cvta needs .u64");
  d.expect_operands(2, 2);
  const Operand& from = d.operand(1);
  uint32_t a;
  if (in_frame_or_parameters(d, from)) {
    const Decoder::Address address = address_of(d, from);
    a = d.temporary(8);
    d.emit(map<uint64_t, uint64_t, uint64_t>([](uint64_t x, uint64_t y) { return x + y; }),
           {a, address.base, d.constant(static_cast<uint64_t>(address.offset), 8)});
  } else {
    a = d.source(1, type);
  }
  const uint32_t r = d.destination(0, type);
  if (type == Type::kU32) {
    d.emit(copy_run<uint32_t>, {r, a});
    return;
  }
  uint64_t window = 0;
  if (space == Space::kShared) window = kSharedWindow;
  if (space == Space::kLocal || (space == Space::kParam && !d.code().entry)) window = kLocalWindow;
  d.emit(map<uint64_t, uint64_t, uint64_t>([](uint64_t x, uint64_t y) { return x + y; }),
         {r, a, d.constant(from_generic ? 0 - window : window, 8)});
}

template <bool kWindow, uint64_t kBase>
void is_space_run(Warp& w, const Instruction& i) {
  const uint64_t* a = w.lanes<uint64_t>(i.slots[1]);
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t window = a[l] & kWindowMask;
    const bool inside = kWindow ? window == kBase : window != kSharedWindow && window != kLocalWindow;
    mask |= static_cast<uint32_t>(inside) << l;
  }
  uint32_t& p = w.predicate(i.slots[0]);
  p = (p & ~w.active) | (mask & w.active);
}

void is_space(Decoder& d) {
  const Space space = d.modifiers().take_space();
  d.expect_operands(2, 2);
  const uint32_t a = d.source(1, Type::kU64), p = d.destination(d.operand(0), 0);
  if (space == Space::kShared)
    d.emit(is_space_run<true, kSharedWindow>, {p, a});
  else if (space == Space::kLocal)
    d.emit(is_space_run<true, kLocalWindow>, {p, a});
  else if (space == Space::kGlobal)
    d.emit(is_space_run<false, 0>, {p, a});
  else
    d.fail("isspacep of this state space is not supported");
}

}  // namespace

void register_move(InstructionTable& t) {
  t["mov"] = move;
  t["cvta"] = convert_address;
  t["isspacep"] = is_space;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
