// Races: accesses that no clock orders.
#include <algorithm>
#include <cstring>

#include "checks/launch_checker.h"
#include "checks/places.h"

namespace ptx_emulator {

// Whether an earlier access happened before what these lanes do now.
bool LaunchChecker::ordered(const Stamp& e, const WarpShadow& l, uint32_t lanes) const {
  uint32_t clock = e.clock;
  if (e.info & kAsync) {
    const Ticket& t = tickets_[e.clock];
    if (e.lanes & ~t.done) return false;
    clock = t.clock;
  }
  const uint32_t own = e.warp - l.block->first_warp;
  if (own < warps_) {
    // The asynchronous proxy sees a thread's writes once a fence between the proxies has passed on the way.
    const bool fenced = proxy_ && own < real_warps_ && (e.info & kWrite);
    const uint32_t local = own + (fenced ? warps_ : 0);
    const ClockPart* seen = nullptr;
    const bool same = e.warp == l.id && !fenced;
    for (uint32_t m = lanes; m; m &= m - 1) {
      const uint32_t lane = first(m);
      const ClockPart* mine = l.clocks[lane]->own;
      if (mine->floors[local] >= clock) continue;
      if (!same && mine == seen) continue;
      seen = mine;
      for (uint32_t o = same ? e.lanes & ~(1u << lane) : e.lanes; o; o &= o - 1)
        if (mine->epochs[local * kLanes + first(o)] < clock) return false;
    }
    return true;
  }
  if (e.warp - first_warp_ >= grid_.count() * warps_) return !concurrent(e.warp);  // of another launch
  const uint32_t block = (e.warp - first_warp_) / warps_, member = (e.warp - first_warp_) % warps_;
  const uint32_t other = member + (proxy_ && member < real_warps_ && (e.info & kWrite) ? warps_ : 0);
  const Clock* seen = nullptr;
  for (uint32_t m = lanes; m; m &= m - 1) {
    const Clock* mine = l.clocks[first(m)].get();
    if (mine == seen) continue;
    seen = mine;
    const auto part = mine->parts.find(block);
    if (part == mine->parts.end()) return false;
    for (uint32_t o = e.lanes; o; o &= o - 1)
      if (part->second->epochs[other * kLanes + first(o)] < clock) return false;
  }
  return true;
}

// The launch on another stream that a warp belongs to, if nothing orders it before this one.
const Work* LaunchChecker::concurrent(uint32_t warp) const {
  for (const auto& work : concurrent_)
    if (warp >= work->warps.first && warp < work->warps.second) return work.get();
  return nullptr;
}

void LaunchChecker::race(Warp& w, const InstructionEffects& k, const Word& word, const Stamp& e, bool write, bool async,
                         bool shared) {
  const uint32_t instruction = e.info >> kIdShift;
  const bool own = e.warp - first_warp_ < grid_.count() * warps_;
  if (!once(kRace, k.id, own ? instruction : 0xfffffff)) return;
  const uint32_t lane = first(word.lanes);
  // Of several lanes, name one that is not the first party itself.
  uint32_t mine = word.lanes;
  if (e.warp == w.shadow->id && (mine & ~e.lanes)) mine &= ~e.lanes;
  Finding f;
  const bool theirs = own && (e.warp - first_warp_) % warps_ >= real_warps_;  // of the asynchronous proxy
  const bool in_flight = async || (e.info & kAsync) || proxy_ || theirs;
  f.rule = in_flight ? "async-race" : "race";
  f.spot = spot(w, k, first(mine ? mine : 1u << lane));
  f.address = word.at;
  f.space = shared ? "shared" : "global";
  if (word.region) f.allocation = region_name(*word.region);
  const char* const who = e.warp == w.shadow->id && e.lanes == word.lanes ? "the same thread" : "another thread";
  const auto agent = [](bool copy, uint32_t proxy_warp) {
    return std::string(copy ? "an asynchronous copy" : proxy_warp == kMultiplications ? "a wgmma" : "a bulk copy");
  };
  f.message =
      (async || proxy_ ? agent(async, proxy_ ? proxy_->warp - real_warps_ : 0) + " " : "") +
      (write ? "writes " : "reads ") + f.space + " address " + (shared ? std::to_string(word.at) : hex(word.at)) +
      ", which " +
      (e.info & kAsync || theirs ? agent(e.info & kAsync, (e.warp - first_warp_) % warps_ - real_warps_) + " of " + who
                                 : who) +
      (e.info & kWrite ? " writes" : " reads") + ", without order between them";
  f.second_role = e.info & kWrite ? "written at" : "read at";
  if (const Proxy* const proxy = proxy_) {
    proxy_ = nullptr;
    if (ordered(e, *w.shadow, word.lanes)) {
      f.rule = "proxy-fence";
      f.message += " by a fence.proxy.async";
    }
    proxy_ = proxy;
  }
  if (own) {
    uint32_t warp = e.warp, thread = first(e.lanes);
    if (theirs) {
      const BlockShadow& block = *w.shadow->block;
      const uint32_t issuer = (warp - first_warp_) / warps_ == block.index ? block.issuers[e.clock] : 0;
      warp = warp - (warp - first_warp_) % warps_ + issuer / kLanes, thread = issuer % kLanes;
    }
    f.second = spot_of(warp, instruction, thread);
  } else if (const Work* const work = concurrent(e.warp))
    f.second = spot_of_work(*work, e.warp, instruction, first(e.lanes)), f.message += " on another stream";
  Findings::instance().add(std::move(f));
}

void LaunchChecker::race_with_copies(Warp& w, const InstructionEffects& k, const Word& word, bool write) {
  for (const auto& work : concurrent_)
    for (const Extent& extent : work->extents) {
      if (!(write || extent.write) || !meets(extent, word.at, 4) || !once(kRace, k.id, 0xffffffe)) continue;
      Finding f;
      f.rule = "race", f.spot = spot(w, k, first(word.lanes)), f.address = word.at, f.space = "global";
      if (word.region) f.allocation = region_name(*word.region);
      f.message = std::string(write ? "writes" : "reads") + " global address " + hex(word.at) + ", which " +
                  work->name + " on another stream" + (extent.write ? " writes" : " reads") +
                  ", without order between them";
      f.second_role = extent.write ? "written by" : "read by", f.second.kernel = work->name;
      Findings::instance().add(std::move(f));
    }
}

// A block wrote a word that other blocks had read, of whom no more is known than their index modulo 32: a race if
// nothing at all is known of any block that it may have been.
void LaunchChecker::race_with_readers(Warp& w, const InstructionEffects& k, const Word& word) {
  const BlockShadow& block = *w.shadow->block;
  for (uint32_t residues = word.cell->readers; residues; residues &= residues - 1) {
    uint64_t reader = grid_.count();
    bool known = false;
    for (uint64_t b = first(residues); b < grid_.count() && !known; b += 32) {
      if (b == block.index || !begun_[b]) continue;
      reader = b;
      for (uint32_t m = word.lanes; m; m &= m - 1)
        known |= w.shadow->clocks[first(m)]->parts.contains(static_cast<uint32_t>(b));
    }
    if (known || reader == grid_.count()) continue;
    if (!once(kRace, k.id, 0xffffffd)) return;
    Finding f;
    f.rule = "race", f.spot = spot(w, k, first(word.lanes)), f.address = word.at, f.space = "global";
    if (word.region) f.allocation = region_name(*word.region);
    f.message = "writes global address " + hex(word.at) + ", which another thread reads, without order between them";
    f.second_role = "read by a thread of", f.second.kernel = kernel_.name;
    const Spot there = spot_of(first_warp_ + static_cast<uint32_t>(reader) * warps_, kNoInstruction, 0);
    std::copy(there.block, there.block + 3, f.second.block);
    Findings::instance().add(std::move(f));
    return;
  }
}

void LaunchChecker::touch_word(Warp& w, const InstructionEffects& k, const Word& word, bool write, Strength strength,
                               bool async, uint32_t ticket, bool shared) {
  WarpShadow& l = *w.shadow;
  const Stamp mine{proxy_ ? l.block->first_warp + proxy_->warp : l.id,
                   proxy_  ? proxy_->epoch
                   : async ? ticket
                           : l.clock,
                   proxy_ ? 1u << proxy_->thread : word.lanes,
                   word.bytes | (write ? kWrite : 0) | static_cast<uint32_t>(strength) << kStrengthShift |
                       (async ? kAsync : 0) | k.id << kIdShift};
  const auto stale = [&](const Stamp& e) {
    if (!(e.info & 15)) return true;
    if (shared) return e.warp - l.block->first_warp >= warps_;
    if (e.warp - first_warp_ < grid_.count() * warps_) return false;
    return !concurrent(e.warp);
  };
  // Returns true where the old stamp says nothing that the new one does not.
  const auto meet = [&](const Stamp& e) {
    const bool before = ordered(e, l, word.lanes);
    const bool conflict = (e.info & word.bytes & 15) && (write || (e.info & kWrite));
    if (conflict && !before) {
      const auto theirs = static_cast<Strength>(e.info >> kStrengthShift & 3);
      const bool one_block = e.warp - l.block->first_warp < warps_;
      const bool strong = strength != Strength::kWeak && theirs != Strength::kWeak &&
                          (one_block || (strength == Strength::kDevice && theirs == Strength::kDevice));
      if (!strong) return race(w, k, word, e, write, async, shared), true;
    }
    return before && !(e.info & 15 & ~word.bytes) && (write || !(e.info & kWrite)) &&
           (strength == Strength::kWeak || write);
  };
  const auto merges = [&](Stamp& e) {
    if (e.warp != mine.warp || e.clock != mine.clock || ((e.info ^ mine.info) & 0xff)) return false;
    e.lanes |= mine.lanes;
    return true;
  };
  Cell& cell = *word.cell;
  if (!shared && copies_) race_with_copies(w, k, word, write);
  if (!shared && write && cell.readers) {
    if (cell.readers_launch == first_warp_) race_with_readers(w, k, word);
    cell.readers = 0;
  }
  Stamp* place = nullptr;
  for (Stamp& e : cell.stamps)
    if (stale(e) || meet(e)) e.info = 0, place = &e;
  const uint32_t owner = shared ? l.block->first_warp : first_warp_;
  auto& lists = shared ? l.block->more : more_;
  std::vector<Stamp>* const more = cell.more && cell.owner == owner ? &lists[cell.more - 1] : nullptr;
  if (more) std::erase_if(*more, [&](const Stamp& e) { return stale(e) || meet(e); });
  if (place) {
    *place = mine;
    return;
  }
  uint32_t blocks = 0;  // of reads by different blocks, at least
  uint32_t reader = 0;
  for (Stamp& e : cell.stamps) {
    if (merges(e)) return;
    const uint32_t block = (e.warp - first_warp_) / warps_;
    if (!shared && !write && !(e.info & kWrite) && block != l.block->index && (!blocks || block != reader))
      ++blocks, reader = block;
  }
  // Words that many blocks read are many: of further blocks only that they did.
  if (blocks >= 2) {
    if (strength != Strength::kWeak) return;
    if (cell.readers_launch != first_warp_) cell.readers_launch = first_warp_, cell.readers = 0;
    cell.readers |= 1u << l.block->index % 32;
    return;
  }
  if (more) {
    for (Stamp& e : *more)
      if (merges(e)) return;
    more->push_back(mine);
    return;
  }
  lists.push_back({mine});
  cell.owner = owner, cell.more = static_cast<uint32_t>(lists.size());
}

void LaunchChecker::touch(Warp& w, const InstructionEffects& k, const Access& a, bool write, Strength strength,
                          bool async, uint32_t ticket, const uint8_t (*data)[32], const uint32_t* sizes) {
  words_.clear();
  for (const uint32_t slot : table_used_) table_[slot] = 0;
  table_used_.clear();
  const uint32_t mask = static_cast<uint32_t>(table_.size()) - 1;
  for (uint32_t m = a.lanes; m; m &= m - 1) {
    const uint32_t lane = first(m);
    if (a.space[lane] == Space::kLocal) continue;
    const bool shared = a.space[lane] == Space::kShared;
    Region* const region = a.region[lane];
    if (!shared && !region) continue;
    const uintptr_t start = a.address[lane], end = start + (sizes ? sizes[lane] : a.bytes);
    Cell* const cells = shared
                            ? reinterpret_cast<Cell*>(w.shadow->block->cells.data())
                            : reinterpret_cast<Cell*>(region->cells.reserve((region->bytes + 10) / 4 * sizeof(Cell)));
    const uintptr_t base = shared ? 0 : region->base & ~uintptr_t{3};
    for (uintptr_t at = start & ~uintptr_t{3}; at < end; at += 4) {
      const uintptr_t low = std::max(at, start), high = std::min(at + 4, end);
      const auto bytes = static_cast<uint8_t>(((1u << (high - low)) - 1) << (low - at));
      uint32_t value = 0;
      if (data) std::memcpy(reinterpret_cast<uint8_t*>(&value) + (low - at), data[lane] + (low - start), high - low);
      uint32_t slot = static_cast<uint32_t>((at >> 2) * 0x9e3779b1u >> 8) & mask;
      while (table_[slot] && words_[table_[slot] - 1].at != at) slot = (slot + 1) & mask;
      if (!table_[slot]) {
        words_.push_back({at, 1u << lane, value, cells + (at - base) / 4, bytes, region});
        table_[slot] = static_cast<uint32_t>(words_.size());
        table_used_.push_back(slot);
        continue;
      }
      Word& old = words_[table_[slot] - 1];
      if (write && strength == Strength::kWeak && (old.bytes & bytes)) {
        uint32_t bits = 0;
        for (uint32_t j = 0; j < 4; ++j)
          if (old.bytes & bytes & (1u << j)) bits |= 0xffu << (8 * j);
        if (!data || ((old.value ^ value) & bits)) {
          const Stamp other{w.shadow->id, w.shadow->clock, old.lanes,
                            old.bytes | kWrite | (async ? kAsync : 0) | k.id << kIdShift};
          race(w, k, {at, 1u << lane, value, nullptr, bytes, region}, other, true, async, shared);
        }
      }
      // Different bytes of a word by different lanes are different accesses.
      if (!(old.bytes & bytes) && (write || async)) {
        words_.push_back({at, 1u << lane, value, cells + (at - base) / 4, bytes, region});
        continue;
      }
      old.lanes |= 1u << lane, old.bytes |= bytes;
    }
  }
  const bool shared = a.any_shared && !a.any_global;
  for (const Word& word : words_)
    touch_word(w, k, word, write, strength, async, ticket,
               a.any_shared && a.any_global ? word.region == nullptr : shared);
}

// A matrix's rows, by the lanes that their words go to or come from.
void LaunchChecker::touch_rows(Warp& w, const InstructionEffects& k, const Access& a, bool write) {
  Cell* const cells = reinterpret_cast<Cell*>(w.shadow->block->cells.data());
  for (uint32_t m = a.lanes; m; m &= m - 1) {
    const uint32_t row = first(m);
    for (uint32_t word = 0; word < 4; ++word) {
      const uintptr_t at = a.address[row] + 4 * word;
      // Lane 4 r + t has word t of row r; transposed, the word is halves of two columns.
      const uint32_t r = row % 8;
      const uint32_t lanes = w.active & (k.sign ? 0x11u << (8 * word + r / 2) : 1u << (r * 4 + word));
      if (lanes) touch_word(w, k, {at, lanes, 0, cells + at / 4, 15, nullptr}, write, Strength::kWeak, false, 0, true);
    }
  }
}

}  // namespace ptx_emulator
