// Tensor-core instructions (PTX ISA 9.7.14): mma.sync, ldmatrix, stmatrix, movmatrix.
//
// Every fragment of mma.sync is made of tiles: a 32-bit register of all lanes is 8 rows of 32 bytes, lane 4 r + t
// holding bytes 4 t ... 4 t + 3 of row r. A's registers go down its rows first and then along k, B's (stored
// transposed: its rows are columns) along k, and C's are 8 x 8 tiles of pairs. That one rule is all shapes and types;
// doubles do the same with registers of twice the size.
#include "elements.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

struct ElementU4 {
  static constexpr int kBits = 4;
  using Acc = int32_t;
  static int32_t value(uint32_t x) { return static_cast<int32_t>(x); }
};
struct ElementS4 {
  static constexpr int kBits = 4;
  using Acc = int32_t;
  static int32_t value(uint32_t x) { return static_cast<int32_t>(x << 28) >> 28; }
};

using Words = uint32_t __attribute__((vector_size(64)));

// B with k down and columns across, which is how the products below want it: each register's 8 x 4 words are turned
// first.
template <class Element, int kDepth>
inline void unpack_turned(const Warp& w, const uint32_t* slots, typename Element::Acc (&out)[kDepth][8]) {
  constexpr int kPer = 32 / Element::kBits;
  static constexpr Words kFirst = {0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29};
  for (int r = 0; r < kDepth / (4 * kPer); ++r) {
    Words half[2], turned[2];
    std::memcpy(half, w.lanes<uint32_t>(slots[r]), 128);
    turned[0] = __builtin_shuffle(half[0], half[1], kFirst);
    turned[1] = __builtin_shuffle(half[0], half[1], kFirst + 2);
    uint32_t words[4][8];
    std::memcpy(words, turned, 128);
    for (int t = 0; t < 4; ++t)
      for (int j = 0; j < kPer; ++j)
        for (int n = 0; n < 8; ++n) out[(r * 4 + t) * kPer + j][n] = Element::value(extract<Element>(words[t][n], j));
  }
}

// slots: D, A, B, C. C and D: 32-bit values (two registers a tile) or packed halves (one).
template <class A, class B, int M, int K, bool kHalfIn, bool kHalfOut>
void multiply_run(Warp& w, const Instruction& i) {
  using Acc = typename A::Acc;
  constexpr int kTiles = M / 8, kOut = kHalfOut ? 1 : 2;
  constexpr int kA = M * K * A::kBits / 1024, kB = 8 * K * B::kBits / 1024;
  const uint32_t *ds = i.slots, *as = ds + kTiles * kOut, *bs = as + kA, *cs = bs + kB;
  alignas(64) Acc a[M][K], b[K][8], c[M][8];
  unpack<A, M, K>(w, as, a);
  unpack_turned<B, K>(w, bs, b);
  // In a row-major tile, lane l has elements 2 l and 2 l + 1.
  for (int tile = 0; tile < kTiles; ++tile) {
    Acc* pairs = &c[tile * 8][0];
    if constexpr (kHalfIn) {
      const auto* from = w.lanes<const Half>(cs[tile]);
      for (int e = 0; e < 64; ++e) pairs[e] = static_cast<Acc>(widen(from[e]));
    } else {
      const Acc *even = w.lanes<const Acc>(cs[tile * 2]), *odd = w.lanes<const Acc>(cs[tile * 2 + 1]);
      for (int l = 0; l < kLanes; ++l) pairs[2 * l] = even[l], pairs[2 * l + 1] = odd[l];
    }
  }
  if constexpr (std::is_same_v<Acc, float>) {
    using Row = float __attribute__((vector_size(32)));
    for (int m = 0; m < M; m += 4) {
      Row sum[4];
      std::memcpy(sum, c[m], sizeof(sum));
      for (int k = 0; k < K; ++k) {
        Row row;
        std::memcpy(&row, b[k], sizeof(row));
        for (int r = 0; r < 4; ++r) sum[r] += a[m + r][k] * row;
      }
      std::memcpy(c[m], sum, sizeof(sum));
    }
  } else {
    const bool saturate = i.immediate;
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < 8; ++n) {
        int64_t sum = c[m][n];
        for (int k = 0; k < K; ++k) sum += int64_t{a[m][k]} * b[k][n];
        c[m][n] =
            saturate ? static_cast<int32_t>(std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX)) : static_cast<int32_t>(sum);
      }
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    const Acc* pairs = &c[tile * 8][0];
    if constexpr (kHalfOut) {
      alignas(64) uint32_t r[kLanes];
      for (int l = 0; l < kLanes; ++l)
        r[l] = narrow<Half>(pairs[2 * l]).bits | static_cast<uint32_t>(narrow<Half>(pairs[2 * l + 1]).bits) << 16;
      store_lanes(w.lanes<uint32_t>(ds[tile]), r, w.active);
    } else {
      alignas(64) Acc even[kLanes], odd[kLanes];
      for (int l = 0; l < kLanes; ++l) even[l] = pairs[2 * l], odd[l] = pairs[2 * l + 1];
      store_lanes(w.lanes<Acc>(ds[tile * 2]), even, w.active);
      store_lanes(w.lanes<Acc>(ds[tile * 2 + 1]), odd, w.active);
    }
  }
}

