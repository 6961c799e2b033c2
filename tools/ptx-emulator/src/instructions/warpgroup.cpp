// Warpgroup multiplications (PTX ISA 9.7.15): four warps multiply a tile of 64 rows. Each has 16 of them, and does its
// part when it comes by: no warp sees another's accumulators.
//
// Registers lie as in mma.sync: a tile of 8 x 8 accumulators is a pair of registers, lane 4 r + t holding columns 2 t
// and 2 t + 1 of row r; rows 8 to 15 follow rows 0 to 7, then the next columns.
#include "elements.h"
#include "wgmma.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

constexpr int kRows = 16, kMostColumns = 256;

const uint8_t* chunk(const Warp& w, uint32_t at, const char* matrix) {
  if (at + 16 > w.shared_bytes)
    throw KernelFault{kIllegalAddress, std::string("the descriptor of ") + matrix + " leads to shared address " +
                                           std::to_string(at) + "; the block has " + std::to_string(w.shared_bytes) +
                                           " bytes"};
  return w.shared + at;
}

MatrixDescriptor descriptor(const Warp& w, uint32_t slot, const char* matrix) {
  const MatrixDescriptor d(w.lanes<uint64_t>(slot)[first_lane(w.active)]);
  if (d.base)
    throw KernelFault{kIllegalInstruction,
                      std::string("the base offset in the descriptor of ") + matrix + " is not supported"};
  return d;
}

template <class E, class Store>
void spread(const uint8_t* bytes, Store store) {
  constexpr uint32_t kPer = 128 / E::kBits;
  for (uint32_t e = 0; e < kPer; ++e) {
    uint32_t x = 0;
    std::memcpy(&x, bytes + e * E::kBits / 8, E::kBits / 8);
    store(e, E::value(x));
  }
}

// slots: see WgmmaForm
template <class A, class B, bool kHalf>
void multiply_run(Warp& w, const Instruction& i) {
  using Acc = typename A::Acc;
  constexpr int K = 256 / A::kBits;
  const WgmmaForm form = WgmmaForm::of(i.immediate);
  // Only of 16-bit elements can the rows lie along memory.
  const bool a_turned = A::kBits == 16 && form.a_transposed, b_turned = B::kBits == 16 && form.b_transposed;
  const uint32_t n = form.columns, width = (n + 15) / 16 * 16;
  const uint32_t *as = i.slots + 1, *bs = as + form.a_slots(), *ds = bs + 1;
  alignas(64) static thread_local Acc a[kRows][K], b[K][kMostColumns], c[kRows][kMostColumns];
  if (form.a_in_registers) {
    unpack<A, kRows, K>(w, as, a);
  } else {
    const uint32_t first = w.index % 4 * kRows;
    for_each_chunk(descriptor(w, as[0], "A"), first, kRows, a_turned, [&](uint32_t at, uint32_t row, uint32_t k) {
      if (a_turned)
        spread<A>(chunk(w, at, "A"), [&](uint32_t e, Acc x) { a[row + e % 8][k] = x; });
      else
        spread<A>(chunk(w, at, "A"), [&](uint32_t e, Acc x) { a[row][k * (K / 2) + e] = x; });
    });
  }
  for_each_chunk(descriptor(w, bs[0], "B"), 0, n, b_turned, [&](uint32_t at, uint32_t row, uint32_t k) {
    if (b_turned)
      spread<B>(chunk(w, at, "B"), [&](uint32_t e, Acc x) { b[k][row + e % 8] = x; });
    else
      spread<B>(chunk(w, at, "B"), [&](uint32_t e, Acc x) { b[k * (K / 2) + e][row] = x; });
  });
  if (n != width)
    for (auto& row : b) std::fill(row + n, row + width, Acc{});
  if (form.a_negated != form.b_negated)
    for (auto& row : a)
      for (Acc& x : row) x = -x;
  // Accumulators in and out, by the tiles of eight columns.
  constexpr uint32_t kPerTile = kHalf ? 2 : 4;
  const bool keeps = w.predicate(i.slots[0]) >> first_lane(w.active) & 1;
  for (uint32_t tile = 0; tile < width / 8; ++tile)
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t at = tile * kPerTile + half * kPerTile / 2;
      for (int l = 0; l < kLanes; ++l) {
        Acc* to = &c[8 * half + static_cast<uint32_t>(l) / 4][tile * 8 + static_cast<uint32_t>(l) % 4 * 2];
        if (!keeps || tile * 8 >= n) {
          to[0] = to[1] = 0;
        } else if constexpr (kHalf) {
          const uint32_t packed = w.lanes<uint32_t>(ds[at])[l];
          to[0] = widen(Half{static_cast<uint16_t>(packed)}), to[1] = widen(Half{static_cast<uint16_t>(packed >> 16)});
        } else {
          to[0] = w.lanes<Acc>(ds[at])[l], to[1] = w.lanes<Acc>(ds[at + 1])[l];
        }
      }
    }
  if constexpr (std::is_same_v<Acc, float>) {
    using Row = float __attribute__((vector_size(64)));
    for (uint32_t column = 0; column < width; column += 16)
      for (int m = 0; m < kRows; m += 8) {
        Row sum[8];
        for (int r = 0; r < 8; ++r) std::memcpy(&sum[r], &c[m + r][column], sizeof(Row));
        for (int k = 0; k < K; ++k) {
          Row row;
          std::memcpy(&row, &b[k][column], sizeof(Row));
          for (int r = 0; r < 8; ++r) sum[r] += a[m + r][k] * row;
        }
        for (int r = 0; r < 8; ++r) std::memcpy(&c[m + r][column], &sum[r], sizeof(Row));
      }
  } else {
    for (int m = 0; m < kRows; ++m)
      for (uint32_t column = 0; column < n; ++column) {
        int64_t sum = c[m][column];
        for (int k = 0; k < K; ++k) sum += int64_t{a[m][k]} * b[k][column];
        c[m][column] = static_cast<int32_t>(form.saturates ? std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX) : sum);
      }
  }
  for (uint32_t tile = 0; tile < n / 8; ++tile)
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t at = tile * kPerTile + half * kPerTile / 2;
      for (int l = 0; l < kLanes; ++l) {
        if (!(w.active >> l & 1)) continue;
        const Acc* from = &c[8 * half + static_cast<uint32_t>(l) / 4][tile * 8 + static_cast<uint32_t>(l) % 4 * 2];
        if constexpr (kHalf) {
          w.lanes<uint32_t>(ds[at])[l] = narrow<Half>(from[0]).bits | static_cast<uint32_t>(narrow<Half>(from[1]).bits)
                                                                          << 16;
        } else {
          w.lanes<Acc>(ds[at])[l] = from[0], w.lanes<Acc>(ds[at + 1])[l] = from[1];
        }
      }
    }
}

