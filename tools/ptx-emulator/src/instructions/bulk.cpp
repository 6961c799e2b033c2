// Bulk copies (PTX ISA 9.7.9.25, 9.7.9.27): they land at once, which is one of the orders that the ISA allows.
#include "bulk_copy.h"
#include "lanes.h"
#include "mbarrier.h"

namespace ptx_emulator {
namespace PTX_ISA {
namespace {

void bulk_run(Warp& w, const Instruction& i) {
  BulkCopy last;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const int l = first_lane(m);
    BulkCopy copy;
    if (const BulkProblem p = find_bulk_copy(w, i, l, copy); p.code)
      throw KernelFault{p.code, p.text + " (lane " + std::to_string(l) + ")"};
    // All lanes of a warp may store one box, which CUTLASS's do.
    if (same_store(copy, last)) continue;
    last = copy;
    carry_out(copy, w.shared);
    ++w.writes;
    if (copy.store) continue;
    if (land_on_mbarrier(w.shared + copy.barrier, copy.bytes)) ++w.phases;
  }
}

uint32_t wide(Decoder& d, const Decoder::Address& a) {
  if (!a.narrow) return a.base;
  const uint32_t slot = d.temporary(8);
  d.emit(map<uint64_t, uint32_t>([](uint32_t x) { return uint64_t{x}; }), {slot, a.base});
  return slot;
}

// [map, {coordinates}]
int take_coordinates(Decoder& d, const Operand& place, std::vector<uint32_t>& slots, Operand& map) {
  if (place.kind != Operand::Kind::kAddress || place.elements.size() != 2 ||
      place.elements[1].kind != Operand::Kind::kVector)
    d.fail("expected [tensor map, {coordinates}]");
  map = place;
  map.elements.pop_back();
  for (const Operand& c : place.elements[1].elements) slots.push_back(d.source(c, Type::kB32));
  return static_cast<int>(place.elements[1].elements.size());
}

uint32_t word(int64_t offset) { return static_cast<uint32_t>(static_cast<int32_t>(offset)); }

void prefetch_bulk(Decoder& d) {
  auto& m = d.modifiers();
  const bool tensor = m.take("tensor");
  m.take_one({"1d", "2d", "3d", "4d", "5d"});
  m.take("tile");
  if (!m.take("L2")) d.fail("a bulk prefetch needs .L2");
  if (!m.take("global")) d.fail("a bulk prefetch needs .global");
  m.take_cache_hints();
  std::vector<uint32_t> coordinates;
  Operand map = d.operand(0);
  if (tensor) take_coordinates(d, d.operand(0), coordinates, map);
  d.address(map, Space::kGeneric);
  d.emit([](Warp&, const Instruction&) {}, {});
}

}  // namespace

// After `cp.async.bulk`.
void copy_bulk(Decoder& d) {
  auto& m = d.modifiers();
  const auto nothing = [](Warp&, const Instruction&) {};
  if (m.take("commit_group")) {
    d.expect_operands(0, 0);
    d.emit(nothing, {});
    return;
  }
  if (m.take("wait_group")) {
    m.take("read");
    d.expect_operands(1, 1);
    if (d.operand(0).kind != Operand::Kind::kInteger) d.fail("the number of groups must be a constant");
    d.emit(nothing, {});
    return;
  }
  if (m.take("prefetch")) return prefetch_bulk(d);
  const bool tensor = m.take("tensor");
  const int dimensions = tensor ? 1 + m.take_one({"1d", "2d", "3d", "4d", "5d"}) : 0;
  if (tensor && dimensions == 0) d.fail("a tensor's copy needs .1d to .5d");
  if (m.take("multicast::cluster")) d.fail("copies to a cluster's other blocks are not supported");
  m.take("tile");
  // The spaces come in the order of the text: what is written first.
  const auto& names = d.statement().modifiers;
  const auto at = [&](std::string_view name) { return std::find(names.begin(), names.end(), name) - names.begin(); };
  const bool store = at("global") < std::min(at("shared::cta"), at("shared::cluster"));
  if (!m.take("global") || m.take_one({"shared::cta", "shared::cluster"}) < 0)
    d.fail("bulk copies go between .global and .shared::cta or .shared::cluster");
  if (store ? !m.take("bulk_group") : !m.take("mbarrier::complete_tx::bytes"))
    d.fail(store ? "a bulk store needs .bulk_group" : "a bulk load needs .mbarrier::complete_tx::bytes");
  const bool hinted = m.take("L2::cache_hint");
  const size_t operands = (tensor ? 2u : 3u) + (store ? 0 : 1);
  d.expect_operands(operands + hinted, operands + hinted);
  if (hinted) d.source(operands, Type::kB64);
  std::vector<uint32_t> coordinates;
  Operand other = d.operand(store ? 0 : 1);
  if (tensor && take_coordinates(d, d.operand(store ? 0 : 1), coordinates, other) != dimensions)
    d.fail("the number of coordinates is not the copy's");
  const Decoder::Address shared = d.address(d.operand(store ? 1 : 0), Space::kShared),
                         global = d.address(other, tensor ? Space::kGeneric : Space::kGlobal);
  if (global.narrow) d.fail("global memory needs a 64-bit address");
  const Decoder::Address barrier = store ? shared : d.address(d.operand(operands - 1), Space::kShared);
  const uint32_t size = tensor ? d.constant(0, 4) : d.source(2, Type::kU32);
  std::vector<uint32_t> slots{wide(d, shared),     global.base,         wide(d, barrier),    size,
                              word(shared.offset), word(global.offset), word(barrier.offset)};
  slots.insert(slots.end(), coordinates.begin(), coordinates.end());
  Instruction& i = d.emit(bulk_run, slots, store);
  i.kind = Kind::kSignal, i.count = static_cast<uint16_t>(dimensions);
}

}  // namespace PTX_ISA
}  // namespace ptx_emulator