// Doubles: a register is 8 rows by 4 of k.
template <int M, int K>
void multiply_double_run(Warp& w, const Instruction& i) {
  constexpr int kTiles = M / 8;
  const uint32_t *ds = i.slots, *as = ds + 2 * kTiles, *bs = as + kTiles * K / 4, *cs = bs + K / 4;
  double result[2 * kTiles][kLanes];
  for (int tile = 0; tile < kTiles; ++tile)
    for (int l = 0; l < kLanes; ++l)
      for (int j = 0; j < 2; ++j) {
        double sum = w.lanes<double>(cs[tile * 2 + j])[l];
        const int row = l / 4, column = l % 4 * 2 + j;
        for (int k = 0; k < K; ++k)
          sum = std::fma(w.lanes<double>(as[k / 4 * kTiles + tile])[row * 4 + k % 4],
                         w.lanes<double>(bs[k / 4])[column * 4 + k % 4], sum);
        result[tile * 2 + j][l] = sum;
      }
  for (int r = 0; r < 2 * kTiles; ++r) store_lanes(w.lanes<double>(ds[r]), result[r], w.active);
}

// Single bits: a population count of the rows' and columns' xor or and.
template <int M, int K, bool kAnd>
void multiply_bits_run(Warp& w, const Instruction& i) {
  constexpr int kTiles = M / 8, kWords = K / 128;
  const uint32_t *ds = i.slots, *as = ds + 2 * kTiles, *bs = as + kTiles * kWords, *cs = bs + kWords;
  int32_t result[2 * kTiles][kLanes];
  for (int tile = 0; tile < kTiles; ++tile)
    for (int l = 0; l < kLanes; ++l)
      for (int j = 0; j < 2; ++j) {
        uint32_t sum = w.lanes<uint32_t>(cs[tile * 2 + j])[l];
        const int row = l / 4, column = l % 4 * 2 + j;
        for (int k = 0; k < kWords * 4; ++k) {
          const uint32_t x = w.lanes<uint32_t>(as[k / 4 * kTiles + tile])[row * 4 + k % 4],
                         y = w.lanes<uint32_t>(bs[k / 4])[column * 4 + k % 4];
          sum += static_cast<uint32_t>(std::popcount(kAnd ? x & y : x ^ y));
        }
        result[tile * 2 + j][l] = static_cast<int32_t>(sum);
      }
  for (int r = 0; r < 2 * kTiles; ++r) store_lanes(w.lanes<int32_t>(ds[r]), result[r], w.active);
}