template <class A, class B>
Handler pick(bool half) {
  if constexpr (std::is_same_v<typename A::Acc, float>)
    if (half) return multiply_run<A, B, true>;
  return half ? nullptr : multiply_run<A, B, false>;
}

Handler pick_handler(Type acc, Type a, Type b) {
  const bool half = acc == Type::kF16, single = acc == Type::kF32;
  if (acc == Type::kS32) {
    if (a == Type::kS8 && b == a) return pick<ElementByte<int8_t>, ElementByte<int8_t>>(false);
    if (a == Type::kU8 && b == a) return pick<ElementByte<uint8_t>, ElementByte<uint8_t>>(false);
    if (a == Type::kS8 && b == Type::kU8) return pick<ElementByte<int8_t>, ElementByte<uint8_t>>(false);
    if (a == Type::kU8 && b == Type::kS8) return pick<ElementByte<uint8_t>, ElementByte<int8_t>>(false);
  }
  if (a == Type::kF16 && b == a && (half || single)) return pick<ElementHalf, ElementHalf>(half);
  if (a == Type::kBf16 && b == a && single) return pick<ElementBfloat, ElementBfloat>(false);
  if (a == Type::kTf32 && b == a && single) return pick<ElementTf32, ElementTf32>(false);
  if (half || single) {
    if (a == Type::kE4m3 && b == a) return pick<ElementE4m3, ElementE4m3>(half);
    if (a == Type::kE5m2 && b == a) return pick<ElementE5m2, ElementE5m2>(half);
    if (a == Type::kE4m3 && b == Type::kE5m2) return pick<ElementE4m3, ElementE5m2>(half);
    if (a == Type::kE5m2 && b == Type::kE4m3) return pick<ElementE5m2, ElementE4m3>(half);
  }
  return nullptr;
}

