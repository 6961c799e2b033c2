// Loads, stores, and hints to the caches (PTX ISA 9.7.9).
#include "access.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

template <class T>
inline T read(const uint8_t* at, bool ordered) {
  T value;
  if (ordered)
    value = __atomic_load_n(reinterpret_cast<const T*>(at), __ATOMIC_ACQUIRE);
  else
    std::memcpy(&value, at, sizeof(T));
  return value;
}
template <class T>
inline void write(uint8_t* at, T value, bool ordered) {
  if (ordered)
    __atomic_store_n(reinterpret_cast<T*>(at), value, __ATOMIC_SEQ_CST);
  else
    std::memcpy(at, &value, sizeof(T));
}

// slots: address, then a register for each element. M: the type in memory (its sign decides how it widens); R: the
// register's.
template <class M, class R, Space kSpace, bool kNarrow, bool kOrdered>
void load_run(Warp& w, const Instruction& i) {
  Pointers p;
  const uint32_t count = i.count;
  locate<kSpace, kNarrow>(w, i.slots[0], i.immediate, sizeof(M) * count, p);
  if (kOrdered) ++w.polls;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    const uint8_t* at = p.at[l];
    for (uint32_t k = 0; k < count; ++k)
      w.lanes<R>(i.slots[1 + k])[l] = static_cast<R>(read<M>(at + k * sizeof(M), kOrdered));
  }
}

template <class M, class R, Space kSpace, bool kNarrow, bool kOrdered>
void store_run(Warp& w, const Instruction& i) {
  Pointers p;
  const uint32_t count = i.count;
  locate<kSpace, kNarrow>(w, i.slots[0], i.immediate, sizeof(M) * count, p);
  ++w.writes;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    for (uint32_t k = 0; k < count; ++k)
      write<M>(p.at[l] + k * sizeof(M), static_cast<M>(w.lanes<R>(i.slots[1 + k])[l]), kOrdered);
  }
}

// A kernel parameter is the same for all lanes.
template <class M, class R>
void parameter_run(Warp& w, const Instruction& i) {
  for (uint32_t k = 0; k < i.count; ++k) {
    M value;
    std::memcpy(&value, w.parameters + i.immediate + k * sizeof(M), sizeof(M));
    R* r = w.lanes<R>(i.slots[k]);
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l)
      if (w.active >> l & 1) r[l] = static_cast<R>(value);
  }
}

template <class M, class R>
struct Accessors {
  template <Space kSpace, bool kNarrow>
  static Handler pick(bool store, bool ordered) {
    if (store) return ordered ? store_run<M, R, kSpace, kNarrow, true> : store_run<M, R, kSpace, kNarrow, false>;
    return ordered ? load_run<M, R, kSpace, kNarrow, true> : load_run<M, R, kSpace, kNarrow, false>;
  }
  static Handler pick(Space space, bool narrow, bool store, bool ordered) {
    switch (space) {
      case Space::kShared:
        return narrow ? pick<Space::kShared, true>(store, ordered) : pick<Space::kShared, false>(store, ordered);
      case Space::kLocal:
        return narrow ? pick<Space::kLocal, true>(store, ordered) : pick<Space::kLocal, false>(store, ordered);
      case Space::kGlobal:
      case Space::kConst:
      case Space::kParam:
        return narrow ? pick<Space::kGlobal, true>(store, ordered) : pick<Space::kGlobal, false>(store, ordered);
      case Space::kGeneric:
        return narrow ? pick<Space::kGeneric, true>(store, ordered) : pick<Space::kGeneric, false>(store, ordered);
    }
    return nullptr;
  }
};

// Calls f(M{}, R{}) for a memory type and a register at least as wide.
template <class F>
void with_access(Decoder& d, Type type, int width, bool store, F f) {
  const bool sign = is_signed(type) && !store;
  const int bytes = type_bytes(type);
  const auto reg = [&]<class M>(M) {
    if (width < static_cast<int>(sizeof(M))) d.fail("the register is narrower than the type");
    switch (width) {
      case 1:
        if constexpr (sizeof(M) <= 1) return f(M{}, uint8_t{});
        break;
      case 2:
        if constexpr (sizeof(M) <= 2) return f(M{}, uint16_t{});
        break;
      case 4:
        if constexpr (sizeof(M) <= 4) return f(M{}, uint32_t{});
        break;
      case 8:
        return f(M{}, uint64_t{});
      default:
        break;
    }
    d.fail("this operand cannot be loaded or stored");
  };
  switch (bytes) {
    case 1:
      return sign ? reg(int8_t{}) : reg(uint8_t{});
    case 2:
      return sign ? reg(int16_t{}) : reg(uint16_t{});
    case 4:
      return sign ? reg(int32_t{}) : reg(uint32_t{});
    case 8:
      return reg(uint64_t{});
    default:
      d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  }
}

