// Atomic operations and fences (PTX ISA 9.7.13).
#include <atomic>

#include "access.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

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

}  // namespace

void register_atomic(InstructionTable& t) {
  t["atom"] = t["atom.f"] = atomic<true>;
  t["red"] = t["red.f"] = atomic<false>;
  t["membar"] = t["fence"] = fence;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