bool take_sign(Decoder& d, size_t index) {
  const Operand& o = d.operand(index);
  if (o.kind != Operand::Kind::kInteger || (o.bits != 1 && o.bits != ~uint64_t{0}))
    d.fail("operand " + std::to_string(index + 1) + " must be 1 or -1");
  return o.bits != 1;
}
bool take_transposition(Decoder& d, size_t index) {
  const Operand& o = d.operand(index);
  if (o.kind != Operand::Kind::kInteger || o.bits > 1)
    d.fail("operand " + std::to_string(index + 1) + " must be 0 or 1");
  return o.bits == 1;
}

void multiply(Decoder& d) {
  auto& m = d.modifiers();
  if (m.take("sp")) d.fail("sparse wgmma is not supported");
  WgmmaForm form{};
  int rows = 0, columns = 0, depth = 0;
  for (const std::string& name : d.statement().modifiers)
    if (std::sscanf(name.c_str(), "m%dn%dk%d", &rows, &columns, &depth) == 3) {
      m.take(name);
      break;
    }
  if (rows != 64 || columns < 8 || columns > kMostColumns || columns % 8) d.fail("a wgmma shape is missing or unknown");
  form.columns = static_cast<uint16_t>(columns);
  const Type acc = d.require_type(), a = d.require_type(), b = d.require_type();
  form.saturates = m.take("satfinite");
  const Handler handler = pick_handler(acc, a, b);
  const bool integers = acc == Type::kS32;
  if (!handler || depth * type_bits(a) != 256 || (form.saturates && !integers) ||
      (integers && columns % 16 && columns != 8 && columns != 24))
    d.fail("this combination of shape and types is not supported");
  const bool turns = type_bits(a) == 16;
  form.a_in_registers = d.operand(1).kind == Operand::Kind::kVector;
  const size_t operands = 4 + (integers ? 0 : 2) + (turns ? (form.a_in_registers ? 1 : 2) : 0);
  d.expect_operands(operands, operands);
  std::vector<uint32_t> slots{d.predicate(d.operand(3))};
  if (form.a_in_registers) {
    if (d.operand(1).elements.size() != 4) d.fail("A needs a descriptor or 4 registers");
    for (const Operand& e : d.operand(1).elements) slots.push_back(d.source(e, Type::kB32));
  } else {
    slots.push_back(d.source(1, Type::kB64));
  }
  slots.push_back(d.source(2, Type::kB64));
  if (!integers) form.a_negated = take_sign(d, 4), form.b_negated = take_sign(d, 5);
  if (turns) {
    if (!form.a_in_registers) form.a_transposed = take_transposition(d, 6);
    form.b_transposed = take_transposition(d, form.a_in_registers ? 6 : 7);
  }
  const Operand& accumulators = d.operand(0);
  const size_t registers = static_cast<size_t>(columns) / (acc == Type::kF16 ? 4 : 2);
  if (accumulators.kind != Operand::Kind::kVector || accumulators.elements.size() != registers)
    d.fail("the accumulators need " + std::to_string(registers) + " registers");
  for (const Operand& e : accumulators.elements) slots.push_back(d.destination(e, 4));
  d.emit(handler, slots, form.immediate());
}

// A warp multiplies at once; what is left to wait for are the other warps.
void warpgroup(Decoder& d) {
  auto& m = d.modifiers();
  if (d.module_target() != "sm_90a") d.fail("wgmma needs .target sm_90a");
  const int what = m.take_one({"mma_async", "fence", "commit_group", "wait_group"});
  if (what < 0 || !m.take("sync") || !m.take("aligned")) d.fail("wgmma needs an operation, .sync and .aligned");
  if (what == 0) return multiply(d);
  d.expect_operands(what == 3, what == 3);
  if (what == 3 && (d.operand(0).kind != Operand::Kind::kInteger || d.operand(0).bits > 7))
    d.fail("the number of groups must be 0 to 7");
  if (what == 1) {
    d.emit([](Warp&, const Instruction&) {}, {});
  } else if (what == 2) {
    d.emit([](Warp& w, const Instruction&) { w.phases += commit_multiplications(w); }, {}).kind = Kind::kSignal;
  } else {
    const uint32_t over = d.temporary(0);
    d.emit([](Warp& w,
              const Instruction& i) { w.predicate(i.slots[1]) = multiplications_over(w, i.immediate) ? ~0u : 0; },
           {over, over}, static_cast<int64_t>(d.operand(0).bits))
        .kind = Kind::kWait;
  }
}

}  // namespace

void register_warpgroup(InstructionTable& t) { t["wgmma"] = t["wgmma.f"] = warpgroup; }

}  // namespace PTX_ISA
}  // namespace ptx_emulator
