// Loads, stores, atomics and asynchronous copies (PTX ISA 9.7.9, 9.7.13). Every access finds its bytes through
// `locate`, the one place that knows the state spaces.
#include <atomic>

#include "lanes.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

[[noreturn]] void fault(int code, const char* what, uint64_t address, int lane) {
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

Order take_order(Decoder& d) {
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
int take_scope(Decoder& d) { return d.modifiers().take_one({"cta", "cluster", "gpu", "sys"}); }

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

// Atomics: `Op` maps the old value and the operands to the new one.
template <class T>
using Storage = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <class T, class Op, int kOperands, bool kReturn, Space kSpace>
void atomic_run(Warp& w, const Instruction& i) {
  Pointers p;
  using U = Storage<T>;
  const uint32_t* s = i.slots + (kReturn ? 1 : 0);
  locate<kSpace, false>(w, s[0], i.immediate, sizeof(T), p);
  ++w.polls;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    U* at = reinterpret_cast<U*>(p.at[l]);
    const T b = w.lanes<T>(s[1])[l];
    U old = __atomic_load_n(at, __ATOMIC_RELAXED), next;
    do {
      if constexpr (kOperands == 1)
        next = std::bit_cast<U>(static_cast<T>(Op{}(std::bit_cast<T>(old), b)));
      else
        next = std::bit_cast<U>(static_cast<T>(Op{}(std::bit_cast<T>(old), b, w.lanes<T>(s[2])[l])));
    } while (!__atomic_compare_exchange_n(at, &old, next, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    w.writes += old != next;
    if constexpr (kReturn) w.lanes<U>(i.slots[0])[l] = old;
  }
}

template <class T, int kOperands, bool kReturn, class Op>
Handler atomic_handler(Decoder& d, Space space, Op) {
  switch (space) {
    case Space::kShared:
      return atomic_run<T, Op, kOperands, kReturn, Space::kShared>;
    case Space::kGlobal:
      return atomic_run<T, Op, kOperands, kReturn, Space::kGlobal>;
    case Space::kGeneric:
      return atomic_run<T, Op, kOperands, kReturn, Space::kGeneric>;
    default:
      d.fail("atomics work on global and shared memory");
  }
}

struct PackedHalf {
  uint32_t bits;
};
struct PackedBfloat {
  uint32_t bits;
};
template <class T>
uint32_t packed_add(uint32_t a, uint32_t b) {
  const auto low = [](uint32_t x) { return widen(T{static_cast<uint16_t>(x)}); };
  return narrow<T>(low(a) + low(b)).bits | static_cast<uint32_t>(narrow<T>(low(a >> 16) + low(b >> 16)).bits) << 16;
}

template <bool kReturn>
void atomic(Decoder& d) {
  auto& m = d.modifiers();
  take_order(d);
  take_scope(d);
  m.take("async") ? d.fail("asynchronous reductions are not supported") : void();
  const Space space = m.take_space();
  m.take_cache_hints();
  const int op = m.take_one({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  if (op < 0) d.fail("an operation is missing or unknown");
  m.take("noftz");
  const Type type = d.require_type();
  const size_t first = kReturn ? 1 : 0, operands = op == 7 ? 2 : 1;
  if (!kReturn && op >= 6 && op <= 7) d.fail("red has no such operation");
  d.expect_operands(first + 1 + operands, first + 2 + operands);
  if (d.operand_count() == first + 2 + operands) d.source(first + 1 + operands, Type::kB64);  // a cache policy
  Decoder::Address address = d.address(d.operand(first), space);
  if (address.narrow) {
    const uint32_t wide = d.temporary(8);
    d.emit(map<uint64_t, uint32_t>([](uint32_t a) { return uint64_t{a}; }), {wide, address.base});
    address.base = wide;
  }
  std::vector<uint32_t> slots;
  if (kReturn) slots.push_back(d.destination(0, type));
  slots.push_back(address.base);
  for (size_t k = 0; k < operands; ++k) slots.push_back(d.source(first + 1 + k, type));
  const auto emit = [&]<class T, class Op>(T, Op op) {
    d.emit(atomic_handler<T, 1, kReturn>(d, address.space, op), slots, address.offset);
  };
  const auto impossible = [&] { d.fail("type ." + std::string(type_name(type)) + " is not possible here"); };
  const auto integers = [&](auto f) {
    if (type == Type::kU32)
      f(uint32_t{});
    else if (type == Type::kS32)
      f(int32_t{});
    else if (type == Type::kU64)
      f(uint64_t{});
    else if (type == Type::kS64)
      f(int64_t{});
    else
      impossible();
  };
  const auto bits = [&](auto f) {
    if (type == Type::kB32)
      f(uint32_t{});
    else if (type == Type::kB64)
      f(uint64_t{});
    else
      impossible();
  };
  switch (op) {
    case 0:
      if (type == Type::kF32) return emit(float{}, [](float a, float b) { return a + b; });
      if (type == Type::kF64) return emit(double{}, [](double a, double b) { return a + b; });
      if (type == Type::kF16) return emit(Half{}, [](Half a, Half b) { return narrow<Half>(widen(a) + widen(b)); });
      if (type == Type::kBf16)
        return emit(Bfloat{}, [](Bfloat a, Bfloat b) { return narrow<Bfloat>(widen(a) + widen(b)); });
      if (type == Type::kF16x2) return emit(uint32_t{}, [](uint32_t a, uint32_t b) { return packed_add<Half>(a, b); });
      if (type == Type::kBf16x2)
        return emit(uint32_t{}, [](uint32_t a, uint32_t b) { return packed_add<Bfloat>(a, b); });
      return integers([&]<class T>(T) {
        emit(T{}, [](T a, T b) { return static_cast<T>(static_cast<Storage<T>>(a) + static_cast<Storage<T>>(b)); });
      });
    case 1:
      return integers([&]<class T>(T) { emit(T{}, [](T a, T b) { return std::min(a, b); }); });
    case 2:
      return integers([&]<class T>(T) { emit(T{}, [](T a, T b) { return std::max(a, b); }); });
    case 3:
      return bits([&]<class T>(T) { emit(T{}, [](T a, T b) { return a & b; }); });
    case 4:
      return bits([&]<class T>(T) { emit(T{}, [](T a, T b) { return a | b; }); });
    case 5:
      return bits([&]<class T>(T) { emit(T{}, [](T a, T b) { return a ^ b; }); });
    case 6:
      return bits([&]<class T>(T) { emit(T{}, [](T, T b) { return b; }); });
    case 7: {
      const auto swap = [](auto a, auto expected, auto b) { return a == expected ? b : a; };
      if constexpr (kReturn) {
        if (type == Type::kB16) {
          d.emit(atomic_handler<uint16_t, 2, true>(d, address.space, swap), slots, address.offset);
          return;
        }
        return bits(
            [&]<class T>(T) { d.emit(atomic_handler<T, 2, true>(d, address.space, swap), slots, address.offset); });
      }
      return;
    }
    case 8:
      if (type != Type::kU32) impossible();
      return emit(uint32_t{}, [](uint32_t a, uint32_t b) { return a >= b ? 0u : a + 1; });
    case 9:
      if (type != Type::kU32) impossible();
      return emit(uint32_t{}, [](uint32_t a, uint32_t b) { return a == 0 || a > b ? b : a - 1; });
  }
}

void nothing(Warp&, const Instruction&) {}

void fence(Decoder& d) {
  auto& m = d.modifiers();
  if (d.statement().opcode == "membar") {
    if (m.take_one({"cta", "gl", "sys"}) < 0) d.fail("membar needs a level");
  } else if (m.take("proxy")) {
    if (m.take_one({"alias", "async", "async::generic", "tensormap::generic"}) < 0) d.fail("unknown proxy");
    m.take_one({"global", "shared::cta", "shared::cluster", "shared"});
  } else if (m.take("mbarrier_init")) {
    if (!m.take("release") || !m.take("cluster")) d.fail("fence.mbarrier_init needs .release.cluster");
  } else {
    m.take_one({"sc", "acq_rel", "acquire", "release"});
    if (take_scope(d) < 0) d.fail("fence needs a scope");
  }
  d.expect_operands(0, 0);
  d.emit([](Warp&, const Instruction&) { std::atomic_thread_fence(std::memory_order_seq_cst); }, {});
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

// cp.async: the copy lands at once, which is one of the orders that the ISA allows. Bytes past the source size are
// zeros and not read. slots: target, source, source size
template <bool kNarrowTarget>
void copy_async_run(Warp& w, const Instruction& i) {
  Pointers to;
  const uint32_t bytes = i.count;
  locate<Space::kShared, kNarrowTarget>(w, i.slots[0], i.immediate, bytes, to);
  const uint64_t* base = w.lanes<uint64_t>(i.slots[1]);
  const uint32_t* sizes = w.lanes<uint32_t>(i.slots[2]);
  const int64_t offset =
      static_cast<int64_t>(static_cast<uint64_t>(i.slots[3]) | static_cast<uint64_t>(i.slots[4]) << 32);
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    const uint64_t source = base[l] + static_cast<uint64_t>(offset);
    const uint32_t size = std::min(sizes[l], bytes);
    if (source & (bytes - 1)) fault(kMisalignedAddress, "misaligned address", source, l);
    if (size == 16 && bytes == 16) {
      std::memcpy(to.at[l], reinterpret_cast<const uint8_t*>(source), 16);
    } else {
      if (size) std::memcpy(to.at[l], reinterpret_cast<const uint8_t*>(source), size);
      std::memset(to.at[l] + size, 0, bytes - size);
    }
  }
}

void copy_async(Decoder& d) {
  auto& m = d.modifiers();
  if (!m.take("async")) d.fail("only cp.async is known");
  if (m.take("bulk")) return copy_bulk(d);
  if (m.take("mbarrier")) {
    if (!m.take("arrive")) d.fail("cp.async.mbarrier needs .arrive");
    return copies_arrive(d);
  }
  if (m.take("commit_group")) {
    d.expect_operands(0, 0);
    d.emit(nothing, {});
    return;
  }
  if (m.take("wait_group")) {
    d.expect_operands(1, 1);
    if (d.operand(0).kind != Operand::Kind::kInteger) d.fail("the number of groups must be a constant");
    d.emit(nothing, {}, static_cast<int64_t>(d.operand(0).bits));
    return;
  }
  if (m.take("wait_all")) {
    d.expect_operands(0, 0);
    d.emit(nothing, {});
    return;
  }
  const int cache = m.take_one({"ca", "cg"});
  if (cache < 0) d.fail("this asynchronous copy is not supported");
  const Space to = m.take_space(), from = m.take_space();
  // The spaces come in the order of the text only if they differ.
  if (!((to == Space::kGlobal && from == Space::kShared) || (to == Space::kShared && from == Space::kGlobal)))
    d.fail("cp.async copies from .global to .shared");
  m.take_cache_hints();
  d.expect_operands(3, 5);
  if (d.operand(2).kind != Operand::Kind::kInteger) d.fail("the size must be a constant");
  const uint64_t bytes = d.operand(2).bits;
  if (bytes != 16 && (cache == 1 || (bytes != 4 && bytes != 8))) d.fail("this size is not possible");
  const Decoder::Address target = d.address(d.operand(0), Space::kShared),
                         source = d.address(d.operand(1), Space::kGlobal);
  if (source.narrow) d.fail("the source needs a 64-bit address");
  uint32_t size = d.constant(bytes, 4);
  if (d.operand_count() > 3) {
    const Operand& third = d.operand(3);
    if (d.register_type(third) == Type::kPred) {  // ignore-src
      size = d.temporary(4);
      const uint32_t p = d.predicate(third);
      d.emit(
          [](Warp& w, const Instruction& i) {
            uint32_t* r = w.lanes<uint32_t>(i.slots[0]);
            for (int l = 0; l < kLanes; ++l)
              r[l] = w.predicate(i.slots[1]) >> l & 1 ? 0 : static_cast<uint32_t>(i.immediate);
          },
          {size, p}, static_cast<int64_t>(bytes));
    } else if (d.slot_width(third) == 8) {
      d.source(3, Type::kB64);  // a cache policy
    } else {
      size = d.source(3, Type::kU32);
    }
  }
  if (d.operand_count() > 4) d.source(4, Type::kB64);
  const uint64_t offset = static_cast<uint64_t>(source.offset);
  d.emit(target.narrow ? copy_async_run<true> : copy_async_run<false>,
         {target.base, source.base, size, static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)},
         target.offset)
      .count = static_cast<uint16_t>(bytes);
}

}  // namespace

void register_memory(InstructionTable& t) {
  t["ld"] = t["ldu"] = load_or_store<false>;
  t["st"] = load_or_store<true>;
  t["atom"] = t["atom.f"] = atomic<true>;
  t["red"] = t["red.f"] = atomic<false>;
  t["membar"] = t["fence"] = fence;
  t["prefetch"] = prefetch;
  t["prefetchu"] = prefetch_uniform;
  t["applypriority"] = t["discard"] = apply_priority;
  t["createpolicy"] = create_policy;
  t["cp"] = copy_async;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
