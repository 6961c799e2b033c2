// Asynchronous copies of each thread: cp.async and its groups (PTX ISA 9.7.9.25).
#include "access.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

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

void register_async_copy(InstructionTable& t) { t["cp"] = copy_async; }

}  // namespace PTX_ISA
}  // namespace ptx_emulator