void vector_slots(Decoder& d, size_t index, Type type, size_t count, bool destination, std::vector<uint32_t>& slots) {
  const Operand& o = d.operand(index);
  const std::vector<Operand> single{o};
  const std::vector<Operand>& elements = o.kind == Operand::Kind::kVector ? o.elements : single;
  if (elements.size() != count)
    d.fail("operand " + std::to_string(index + 1) + " needs " + std::to_string(count) + " registers");
  for (const Operand& e : elements)
    slots.push_back(destination ? d.destination(e, type_bytes(type)) : d.source(e, type));
}

struct Shape {
  int m = 0, n = 0, k = 0;
};
Shape take_shape(Decoder& d) {
  static constexpr std::pair<std::string_view, Shape> kShapes[] = {
      {"m8n8k4", {8, 8, 4}},     {"m8n8k16", {8, 8, 16}},     {"m8n8k32", {8, 8, 32}},    {"m8n8k128", {8, 8, 128}},
      {"m16n8k4", {16, 8, 4}},   {"m16n8k8", {16, 8, 8}},     {"m16n8k16", {16, 8, 16}},  {"m16n8k32", {16, 8, 32}},
      {"m16n8k64", {16, 8, 64}}, {"m16n8k128", {16, 8, 128}}, {"m16n8k256", {16, 8, 256}}};
  for (const auto& [name, shape] : kShapes)
    if (d.modifiers().take(name)) return shape;
  d.fail("an mma shape is missing or unknown");
}

template <class A, class B, int M, int K>
Handler pick_halves(bool half_in, bool half_out) {
  if constexpr (std::is_same_v<typename A::Acc, float>) {
    if (half_in) return half_out ? multiply_run<A, B, M, K, true, true> : multiply_run<A, B, M, K, true, false>;
    return half_out ? multiply_run<A, B, M, K, false, true> : multiply_run<A, B, M, K, false, false>;
  } else {
    return multiply_run<A, B, M, K, false, false>;
  }
}

template <class A, class B, int... kDepths>
Handler pick_depth(const Shape& s, bool half_in, bool half_out) {
  Handler h = nullptr;
  ((s.m == 16 && s.k == kDepths ? void(h = pick_halves<A, B, 16, kDepths>(half_in, half_out)) : void()), ...);
  return h;
}

template <class F>
Handler with_small_float(Type t, F f) {
  if (t == Type::kE4m3) return f(ElementE4m3{});
  if (t == Type::kE5m2) return f(ElementE5m2{});
  return nullptr;
}
template <class F>
Handler with_byte(Type t, F f) {
  if (t == Type::kU8) return f(ElementByte<uint8_t>{});
  if (t == Type::kS8) return f(ElementByte<int8_t>{});
  return nullptr;
}
template <class F>
Handler with_nibble(Type t, F f) {
  if (t == Type::kU4) return f(ElementU4{});
  if (t == Type::kS4) return f(ElementS4{});
  return nullptr;
}