int take_vector(Decoder& d) {
  const int v = d.modifiers().take_one({"v2", "v4", "v8"});
  return v < 0 ? 1 : 2 << v;
}

template <bool kStore>
void load_or_store(Decoder& d) {
  auto& m = d.modifiers();
  const Order order = take_order(d);
  take_scope(d);
  m.take_cache_hints();
  const Space space = m.take_space();
  if (!kStore) m.take("unified");
  const int vector = take_vector(d);
  m.take_cache_hints();
  const Type type = d.require_type();
  if (type == Type::kPred || type_bits(type) < 8 || type_bits(type) > 64)
    d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  if (vector * type_bytes(type) > 32) d.fail("the vector is too wide");
  d.expect_operands(2, 3);  // and a cache policy
  if (d.operand_count() == 3) d.source(2, Type::kB64);
  const Operand& value = d.operand(kStore ? 1 : 0);
  std::vector<const Operand*> elements;
  if (value.kind == Operand::Kind::kVector)
    for (const Operand& e : value.elements) elements.push_back(&e);
  else
    elements.push_back(&value);
  if (static_cast<int>(elements.size()) != vector) d.fail("the vector has the wrong number of elements");
  if (kStore && (space == Space::kConst || (space == Space::kParam && d.code().entry &&
                                            !d.code().local_offsets.contains(d.variable_of(d.operand(0))))))
    d.fail("this state space cannot be stored to");
  const Decoder::Address address = d.address(d.operand(kStore ? 0 : 1), space);

  int width = 0;
  for (const Operand* e : elements) width = std::max(width, d.slot_width(*e));
  if (width <= 0) width = type_bytes(type);
  std::vector<uint32_t> slots;
  if (!address.kernel_parameter || kStore) slots.push_back(address.base);
  static constexpr Type kBits[] = {Type::kNone, Type::kB8,   Type::kB16,  Type::kNone, Type::kB32,
                                   Type::kNone, Type::kNone, Type::kNone, Type::kB64};
  for (const Operand* e : elements) {
    if (!kStore) {
      slots.push_back(d.destination(*e, width));
    } else if (e->kind == Operand::Kind::kRegister) {
      if (d.slot_width(*e) <= 0) d.fail("this operand cannot be stored");
      slots.push_back(d.source(*e, kBits[width]));
    } else {
      slots.push_back(d.source(*e, width == type_bytes(type) ? type : kBits[width]));
    }
  }
  const bool ordered = order != Order::kWeak;
  with_access(d, type, width, kStore, [&]<class M, class R>(M, R) {
    if constexpr (!kStore) {
      if (address.kernel_parameter) {
        if (address.offset < 0 ||
            address.offset + static_cast<int64_t>(sizeof(M)) * vector > d.kernel().parameter_bytes)
          d.fail("the address is outside of the parameters");
        d.emit(parameter_run<M, R>, slots, address.offset).count = static_cast<uint16_t>(vector);
        return;
      }
    }
    d.emit(Accessors<M, R>::pick(address.space, address.narrow, kStore, ordered), slots, address.offset).count =
        static_cast<uint16_t>(vector);
  });
}

// Hints: the address is decoded, and nothing happens.
void prefetch(Decoder& d) {
  auto& m = d.modifiers();
  const Space space = m.take_space();
  if (!m.take("tensormap") && m.take_one({"L1", "L2"}) < 0) m.take_cache_hints();
  d.expect_operands(1, 2);
  d.address(d.operand(0), space);
  d.emit(nothing, {});
}
void prefetch_uniform(Decoder& d) {
  if (!d.modifiers().take("L1")) d.fail("prefetchu needs .L1");
  d.expect_operands(1, 1);
  d.address(d.operand(0), Space::kGeneric);
  d.emit(nothing, {});
}
void apply_priority(Decoder& d) {
  const Space space = d.modifiers().take_space();
  d.modifiers().take_cache_hints();
  d.expect_operands(2, 2);
  d.address(d.operand(0), space);
  d.emit(nothing, {});
}
void create_policy(Decoder& d) {
  // A policy is a value that only cache hints read.
  auto& m = d.modifiers();
  while (m.untaken() && *m.untaken() != "b64") m.take_next();
  if (d.require_type() != Type::kB64) d.fail("createpolicy needs .b64");
  d.expect_operands(1, 4);
  d.emit(map<uint64_t, uint64_t>([](uint64_t a) { return a; }),
         {d.destination(0, Type::kB64), d.constant(0x14f0000000000000, 8)});
}

}  // namespace

void register_memory(InstructionTable& t) {
  t["ld"] = t["ldu"] = load_or_store<false>;
  t["st"] = load_or_store<true>;
  t["prefetch"] = prefetch;
  t["prefetchu"] = prefetch_uniform;
  t["applypriority"] = t["discard"] = apply_priority;
  t["createpolicy"] = create_policy;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
