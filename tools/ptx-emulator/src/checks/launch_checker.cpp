
#include "checks/launch_checker.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "checks/places.h"

namespace ptx_emulator {

namespace {

std::atomic<uint32_t> next_warp{1};

}  // namespace

LaunchChecker::LaunchChecker(const LaunchRequest& request, uint32_t warps, const LaunchSettings& given)
    : settings(given),
      kernel_(*request.kernel),
      grid_(request.grid),
      block_(request.block),
      real_warps_(warps),
      warps_(warps + (kernel_.asynchronous ? kProxyWarps : 0)),
      concurrent_(request.concurrent) {
  const uint64_t total = request.grid.count() * warps_;
  if (next_warp.load() + total > 0xf0000000u) next_warp = 1;
  first_warp_ = next_warp.fetch_add(static_cast<uint32_t>(total));
  random_.seed(settings.seed * 0x9e3779b97f4a7c15 + 1);
  if (settings.count) counts_ = std::make_unique<LaunchCounts>(kernel_, grid_, block_, request.dynamic_shared);
  auto part = std::make_shared<ClockPart>();
  // Of the asynchronous proxy's kernels, a second half: what a proxy fence has passed on the way here.
  const size_t parts = size_t{warps_} * (kernel_.asynchronous ? 2 : 1);
  part->epochs.resize(parts * kLanes), part->floors.resize(parts);
  nothing_ = part;
  for (const auto& work : concurrent_) copies_ |= !work->extents.empty();
  begun_.resize(grid_.count());
  table_.resize(1024, 0);
  words_.reserve(512);
  refresh();
}

void LaunchChecker::set_memory(const void* parameters, size_t parameter_bytes, const void* workspace,
                               size_t workspace_bytes) {
  parameters_ = reinterpret_cast<uintptr_t>(parameters), parameter_bytes_ = parameter_bytes;
  workspace_ = reinterpret_cast<uintptr_t>(workspace), workspace_bytes_ = workspace_bytes;
}

LaunchChecker::~LaunchChecker() {
  if (counts_) counts_->finish();
}

void LaunchChecker::refresh() {
  Memory& memory = Memory::instance();
  version_ = memory.version();
  regions_ = memory.regions();
  last_region_ = nullptr;
}

Region* LaunchChecker::find_region(uintptr_t address) {
  if (version_ != Memory::instance().version()) refresh();  // a kernel may free memory, too
  if (last_region_ && address - last_region_->base < last_region_->bytes) return last_region_;
  auto at = std::upper_bound(regions_.begin(), regions_.end(), address,
                             [](uintptr_t a, const std::shared_ptr<Region>& r) { return a < r->base; });
  if (at == regions_.begin()) return nullptr;
  Region* const region = std::prev(at)->get();
  if (address - region->base >= region->bytes) return nullptr;
  return last_region_ = region;
}

void LaunchChecker::begin_block(BlockShadow& b, uint64_t index, Dim3 id, std::vector<std::unique_ptr<Warp>>& warps,
                                uint8_t* shared, uint32_t shared_bytes) {
  b.launch = this;
  b.index = static_cast<uint32_t>(index);
  begun_[index] = true;
  b.first_warp = first_warp_ + b.index * warps_;
  b.id = id;
  b.shared = shared, b.shared_bytes = shared_bytes;
  b.priority = random_();
  b.variables.clear();
  b.more.clear();
  b.barriers = {};
  b.mbarriers.clear(), b.bulk.clear(), b.issuers.assign(1, 0);
  b.warpgroups.assign((real_warps_ + 3) / 4, {});
  b.woken = false;
  if (settings.checks & kCheckInit) std::memset(b.unwritten.reserve(shared_bytes), 0xff, shared_bytes);
  if (settings.checks & kCheckRace) b.cells.reserve((size_t{shared_bytes} + 3) / 4 * sizeof(Cell));
  auto clock = std::make_shared<Clock>();
  clock->parts[b.index] = nothing_;
  clock->own = nothing_.get();
  start_ = clock;
  if (b.warps.empty())
    for (auto& w : warps) {
      b.warps.push_back(std::make_unique<WarpShadow>());
      WarpShadow& l = *b.warps.back();
      l.block = &b, l.warp = w.get(), w->shadow = &l;
      if (w->local_stride) l.local_unwritten = aligned_bytes(size_t{w->local_stride} * kLanes);
    }
  for (size_t k = 0; k < warps.size(); ++k) {
    WarpShadow& l = *b.warps[k];
    l.id = b.first_warp + static_cast<uint32_t>(k);
    l.clock = 1;
    for (ClockRef& c : l.clocks) c = start_;
    l.syncs.reset();
    std::fill(std::begin(l.committed), std::end(l.committed), 0);
    l.pending.clear(), l.pending_copies.clear(), l.barriers.clear();
    std::fill(std::begin(l.bulk_committed), std::end(l.bulk_committed), 0);
    l.in_flight.clear(), l.written.clear(), l.multiplications.clear();
    l.multiply_fences = 1, l.multiply_committed = 0;
    warps[k]->observer = this;
    l.priority = random_();
    new_frame(*warps[k], *warps[k]->entry, kAllLanes);
  }
}

// Places and reports.

Spot LaunchChecker::spot_of(uint32_t warp, uint32_t instruction, uint32_t lane) const {
  return spot_in(kernel_, grid_, block_, warp - first_warp_, instruction, lane);
}

Spot LaunchChecker::spot(const Warp& w, const InstructionEffects& effects, uint32_t lane) const {
  return spot_of(w.shadow->id, effects.id, lane);
}

// Whether this pair of instructions has not been reported by that rule in this launch.
bool LaunchChecker::once(uint32_t rule, uint32_t instruction, uint32_t other) {
  return reported_.insert(uint64_t{rule} << 56 | uint64_t{instruction & 0xfffffff} << 28 | (other & 0xfffffff)).second;
}

void LaunchChecker::report(const char* rule, std::string message, const Warp& w, const InstructionEffects& effects,
                           uint32_t lane, uint64_t address, const char* space, const Region* region) {
  Finding f;
  f.rule = rule, f.message = std::move(message);
  f.spot = spot(w, effects, lane);
  f.address = address, f.space = space;
  if (region) f.allocation = region_name(*region);
  Findings::instance().add(std::move(f));
}

// The instruction as a whole.

void LaunchChecker::issued(Warp& w, const InstructionEffects& k, uint32_t mask, uint32_t active) {
  if (counts_) {
    Counter& c = counts_->at(k.id);
    ++c.issued;
    c.off += active == 0;
    c.lanes += static_cast<uint32_t>(std::popcount(active));
  }
  if ((settings.checks & kCheckInit) && k.guard != kNever) observe(w, k, {k.guard, 0}, mask, "a guard");
}

bool LaunchChecker::before(Warp& w, const Instruction& i, const InstructionEffects& k) {
  const uint32_t checks = settings.checks;
  if (checks & kCheckBarrier) check_convergence(w, i, k);
  if ((checks & kCheckInit) && k.control)
    for (const LaneSlot& s : k.sources) observe(w, k, s, w.active, "what a branch, call or barrier depends on");
  if (kernel_.asynchronous && (checks & kCheckRace)) check_in_flight(w, k);
  if (k.touch == Touch::kNone) {
    if ((checks & kCheckRace) && i.kind == Kind::kWarpSync && k.counted == Class::kBarrier) sync_warp(w, w.active);
    if (checks & kCheckInit) flow(w, i, k);
    return true;
  }
  if ((checks & kCheckInit) && k.address != kNever && !k.address_constant && k.touch != Touch::kMatrixLoad &&
      k.touch != Touch::kMatrixStore) {
    const LaneSlot address{k.address, static_cast<uint8_t>(k.narrow ? 4 : 8)};
    const uint32_t nowhere = bad(w, address) & w.active;
    observe(w, k, address, w.active, "an address");
    w.active &= ~nowhere;
    if (!w.active) return false;
  }
  switch (k.touch) {
    case Touch::kAsyncCopy:
      return async_copy(w, i, k);
    case Touch::kAsyncCommit:
      for (uint32_t m = w.active; m; m &= m - 1) ++w.shadow->committed[first(m)];
      land_early(*w.shadow);
      return true;
    case Touch::kAsyncWait:
      async_wait(w, w.active, k.groups);
      return true;
    case Touch::kFence:
      if (checks & kCheckRace) fence(w, k);
      return true;
    case Touch::kMatrixLoad:
    case Touch::kMatrixStore:
      return before_matrix(w, k);
    case Touch::kMbarrier:
      return before_mbarrier(w, i, k);
    case Touch::kBulkCopy:
      return bulk_copy(w, i, k);
    case Touch::kBulkCommit:
      for (uint32_t m = w.active; m; m &= m - 1) ++w.shadow->bulk_committed[first(m)];
      return true;
    case Touch::kBulkWait:
      bulk_wait(w, k);
      return true;
    case Touch::kProxyFence:
      if (checks & kCheckRace) proxy_fence(w);
      return true;
    case Touch::kMultiplyAsync:
      return multiply(w, i, k);
    case Touch::kMultiplyFence:
      follow_warpgroup(w, k);
      ++w.shadow->multiply_fences;
      return true;
    case Touch::kMultiplyCommit:
      follow_warpgroup(w, k);
      ++w.shadow->multiply_committed;
      return true;
    case Touch::kMultiplyWait:
      multiply_wait(w, k);
      return true;
    default:
      return before_access(w, i, k);
  }
}

// ldmatrix and stmatrix.
bool LaunchChecker::before_matrix(Warp& w, const InstructionEffects& k) {
  const uint32_t checks = settings.checks;
  Access a{};
  const bool store = k.touch == Touch::kMatrixStore;
  const uint32_t rows = k.elements >= 4 ? kAllLanes : (1u << (8 * k.elements)) - 1;
  if (checks & kCheckInit) observe(w, k, {k.address, static_cast<uint8_t>(k.narrow ? 4 : 8)}, rows, "an address");
  locate_rows(w, k, a);
  if (counts_ && a.lanes) counts_->shared(counts_->at(k.id), a.address, 16, a.lanes, true);
  if (checks & kCheckRace) touch_rows(w, k, a, store);
  if (checks & kCheckInit) flow_matrix(w, k, a);
  if (refused_ && (checks & kCheckMemory)) {  // a row that is not there: nothing happens
    if (checks & kCheckInit)
      for (const LaneSlot& d : k.destinations) set(w, d, w.active, 0, 0, 0);
    return false;
  }
  return true;
}

// Loads, stores and atomics.
bool LaunchChecker::before_access(Warp& w, const Instruction& i, const InstructionEffects& k) {
  const uint32_t checks = settings.checks;
  Access a{};
  const uint32_t bytes = uint32_t{k.element} * k.elements;
  locate(w, k, k.address, k.narrow, k.offset, k.space, bytes, w.active, nullptr, a, bytes);
  const bool load = k.touch == Touch::kLoad, store = k.touch == Touch::kStore, atomic = k.touch == Touch::kAtomic;
  if (counts_ && a.lanes) {
    Counter& c = counts_->at(k.id);
    uint32_t global = 0, shared = 0;
    for (uint32_t m = a.lanes; m; m &= m - 1) {
      const Space s = a.space[first(m)];
      if (s == Space::kShared) shared |= 1u << first(m);
      if (s == Space::kGlobal && k.space != Space::kConst) global |= 1u << first(m);
    }
    if (global) counts_->global(c, a.address, a.region, nullptr, bytes, global, !load, !store);
    if (shared) counts_->shared(c, a.address, bytes, shared, false);
  }
  if (checks & kCheckRace) {
    if (store && k.strength == Strength::kWeak) {
      uint8_t data[kLanes][32];
      for (uint32_t e = 0; e < k.elements; ++e) {
        const uint32_t slot = i.slots[1 + e];
        const uint32_t width = e < k.sources.size() && k.sources[e].slot != kNever ? k.sources[e].bytes : k.element;
        for (uint32_t m = a.lanes; m; m &= m - 1)
          std::memcpy(data[first(m)] + e * k.element, w.registers + slot + first(m) * width, k.element);
      }
      touch(w, k, a, true, k.strength, false, 0, data, nullptr);
    } else if (a.any_shared || a.any_global) {
      if (k.space != Space::kConst) touch(w, k, a, !load, k.strength, false, 0, nullptr, nullptr);
    }
    if (k.strength != Strength::kWeak) synchronise(w, k, a, !store, !load, atomic);
  }
  if (checks & kCheckInit) {
    if (atomic) {
      for (const LaneSlot& s : k.sources) observe(w, k, s, a.lanes, "an operand of an atomic");
      for (uint32_t m = a.lanes; m; m &= m - 1) {
        const uint32_t l = first(m);
        uint8_t* at = unwritten(w, a, l, 0);
        if (!at) continue;
        if (k.reads && std::any_of(at, at + k.element, [](uint8_t b) { return b; }) && once(kUninit, k.id, 1))
          report("uninitialized", "an atomic on memory that was never written", w, k, l, a.address[l],
                 space_name(a.space[l]), a.region[l]);
      }
      flow_load(w, k, a);
      for (uint32_t m = a.lanes; m; m &= m - 1)
        if (uint8_t* at = unwritten(w, a, first(m), 0)) std::memset(at, 0, k.element);
    } else if (load) {
      flow_load(w, k, a);
    } else {
      flow_store(w, k, a);
    }
  }
  if (refused_ && (checks & kCheckMemory)) w.active &= ~refused_;
  return w.active != 0;
}

}  // namespace ptx_emulator