void multiply(Decoder& d) {
  auto& m = d.modifiers();
  if (m.take("sp") || m.take("sp::ordered_metadata")) d.fail("sparse mma is not supported");
  if (!m.take("sync") || !m.take("aligned")) d.fail("mma needs .sync.aligned");
  const Shape shape = take_shape(d);
  if (!m.take("row") || !m.take("col")) d.fail("mma needs .row.col");
  const bool saturate = m.take("satfinite");
  m.take_one({"kind::f8f6f4"});
  const Type dt = d.require_type(), at = d.require_type(), bt = d.require_type(), ct = d.require_type();
  d.expect_operands(4, 4);
  const bool half_in = ct == Type::kF16, half_out = dt == Type::kF16;
  const bool float_acc = (ct == Type::kF32 || half_in) && (dt == Type::kF32 || half_out),
             int_acc = ct == Type::kS32 && dt == Type::kS32;
  const bool small = shape.m == 8;
  Handler handler = nullptr;
  int element_bits = type_bits(at);
  if (at == Type::kF64) {
    if (bt == at && ct == at && dt == at) {
      if (small && shape.k == 4) handler = multiply_double_run<8, 4>;
      if (!small && shape.k == 4) handler = multiply_double_run<16, 4>;
      if (!small && shape.k == 8) handler = multiply_double_run<16, 8>;
      if (!small && shape.k == 16) handler = multiply_double_run<16, 16>;
    }
  } else if (at == Type::kB1 && bt == at && int_acc) {
    const int op = m.take_one({"xor", "and"});
    if (op < 0 || !m.take("popc")) d.fail("single-bit mma needs .xor.popc or .and.popc");
    if (small && shape.k == 128) handler = op ? multiply_bits_run<8, 128, true> : multiply_bits_run<8, 128, false>;
    if (!small && shape.k == 128) handler = op ? multiply_bits_run<16, 128, true> : multiply_bits_run<16, 128, false>;
    if (!small && shape.k == 256) handler = op ? multiply_bits_run<16, 256, true> : multiply_bits_run<16, 256, false>;
  } else if (!small && float_acc && at == bt && at == Type::kF16) {
    handler = pick_depth<ElementHalf, ElementHalf, 8, 16>(shape, half_in, half_out);
  } else if (!small && at == bt && at == Type::kBf16 && ct == Type::kF32 && dt == ct) {
    handler = pick_depth<ElementBfloat, ElementBfloat, 8, 16>(shape, false, false);
  } else if (!small && at == bt && at == Type::kTf32 && ct == Type::kF32 && dt == ct) {
    handler = pick_depth<ElementTf32, ElementTf32, 4, 8>(shape, false, false);
  } else if (!small && float_acc && element_bits == 8 && type_bits(bt) == 8) {
    handler = with_small_float(at, [&]<class A>(A) {
      return with_small_float(bt, [&]<class B>(B) { return pick_depth<A, B, 16, 32>(shape, half_in, half_out); });
    });
  } else if (int_acc && element_bits == 8 && type_bits(bt) == 8) {
    handler = with_byte(at, [&]<class A>(A) {
      return with_byte(bt, [&]<class B>(B) {
        return small ? (shape.k == 16 ? pick_halves<A, B, 8, 16>(false, false) : nullptr)
                     : pick_depth<A, B, 16, 32>(shape, false, false);
      });
    });
  } else if (int_acc && element_bits == 4 && type_bits(bt) == 4) {
    handler = with_nibble(at, [&]<class A>(A) {
      return with_nibble(bt, [&]<class B>(B) {
        return small ? (shape.k == 32 ? pick_halves<A, B, 8, 32>(false, false) : nullptr)
                     : pick_depth<A, B, 32, 64>(shape, false, false);
      });
    });
  }
  if (!handler || (saturate && !int_acc)) d.fail("this combination of shape and types is not supported");
  const bool wide = at == Type::kF64;
  const size_t tiles = static_cast<size_t>(shape.m) / 8, depth_bits = static_cast<size_t>(shape.k * element_bits),
               per = wide ? 256 : 128;
  std::vector<uint32_t> slots;
  const Type word = wide ? Type::kF64 : Type::kB32;
  vector_slots(d, 0, word, tiles * (half_out ? 1 : 2), true, slots);
  vector_slots(d, 1, word, tiles * depth_bits / per, false, slots);
  vector_slots(d, 2, word, depth_bits / per, false, slots);
  vector_slots(d, 3, word, tiles * (half_in ? 1 : 2), false, slots);
  Instruction& i = d.emit(handler, slots, saturate);
  i.count = 0;
}

