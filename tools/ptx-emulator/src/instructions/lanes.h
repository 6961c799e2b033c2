// How a function of one lane becomes an instruction of a warp. Included by the semantics files, which are compiled once
// per instruction set of the host (PTX_ISA names the set; the loops below are written for the compiler to vectorise).
#pragma once

#include <tuple>
#include <utility>

#include "decode.h"
#include "numbers.h"

namespace ptx_emulator {
namespace PTX_ISA {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class D>
inline void store_lanes(D* destination, const D* values, uint32_t active) {
  if (active == kAllLanes) {
    std::memcpy(destination, values, sizeof(D) * kLanes);
    return;
  }
#pragma GCC ivdep
  for (int l = 0; l < kLanes; ++l)
    if (active >> l & 1) destination[l] = values[l];
}

template <class Op, class D, class... S>
struct Map {
  template <size_t... I>
  static inline void apply(Warp& w, const Instruction& i, std::index_sequence<I...>) {
    const std::tuple<const S*...> in{w.lanes<const S>(i.slots[1 + I])...};
    D* destination = w.lanes<D>(i.slots[0]);
    if (w.active == kAllLanes) {
#pragma GCC ivdep
      for (int l = 0; l < kLanes; ++l) destination[l] = Op{}(std::get<I>(in)[l]...);
    } else {
      alignas(64) D values[kLanes];
      for (int l = 0; l < kLanes; ++l) values[l] = Op{}(std::get<I>(in)[l]...);
      store_lanes(destination, values, w.active);
    }
  }
  static void run(Warp& w, const Instruction& i) { apply(w, i, std::index_sequence_for<S...>{}); }
};

// The handler that applies `op` in every active lane.
template <class D, class... S, class Op>
Handler map(Op) {
  return &Map<Op, D, S...>::run;
}

// `op` over the statement's operands, destination first; all of the type.
template <class D, class... S, class Op>
void emit_map(Decoder& d, Type type, Op op) {
  d.expect_operands(1 + sizeof...(S), 1 + sizeof...(S));
  std::vector<uint32_t> slots(1 + sizeof...(S));
  for (size_t k = 0; k < sizeof...(S); ++k) slots[1 + k] = d.source(1 + k, type);
  slots[0] = d.destination(0, type);
  d.emit(map<D, S...>(op), slots);
}

template <class F>
void with_integer(Decoder& d, Type type, F f) {
  switch (type) {
    case Type::kU16:
      return f(uint16_t{});
    case Type::kS16:
      return f(int16_t{});
    case Type::kU32:
      return f(uint32_t{});
    case Type::kS32:
      return f(int32_t{});
    case Type::kU64:
      return f(uint64_t{});
    case Type::kS64:
      return f(int64_t{});
    default:
      d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  }
}

// Untyped bits (and any type of that width).
template <class F>
void with_bits(Decoder& d, Type type, F f) {
  switch (type_bits(type)) {
    case 16:
      return f(uint16_t{});
    case 32:
      return f(uint32_t{});
    case 64:
      return f(uint64_t{});
    default:
      d.fail("type ." + std::string(type_name(type)) + " is not possible here");
  }
}

inline int first_lane(uint32_t mask) { return std::countr_zero(mask); }

inline void nothing(Warp&, const Instruction&) {}  // a hint, or what only the checks see

void register_integer(InstructionTable& table);
void register_bits(InstructionTable& table);
void register_compare(InstructionTable& table);
void register_move(InstructionTable& table);
void register_floating(InstructionTable& table);
void register_conversion(InstructionTable& table);
void register_memory(InstructionTable& table);
void register_atomic(InstructionTable& table);
void register_async_copy(InstructionTable& table);
void register_warp(InstructionTable& table);
void register_tensor(InstructionTable& table);
void register_mbarrier(InstructionTable& table);
void register_warpgroup(InstructionTable& table);

void copy_bulk(Decoder& d);      // cp.async.bulk
void copies_arrive(Decoder& d);  // cp.async.mbarrier.arrive

}  // namespace PTX_ISA

void register_control(InstructionTable& table);

}  // namespace ptx_emulator