// ldmatrix and stmatrix: lanes 8 i ... 8 i + 7 give the rows of matrix i. slots: address, registers
template <bool kStore, bool kTransposed, bool kNarrow>
void matrix_run(Warp& w, const Instruction& i) {
  for (uint32_t k = 0; k < i.count; ++k) {
    alignas(64) uint16_t tile[8][8];
    uint16_t* reg = w.lanes<uint16_t>(i.slots[1 + k]);
    if (kStore) {
      for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) kTransposed ? tile[c][r] = reg[r * 8 + c] : tile[r][c] = reg[r * 8 + c];
    }
    for (uint32_t r = 0; r < 8; ++r) {
      const uint32_t lane = 8 * k + r;
      uint64_t at = kNarrow ? w.lanes<uint32_t>(i.slots[0])[lane] : w.lanes<uint64_t>(i.slots[0])[lane];
      at += static_cast<uint64_t>(i.immediate);
      if ((at & kWindowMask) == kSharedWindow) at -= kSharedWindow;
      at &= 0xffffffffu;
      if (at & 15)
        throw KernelFault{kMisalignedAddress, "misaligned matrix row in shared memory, lane " + std::to_string(lane)};
      if (at + 16 > w.shared_bytes)
        throw KernelFault{kIllegalAddress, "shared memory address out of range, lane " + std::to_string(lane)};
      if (kStore)
        std::memcpy(w.shared + at, tile[r], 16);
      else
        std::memcpy(tile[r], w.shared + at, 16);
    }
    if (!kStore) {
      if (kTransposed) {
        uint16_t turned[64];
        for (int r = 0; r < 8; ++r)
          for (int c = 0; c < 8; ++c) turned[r * 8 + c] = tile[c][r];
        std::memcpy(tile, turned, sizeof(tile));
      }
      if (w.active == kAllLanes)
        std::memcpy(reg, tile, sizeof(tile));
      else
        store_lanes(w.lanes<uint32_t>(i.slots[1 + k]), reinterpret_cast<const uint32_t*>(tile), w.active);
    }
  }
}

template <bool kStore>
void matrix(Decoder& d) {
  auto& m = d.modifiers();
  if (!m.take("sync") || !m.take("aligned") || !m.take("m8n8")) d.fail("only .sync.aligned.m8n8 is supported");
  const int count = m.take_one({"x1", "x2", "x4"});
  if (count < 0) d.fail("one of .x1, .x2 and .x4 is missing");
  const bool transposed = m.take("trans");
  m.take_space();
  if (d.require_type() != Type::kB16) d.fail("only .b16 is supported");
  d.expect_operands(2, 2);
  const Decoder::Address address = d.address(d.operand(kStore ? 0 : 1), Space::kShared);
  std::vector<uint32_t> slots{address.base};
  vector_slots(d, kStore ? 1 : 0, Type::kB32, size_t{1} << count, !kStore, slots);
  const Handler handler = transposed
                              ? (address.narrow ? matrix_run<kStore, true, true> : matrix_run<kStore, true, false>)
                              : (address.narrow ? matrix_run<kStore, false, true> : matrix_run<kStore, false, false>);
  d.emit(handler, slots, address.offset).count = static_cast<uint16_t>(1 << count);
}

void move_matrix(Decoder& d) {
  auto& m = d.modifiers();
  if (!m.take("sync") || !m.take("aligned") || !m.take("m8n8") || !m.take("trans"))
    d.fail("only .sync.aligned.m8n8.trans is supported");
  if (d.require_type() != Type::kB16) d.fail("only .b16 is supported");
  d.expect_operands(2, 2);
  const uint32_t a = d.source(1, Type::kB32);
  d.emit(
      [](Warp& w, const Instruction& i) {
        const uint16_t* a = w.lanes<uint16_t>(i.slots[1]);
        alignas(64) uint16_t turned[64];
        for (int r = 0; r < 8; ++r)
          for (int c = 0; c < 8; ++c) turned[r * 8 + c] = a[c * 8 + r];
        store_lanes(w.lanes<uint32_t>(i.slots[0]), reinterpret_cast<const uint32_t*>(turned), w.active);
      },
      {d.destination(0, Type::kB32), a});
}

}  // namespace

void register_tensor(InstructionTable& t) {
  t["mma"] = t["mma.f"] = multiply;
  t["ldmatrix"] = matrix<false>;
  t["stmatrix"] = matrix<true>;
  t["movmatrix"] = move_matrix;
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
