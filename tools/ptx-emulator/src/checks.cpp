#include "checks.h"

#include <algorithm>
#include <cstring>

#include "schedule.h"

namespace pop::emulator {

namespace {

constexpr uint32_t kNoInstruction = ~0u;
// Stamp::info
constexpr uint32_t kWrite = 16, kStrengthShift = 5, kAsync = 128, kIdShift = 8;
constexpr uint32_t kNever = ~0u;

uint32_t first(uint32_t lanes) { return static_cast<uint32_t>(std::countr_zero(lanes)); }

std::atomic<uint32_t> next_warp{1};

std::string hex(uint64_t v) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

std::string region_name(const Region& r) {
  return r.name.empty() ? "allocation " + std::to_string(r.id) + " of " + std::to_string(r.bytes) + " bytes" : r.name;
}

}  // namespace

bool parse_checks(const char* names, uint32_t& checks) {
  checks = 0;
  std::string word;
  for (const char* p = names;; ++p) {
    if (*p && *p != ',' && *p != ' ') {
      word += *p;
      continue;
    }
    if (word == "all")
      checks |= kCheckAll;
    else if (word == "memory")
      checks |= kCheckMemory;
    else if (word == "init")
      checks |= kCheckInit;
    else if (word == "race")
      checks |= kCheckRace;
    else if (word == "barrier")
      checks |= kCheckBarrier;
    else if (!word.empty() && word != "none" && word != "0")
      return false;
    word.clear();
    if (!*p) return true;
  }
}

bool parse_schedule(const char* name, Schedule& schedule) {
  if (!std::strcmp(name, "roundrobin")) return schedule = Schedule::kRoundRobin, true;
  if (!std::strcmp(name, "random")) return schedule = Schedule::kRandom, true;
  if (!std::strcmp(name, "adversarial")) return schedule = Schedule::kAdversarial, true;
  return false;
}

LookSettings& look_settings() {
  static LookSettings settings = [] {
    LookSettings s;
    const auto read = [](const char* name) -> const char* {
      const char* value = std::getenv(name);
      return value && *value ? value : nullptr;
    };
    if (const char* names = read("POP_EMULATOR_CHECK"); names && !parse_checks(names, s.checks))
      std::fprintf(stderr, "pop emulator: POP_EMULATOR_CHECK is '%s': expected memory, init, race, barrier, or all\n",
                   names),
          s.checks = kCheckAll;
    if (const char* name = read("POP_EMULATOR_SCHEDULE"); name && !parse_schedule(name, s.schedule))
      std::fprintf(stderr, "pop emulator: POP_EMULATOR_SCHEDULE is '%s': expected roundrobin, random or adversarial\n",
                   name);
    if (const char* seed = read("POP_EMULATOR_SEED")) s.seed = std::strtoull(seed, nullptr, 0);
    s.count = read("POP_EMULATOR_COUNT") != nullptr;
    if (s.checks) Memory::instance().track(true);
    return s;
  }();
  return settings;
}

namespace {
// From the environment before anything is allocated.
[[maybe_unused]] const bool settings_are_read = (look_settings(), true);
}  // namespace

bool host_reads(const void* base, size_t bytes, const char* who) {
  if (!(look_settings().checks & kCheckInit)) return true;
  const Memory& memory = Memory::instance();
  const void* const at = memory.first_unwritten(base, bytes);
  if (!at) return true;
  Finding f;
  f.rule = "uninitialized-copy", f.space = "global", f.address = reinterpret_cast<uint64_t>(at);
  for (const auto& region : memory.regions())
    if (region->holds(f.address, 1)) f.allocation = region_name(*region);
  f.message = std::string(who) + " reads byte " +
              std::to_string(static_cast<const char*>(at) - static_cast<const char*>(base)) + " of " +
              std::to_string(bytes) + " from '" + f.allocation + "', which was never written";
  Findings::instance().add(std::move(f));
  return false;
}

namespace {
// Whether bytes lie in a row of an extent.
bool meets(const Extent& e, uintptr_t at, size_t bytes) {
  if (!e.width || !e.height || at + bytes <= e.base) return false;
  const size_t row = at < e.base || e.height == 1 ? 0 : std::min((at - e.base) / e.pitch, e.height - 1);
  for (size_t r = row; r < std::min(row + 2, e.height); ++r)
    if (at < e.base + r * e.pitch + e.width && e.base + r * e.pitch < at + bytes) return true;
  return false;
}
bool meet(const Extent& a, const Extent& b) {
  for (size_t row = 0; row < a.height; ++row)
    if (meets(b, a.base + row * a.pitch, a.width)) return true;
  return false;
}
Spot spot_of_work(const Work& work, uint32_t warp, uint32_t instruction, uint32_t lane);
}  // namespace

void look_at_copy(const std::string& what, std::vector<Extent> extents) {
  if (!(look_settings().checks & kCheckRace)) return;
  Memory& memory = Memory::instance();
  // What the host owns is read and written before the call returns.
  std::erase_if(extents, [&](const Extent& e) { return !memory.find(reinterpret_cast<void*>(e.base)); });
  const auto found = [&](const Work& other, const Extent& e, uintptr_t at, bool writes, Spot second) {
    Finding f;
    f.rule = "race", f.spot.kernel = what, f.address = at, f.space = "global";
    for (const auto& region : memory.regions())
      if (region->holds(at, 1)) f.allocation = region_name(*region);
    f.message = what + (e.write ? " writes" : " reads") + " global address " + hex(at) + ", which " +
                (other.extents.empty() ? "another thread" : other.name) + (writes ? " writes" : " reads") +
                " on another stream, without order between them";
    f.second_role = writes ? "written at" : "read at", f.second = std::move(second);
    Findings::instance().add(std::move(f));
  };
  const auto concurrent = StreamOrder::instance().concurrent();
  bool launches = false;
  for (const auto& work : concurrent) {
    launches |= work->extents.empty();
    Spot second;
    second.kernel = work->name;
    for (const Extent& theirs : work->extents)
      for (const Extent& mine : extents)
        if ((mine.write || theirs.write) && meet(mine, theirs)) found(*work, mine, mine.base, theirs.write, second);
  }
  // The cells say which launches were there.
  if (launches)
    for (const auto& region : memory.regions()) {
      if (!region->cells.data()) continue;
      const auto* const cells = reinterpret_cast<const Cell*>(region->cells.data());
      const uintptr_t start = region->base & ~uintptr_t{3};
      for (const Extent& e : extents) {
        bool said = false;
        for (size_t row = 0; row < e.height && !said; ++row) {
          const uintptr_t low = std::max(e.base + row * e.pitch, region->base),
                          high = std::min(e.base + row * e.pitch + e.width, region->base + region->bytes);
          for (uintptr_t at = low & ~uintptr_t{3}; at < high && !said; at += 4)
            for (const Stamp& stamp : cells[(at - start) / 4].stamps) {
              uint32_t bytes = 0;
              for (uint32_t b = 0; b < 4; ++b) bytes |= uint32_t{at + b >= low && at + b < high} << b;
              if (!(stamp.info & bytes) || !(e.write || (stamp.info & kWrite))) continue;
              for (const auto& work : concurrent)
                if (stamp.warp >= work->warps.first && stamp.warp < work->warps.second && !said) {
                  found(*work, e, at, stamp.info & kWrite,
                        spot_of_work(*work, stamp.warp, stamp.info >> kIdShift, first(stamp.lanes)));
                  said = true;
                }
            }
        }
      }
    }
  Work work;
  work.name = what, work.extents = std::move(extents);
  StreamOrder::instance().done(std::move(work));
}

Looks::Looks(const LaunchRequest& request, uint32_t warps, const LookSettings& given)
    : settings(given),
      kernel_(*request.kernel),
      grid_(request.grid),
      block_(request.block),
      warps_(warps),
      concurrent_(request.concurrent) {
  const uint64_t total = request.grid.count() * warps;
  if (next_warp.load() + total > 0xf0000000u) next_warp = 1;
  first_warp_ = next_warp.fetch_add(static_cast<uint32_t>(total));
  random_.seed(settings.seed * 0x9e3779b97f4a7c15 + 1);
  if (settings.count) counts_ = std::make_unique<LaunchCounts>(kernel_, grid_, block_, request.dynamic_shared);
  auto part = std::make_shared<ClockPart>();
  part->epochs.resize(size_t{warps} * kLanes), part->floors.resize(warps);
  nothing_ = part;
  for (const auto& work : concurrent_) copies_ |= !work->extents.empty();
  begun_.resize(grid_.count());
  table_.resize(1024, 0);
  words_.reserve(512);
  refresh();
}

void Looks::set_memory(const void* parameters, size_t parameter_bytes, const void* workspace, size_t workspace_bytes) {
  parameters_ = reinterpret_cast<uintptr_t>(parameters), parameter_bytes_ = parameter_bytes;
  workspace_ = reinterpret_cast<uintptr_t>(workspace), workspace_bytes_ = workspace_bytes;
}

Looks::~Looks() {
  if (counts_) counts_->finish();
}

void Looks::refresh() {
  Memory& memory = Memory::instance();
  version_ = memory.version();
  regions_ = memory.regions();
  last_region_ = nullptr;
}

Region* Looks::find_region(uintptr_t address) {
  if (version_ != Memory::instance().version()) refresh();  // a kernel may free memory, too
  if (last_region_ && address - last_region_->base < last_region_->bytes) return last_region_;
  auto at = std::upper_bound(regions_.begin(), regions_.end(), address,
                             [](uintptr_t a, const std::shared_ptr<Region>& r) { return a < r->base; });
  if (at == regions_.begin()) return nullptr;
  Region* const region = std::prev(at)->get();
  if (address - region->base >= region->bytes) return nullptr;
  return last_region_ = region;
}

void Looks::begin_block(BlockLook& b, uint64_t index, Dim3 id, std::vector<std::unique_ptr<Warp>>& warps,
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
  if (settings.checks & kCheckInit) std::memset(b.unwritten.reserve(shared_bytes), 0xff, shared_bytes);
  if (settings.checks & kCheckRace) b.cells.reserve((size_t{shared_bytes} + 3) / 4 * sizeof(Cell));
  auto clock = std::make_shared<Clock>();
  clock->parts[b.index] = nothing_;
  clock->own = nothing_.get();
  start_ = clock;
  if (b.warps.empty())
    for (auto& w : warps) {
      b.warps.push_back(std::make_unique<WarpLook>());
      WarpLook& l = *b.warps.back();
      l.block = &b, l.warp = w.get(), w->look = &l;
      if (w->local_stride) l.local_unwritten = aligned_bytes(size_t{w->local_stride} * kLanes);
    }
  for (size_t k = 0; k < warps.size(); ++k) {
    WarpLook& l = *b.warps[k];
    l.id = b.first_warp + static_cast<uint32_t>(k);
    l.clock = 1;
    for (ClockRef& c : l.clocks) c = start_;
    l.syncs.reset();
    std::fill(std::begin(l.committed), std::end(l.committed), 0);
    l.pending.clear(), l.landings.clear(), l.barriers.clear();
    l.priority = random_();
    new_frame(*warps[k], *warps[k]->entry, kAllLanes);
  }
}

// Places and reports.

namespace {
const Look* look_in(const Kernel& kernel, uint32_t instruction, const Code** code) {
  for (const Code* c : kernel.ordered_codes)
    if (instruction - c->first_id < c->looks.size()) return *code = c, &c->looks[instruction - c->first_id];
  return nullptr;
}

// `warp`: counted through the grid.
Spot spot_in(const Kernel& kernel, Dim3 grid, Dim3 block, uint32_t warp, uint32_t instruction, uint32_t lane) {
  Spot s;
  s.kernel = kernel.name;
  const Code* code = nullptr;
  const Look* look = instruction == kNoInstruction ? nullptr : look_in(kernel, instruction, &code);
  if (look) {
    const Statement& st = code->function->statements[code->instructions[look->id - code->first_id].statement];
    s.line = st.line, s.text = st.text, s.source_line = st.source_line;
    if (st.source_line) s.source = source_file(kernel, st.source_file);
  }
  const uint32_t warps = static_cast<uint32_t>((block.count() + kLanes - 1) / kLanes);
  const uint64_t index = warp / warps;
  const uint32_t thread = warp % warps * kLanes + lane;
  s.block[0] = static_cast<uint32_t>(index % grid.x), s.block[1] = static_cast<uint32_t>(index / grid.x % grid.y),
  s.block[2] = static_cast<uint32_t>(index / grid.x / grid.y);
  s.thread[0] = thread % block.x, s.thread[1] = thread / block.x % block.y, s.thread[2] = thread / block.x / block.y;
  return s;
}

// Of a warp of earlier work.
Spot spot_of_work(const Work& work, uint32_t warp, uint32_t instruction, uint32_t lane) {
  if (!work.kernel || work.module.expired()) {
    Spot s;
    s.kernel = work.name;
    return s;
  }
  return spot_in(*work.kernel, work.grid, work.block, warp - work.warps.first, instruction, lane);
}
}  // namespace

Spot Looks::spot_of(uint32_t warp, uint32_t instruction, uint32_t lane) const {
  return spot_in(kernel_, grid_, block_, warp - first_warp_, instruction, lane);
}

Spot Looks::spot(const Warp& w, const Look& look, uint32_t lane) const { return spot_of(w.look->id, look.id, lane); }

// Whether this pair of instructions has not been reported by that rule in this launch.
bool Looks::once(uint32_t rule, uint32_t instruction, uint32_t other) {
  return reported_.insert(uint64_t{rule} << 56 | uint64_t{instruction & 0xfffffff} << 28 | (other & 0xfffffff)).second;
}

namespace {
enum Rule : uint32_t {
  kBounds = 1,
  kFreed,
  kMisaligned,
  kUninit,
  kRace,
  kDivergent,
  kAligned,
  kMembers,
  kMismatch,
  kPending
};

const char* space_name(Space s) { return s == Space::kShared ? "shared" : s == Space::kLocal ? "local" : "global"; }
}  // namespace

void Looks::report(const char* rule, std::string message, const Warp& w, const Look& look, uint32_t lane,
                   uint64_t address, const char* space, const Region* region) {
  Finding f;
  f.rule = rule, f.message = std::move(message);
  f.spot = spot(w, look, lane);
  f.address = address, f.space = space;
  if (region) f.allocation = region_name(*region);
  Findings::instance().add(std::move(f));
}

void Looks::deadlock(const std::string& message, const Warp& w, const Fragment& fragment) {
  if (!(settings.checks & kCheckBarrier)) return;
  for (const WarpLook::Parted& p : w.look->barriers) divergent(const_cast<Warp&>(w), *p.look, p.missing, p.arrived);
  Finding f;
  f.rule = "deadlock", f.message = message;
  const auto& looks = fragment.frame->code->looks;
  f.spot.kernel = kernel_.name;
  if (fragment.pc < looks.size()) f.spot = spot(w, looks[fragment.pc], first(fragment.mask));
  Findings::instance().add(std::move(f));
}

// Never-written values. Beside a frame's registers lie three words for each of its words: for byte k of a register, the
// lanes in which it was never written; which arithmetic instruction first used such a value (0: it was only copied);
// and which load brought it.

uint32_t* Looks::shadow(const Warp& w, uint32_t slot, int which) const {
  return w.frame->shadow + static_cast<size_t>(which) * (w.frame->code->frame_bytes / 4) + (slot >> 2);
}

uint32_t Looks::bad(const Warp& w, const LaneSlot& s) const {
  if (s.slot == kNever) return 0;
  const uint32_t* b = shadow(w, s.slot, 0);
  uint32_t all = b[0];
  for (uint32_t k = 1; k < s.bytes; ++k) all |= b[k];
  return all;
}

void Looks::set(Warp& w, const LaneSlot& s, uint32_t lanes, uint32_t bad_lanes, uint32_t origin, uint32_t loaded) {
  if (s.slot == kNever) return;
  uint32_t* b = shadow(w, s.slot, 0);
  for (uint32_t k = 0; k < std::max<uint32_t>(s.bytes, 1); ++k) b[k] = (b[k] & ~lanes) | (bad_lanes & lanes);
  if (bad_lanes & lanes) *shadow(w, s.slot, 1) = origin, *shadow(w, s.slot, 2) = loaded;
}

// Something outside of the registers depends on the value. `copies`: a value that was only copied may pass.
void Looks::observe(Warp& w, const Look& look, const LaneSlot& s, uint32_t lanes, const char* what, bool copies) {
  const uint32_t found = bad(w, s) & lanes;
  if (!found) return;
  const uint32_t origin = *shadow(w, s.slot, 1), loaded = *shadow(w, s.slot, 2);
  if (copies && !origin) return;
  const uint32_t at = origin ? origin - 1 : look.id, lane = first(found);
  if (once(kUninit, at, 0)) {
    Finding f;
    f.rule = "uninitialized";
    f.spot = spot_of(w.look->id, at, lane);
    f.space = loaded ? "memory" : "register";
    f.message = std::string("a value that was never written ") + (loaded ? "(it was loaded) " : "") + "is " +
                (origin ? "computed with, and the result is " : "") + what;
    if (loaded)
      f.second_role = "loaded at", f.second = spot_of(w.look->id, loaded - 1, lane);
    else if (origin && at != look.id)
      f.second_role = "came to light at", f.second = spot(w, look, lane);
    Findings::instance().add(std::move(f));
  }
  uint32_t* b = shadow(w, s.slot, 0);
  for (uint32_t k = 0; k < std::max<uint32_t>(s.bytes, 1); ++k) b[k] &= ~found;
}

void Looks::new_frame(Warp& w, Frame& frame, uint32_t lanes) {
  if (!(settings.checks & kCheckInit)) return;
  const Code& code = *frame.code;
  if (!frame.shadow) {
    w.storage.push_back(aligned_bytes(size_t{code.frame_bytes} * 3));
    frame.shadow = reinterpret_cast<uint32_t*>(w.storage.back().get());
  }
  for (const LaneSlot& s : code.registers)
    for (uint32_t k = 0; k < std::max<uint32_t>(s.bytes, 1); ++k) {
      frame.shadow[(s.slot >> 2) + k] = kAllLanes;
      frame.shadow[(s.slot >> 2) + code.frame_bytes / 4] = 0;
      frame.shadow[(s.slot >> 2) + code.frame_bytes / 2] = 0;
    }
  if (w.local_stride)
    for (uint32_t m = lanes; m; m &= m - 1)
      std::memset(w.look->local_unwritten.get() + size_t{first(m)} * w.local_stride + frame.local_base, 0xff,
                  std::min(code.local_bytes, w.local_stride - frame.local_base));
}

void Looks::copy_local(Warp& w, uint32_t lane, uint32_t to, uint32_t from, uint32_t bytes) {
  uint8_t* l = w.look->local_unwritten.get();
  if (l) std::memmove(l + size_t{lane} * w.local_stride + to, l + size_t{lane} * w.local_stride + from, bytes);
}

void Looks::system_reads(Warp& w, uint32_t lane, uint64_t address, uint32_t bytes) {
  if (!(settings.checks & kCheckInit) || !bytes) return;
  const uint8_t* unwritten = nullptr;
  if ((address & kWindowMask) == kSharedWindow)
    unwritten = w.look->block->unwritten.data() + (address & ~kWindowMask);
  else if ((address & kWindowMask) == kLocalWindow)
    unwritten = w.look->local_unwritten.get() + size_t{lane} * w.local_stride + (address & ~kWindowMask);
  else if (Region* const r = find_region(address); r && r->unwritten.data() && r->holds(address, bytes))
    unwritten = r->unwritten.data() + (address - r->base);
  if (!unwritten || std::none_of(unwritten, unwritten + bytes, [](uint8_t b) { return b; })) return;
  const Code& code = *w.frame->code;
  const Look& k = code.looks[static_cast<size_t>(w.current - code.instructions.data())];
  if (once(kUninit, k.id, 2))
    report("uninitialized", "a value that was never written is used by a system function", w, k, lane, address,
           (address & kWindowMask) == kLocalWindow ? "local" : "global", nullptr);
}

void Looks::write_local(Warp& w, uint32_t lane, uint32_t at, uint32_t bytes) {
  uint8_t* l = w.look->local_unwritten.get();
  if (l) std::memset(l + size_t{lane} * w.local_stride + at, 0, bytes);
}

// What the destinations hold after an instruction that touches no memory.
void Looks::flow(Warp& w, const Instruction& i, const Look& k) {
  if (k.flow == Flow::kNone) return;
  const uint32_t active = w.active;
  uint32_t any = 0;
  for (const LaneSlot& s : k.sources) any |= bad(w, s);
  const auto clean = [&] {
    for (const LaneSlot& d : k.destinations)
      if (d.slot != kNever) {
        uint32_t* b = shadow(w, d.slot, 0);
        for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) b[j] &= ~active;
      }
  };
  const bool cross = k.flow == Flow::kShuffle || k.flow == Flow::kAcross || k.flow == Flow::kMultiply;
  if (k.flow == Flow::kFine || (!(any & active) && !cross) || (!any && k.flow != Flow::kShuffle)) return clean();
  // Where the trouble came from: the first source that has any.
  uint32_t origin = 0, loaded = 0;
  for (const LaneSlot& s : k.sources)
    if (bad(w, s)) {
      origin = *shadow(w, s.slot, 1), loaded = *shadow(w, s.slot, 2);
      if (origin) break;
    }
  const auto mark = [&](const LaneSlot& d, uint32_t byte, uint32_t lanes) {
    uint32_t& b = shadow(w, d.slot, 0)[byte];
    b = (b & ~active) | (lanes & active);
    if (lanes & active) *shadow(w, d.slot, 1) = origin, *shadow(w, d.slot, 2) = loaded;
  };
  const auto byte_of = [&](const LaneSlot& s, uint32_t byte) {
    return s.slot == kNever || byte >= std::max<uint32_t>(s.bytes, 1) ? 0 : shadow(w, s.slot, 0)[byte];
  };
  switch (k.flow) {
    case Flow::kCopy: {
      std::vector<uint32_t> bytes;
      uint32_t total = 0;
      for (const LaneSlot& d : k.destinations) total += std::max<uint32_t>(d.bytes, 1);
      for (const LaneSlot& s : k.sources) {
        const uint32_t width = s.slot != kNever ? std::max<uint32_t>(s.bytes, 1)
                                                : total / static_cast<uint32_t>(std::max<size_t>(k.sources.size(), 1));
        for (uint32_t j = 0; j < width; ++j) bytes.push_back(byte_of(s, j));
      }
      size_t at = 0;
      for (const LaneSlot& d : k.destinations)
        for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j, ++at)
          if (d.slot != kNever) mark(d, j, at < bytes.size() ? bytes[at] : 0);
      return;
    }
    case Flow::kBytewise:
    case Flow::kAnd:
    case Flow::kOr: {
      const LaneSlot& d = k.destinations[0];
      if (d.slot == kNever) return;
      uint32_t result[8] = {};
      for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) {
        for (const LaneSlot& s : k.sources) result[j] |= byte_of(s, j);
        if (k.flow == Flow::kBytewise || k.sources.size() != 2) continue;
        // A written byte (or predicate) that decides alone.
        for (size_t n = 0; n < 2; ++n) {
          const uint32_t from = i.slots[1 + n];
          uint32_t decides = 0;
          if (d.bytes == 0) {
            const uint32_t p = w.predicate(from);
            decides = k.flow == Flow::kAnd ? ~p : p;
          } else {
            for (uint32_t l = 0; l < kLanes; ++l)
              decides |= uint32_t{w.registers[from + l * d.bytes + j] == (k.flow == Flow::kAnd ? 0 : 0xff)} << l;
          }
          result[j] &= ~(decides & ~byte_of(k.sources[n], j));
        }
      }
      for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kSelect: {
      const LaneSlot& d = k.destinations[0];
      if (d.slot == kNever || k.sources.size() < 3) return;
      const uint32_t p = w.predicate(i.slots[3]), unsure = bad(w, k.sources[2]);
      uint32_t result[8] = {};
      for (uint32_t j = 0; j < d.bytes; ++j)
        result[j] = (byte_of(k.sources[0], j) & p) | (byte_of(k.sources[1], j) & ~p) | unsure;
      if (unsure & active && !origin) origin = k.id + 1;
      for (uint32_t j = 0; j < d.bytes; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kPermute: {
      const LaneSlot& d = k.destinations[0];
      if (d.slot == kNever) return;
      uint32_t result[4];
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t pick = static_cast<uint32_t>(k.groups) >> (4 * j) & 7;
        result[j] = byte_of(k.sources[pick / 4], pick % 4);
      }
      for (uint32_t j = 0; j < 4; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kExtend: {
      const LaneSlot &d = k.destinations[0], s = k.sources[0];
      if (d.slot == kNever) return;
      uint32_t result[8];
      const uint32_t from = std::min<uint32_t>(k.element, std::max<uint32_t>(s.bytes, 1));
      for (uint32_t j = 0; j < d.bytes; ++j) result[j] = j < from ? byte_of(s, j) : k.sign ? byte_of(s, from - 1) : 0;
      for (uint32_t j = 0; j < d.bytes; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kShift: {
      const LaneSlot &d = k.destinations[0], s = k.sources[0];
      if (d.slot == kNever) return;
      uint32_t result[8] = {};
      for (int j = 0; j < d.bytes; ++j)
        for (const int64_t bit : {8 * j - k.groups, 8 * j + 7 - k.groups})
          if (bit >= 0) {
            const auto byte = static_cast<uint32_t>(bit / 8);
            result[j] |= byte < s.bytes ? byte_of(s, byte) : k.sign ? byte_of(s, s.bytes - 1u) : 0;
          }
      for (uint32_t j = 0; j < d.bytes; ++j) mark(d, j, result[j]);
      return;
    }
    case Flow::kShuffle: {
      // As the instruction itself finds its lanes; a lane that does not execute it has nothing to give.
      const size_t at = i.kind == Kind::kWarpSync ? 1 : 1;
      const uint32_t *b = w.lanes<uint32_t>(i.slots[at + 3]), *c = w.lanes<uint32_t>(i.slots[at + 4]);
      const Statement& s = w.frame->code->function->statements[i.statement];
      const auto is = [&](const char* name) {
        return std::find(s.modifiers.begin(), s.modifiers.end(), name) != s.modifiers.end();
      };
      const int mode = is("up") ? 0 : is("down") ? 1 : is("bfly") ? 2 : 3;
      uint32_t from[4] = {}, absent = 0;
      for (uint32_t m = active; m; m &= m - 1) {
        const int l = static_cast<int>(first(m));
        const int bval = static_cast<int>(b[l] & 31), cval = static_cast<int>(c[l] & 31),
                  mask = static_cast<int>(c[l] >> 8 & 31), most = (l & mask) | (cval & ~mask), least = l & mask;
        int j = mode == 0 ? l - bval : mode == 1 ? l + bval : mode == 2 ? l ^ bval : least | (bval & ~mask);
        if (!(mode == 0 ? j >= most : j <= most)) j = l;
        j &= 31;
        absent |= (~active >> j & 1) << l;
        for (uint32_t byte = 0; byte < 4; ++byte) from[byte] |= (byte_of(k.sources[0], byte) >> j & 1) << l;
      }
      if (absent && !origin) origin = k.id + 1;
      const LaneSlot& d = k.destinations[0];
      for (uint32_t byte = 0; byte < 4; ++byte) from[byte] |= absent;
      if (d.slot != kNever)
        for (uint32_t byte = 0; byte < 4; ++byte) mark(d, byte, from[byte]);
      for (size_t n = 1; n < k.destinations.size(); ++n) set(w, k.destinations[n], active, 0, 0, 0);
      return;
    }
    case Flow::kMultiply:
      return flow_multiply(w, k);
    default:
      break;
  }
  if (!origin) origin = k.id + 1;
  uint32_t result = any & active;
  if (k.flow == Flow::kAcross) result = result ? active : 0;
  if (k.flow == Flow::kCompare) {
    // p = compare(a, b) op c: a written c may decide.
    const uint32_t others = bad(w, k.sources[0]) | bad(w, k.sources[1]), c = bad(w, k.sources[2]);
    const uint32_t value = w.predicate(k.compare_slot) ^ (k.compare_negated ? kAllLanes : 0);
    const uint32_t decides = (k.decides_zero ? ~value : value) & ~c;
    result = ((others & ~decides) | c) & active;
  }
  for (const LaneSlot& d : k.destinations) set(w, d, active, result, origin, loaded);
}

// Never-written elements spoil the rows of A and the columns of B that they lie in (see instructions/tensor.cpp for
// where these are), accumulators themselves.
void Looks::flow_multiply(Warp& w, const Look& k) {
  const size_t a = static_cast<size_t>(k.k_registers_a), b = static_cast<size_t>(k.registers_b),
               tiles = static_cast<size_t>(k.m) / 8;
  uint32_t rows = 0, columns = 0, origin = 0, loaded = 0;
  const auto lanes_to_eight = [](uint32_t lanes) {
    uint32_t eight = 0;
    for (uint32_t r = 0; r < 8; ++r) eight |= uint32_t{(lanes >> (4 * r) & 15) != 0} << r;
    return eight;
  };
  for (size_t r = 0; r < k.sources.size(); ++r) {
    const uint32_t lanes = bad(w, k.sources[r]);
    if (!lanes) continue;
    if (!origin) origin = *shadow(w, k.sources[r].slot, 1);
    if (!loaded) loaded = *shadow(w, k.sources[r].slot, 2);
    if (r < a)
      rows |= lanes_to_eight(lanes) << (r % tiles * 8);
    else if (r < a + b)
      columns |= lanes_to_eight(lanes);
  }
  if (!origin) origin = k.id + 1;
  for (size_t tile = 0; tile < tiles; ++tile) {
    uint32_t even = 0, odd = 0;  // lanes whose element is spoilt
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t row = rows >> (tile * 8 + l / 4) & 1;
      even |= (row | (columns >> (l % 4 * 2) & 1)) << l;
      odd |= (row | (columns >> (l % 4 * 2 + 1) & 1)) << l;
    }
    const auto accumulator = [&](size_t pair) -> uint32_t {
      const size_t at = a + b + (k.half_in ? tile : tile * 2 + pair);
      return at < k.sources.size() ? bad(w, k.sources[at]) : 0;
    };
    const uint32_t e = even | accumulator(0), o = odd | accumulator(1);
    if (k.half_out) {
      if (tile < k.destinations.size()) set(w, k.destinations[tile], w.active, e | o, origin, loaded);
    } else if (tile * 2 + 1 < k.destinations.size()) {
      set(w, k.destinations[tile * 2], w.active, e, origin, loaded);
      set(w, k.destinations[tile * 2 + 1], w.active, o, origin, loaded);
    }
  }
}

uint8_t* Looks::unwritten(Warp& w, const Access& a, uint32_t lane, int64_t delta) const {
  if (a.space[lane] == Space::kShared)
    return w.look->block->unwritten.data() ? w.look->block->unwritten.data() + a.address[lane] + delta : nullptr;
  if (a.space[lane] == Space::kLocal)
    return w.look->local_unwritten.get() + size_t{lane} * w.local_stride + a.address[lane] + delta;
  Region* const r = a.region[lane];
  return r && r->unwritten.data() ? r->unwritten.data() + (a.address[lane] - r->base) + delta : nullptr;
}

void Looks::flow_load(Warp& w, const Look& k, const Access& a) {
  if (k.destinations.empty()) return;
  for (uint32_t e = 0; e < k.elements && e < k.destinations.size(); ++e) {
    const LaneSlot& d = k.destinations[e];
    if (d.slot == kNever) continue;
    uint32_t masks[8] = {};
    uint32_t any = 0;
    for (uint32_t m = a.lanes; m; m &= m - 1) {
      const uint32_t l = first(m);
      const uint8_t* from = unwritten(w, a, l, int64_t{e} * k.element);
      if (!from) continue;
      uint64_t bytes = 0;
      std::memcpy(&bytes, from, k.element);
      if (!bytes) continue;
      any |= 1u << l;
      for (uint32_t j = 0; j < k.element; ++j) masks[j] |= uint32_t{from[j] != 0} << l;
    }
    if (k.touch == Touch::kAtomic && k.reads) any = 0, std::memset(masks, 0, sizeof(masks));
    uint32_t* b = shadow(w, d.slot, 0);
    for (uint32_t j = 0; j < std::max<uint32_t>(d.bytes, 1); ++j) {
      const uint32_t found = any ? (j < k.element ? masks[j] : k.sign ? masks[k.element - 1] : 0) : 0;
      b[j] = (b[j] & ~w.active) | found;
    }
    if (any) *shadow(w, d.slot, 1) = 0, *shadow(w, d.slot, 2) = k.id + 1;
  }
}

void Looks::flow_store(Warp& w, const Look& k, const Access& a) {
  for (uint32_t e = 0; e < k.elements; ++e) {
    const LaneSlot s = e < k.sources.size() ? k.sources[e] : LaneSlot{};
    if (s.slot != kNever) observe(w, k, s, a.lanes, "stored", true);
    const uint32_t found = bad(w, s) & a.lanes;
    for (uint32_t m = a.lanes; m; m &= m - 1) {
      const uint32_t l = first(m);
      uint8_t* to = unwritten(w, a, l, int64_t{e} * k.element);
      if (!to) continue;
      if (!(found >> l & 1)) {
        std::memset(to, 0, k.element);
        continue;
      }
      const uint32_t* b = shadow(w, s.slot, 0);
      for (uint32_t j = 0; j < k.element; ++j) to[j] = b[j] >> l & 1 ? 0xff : 0;
    }
  }
}

// ldmatrix and stmatrix: lane 4 r + t holds word t of row r (transposed: its two halves are of two rows).
void Looks::flow_matrix(Warp& w, const Look& k, const Access& a) {
  uint8_t* const base = w.look->block->unwritten.data();
  const bool store = k.touch == Touch::kMatrixStore;
  const std::vector<LaneSlot>& slots = store ? k.sources : k.destinations;
  for (uint32_t e = 0; e < k.elements && e < slots.size(); ++e) {
    const LaneSlot& d = slots[e];
    if (store && d.slot != kNever) observe(w, k, d, w.active, "stored", true);
    uint32_t masks[4] = {}, any = 0;
    const uint32_t found = store && d.slot != kNever ? bad(w, d) : 0;
    for (uint32_t r = 0; r < 8; ++r) {
      const uint32_t lane = 8 * e + r;
      if (!(a.lanes >> lane & 1)) continue;
      uint8_t* row = base + a.address[lane];
      if (store) {
        if (!found) {
          std::memset(row, 0, 16);
          continue;
        }
        for (uint32_t c = 0; c < 16; ++c) {
          const uint32_t l = k.sign ? c / 2 * 4 + r / 2 : r * 4 + c / 4, byte = k.sign ? r % 2 * 2 + c % 2 : c % 4;
          row[c] = shadow(w, d.slot, 0)[byte] >> l & 1 ? 0xff : 0;
        }
        continue;
      }
      uint64_t halves[2];
      std::memcpy(halves, row, 16);
      if (!(halves[0] | halves[1])) continue;
      any = 1;
      for (uint32_t c = 0; c < 16; ++c) {
        if (!row[c]) continue;
        const uint32_t l = k.sign ? c / 2 * 4 + r / 2 : r * 4 + c / 4, byte = k.sign ? r % 2 * 2 + c % 2 : c % 4;
        masks[byte] |= 1u << l;
      }
    }
    if (store || d.slot == kNever) continue;
    uint32_t* b = shadow(w, d.slot, 0);
    for (uint32_t j = 0; j < 4; ++j) b[j] = (b[j] & ~w.active) | (masks[j] & w.active);
    if (any) *shadow(w, d.slot, 1) = 0, *shadow(w, d.slot, 2) = k.id + 1;
  }
}

// Memory: where the lanes' accesses go, less those that must not be.

bool Looks::in_frame(const Warp& w, uint32_t lane, uint64_t offset, uint32_t bytes) const {
  (void)lane;
  for (const Frame* f = w.frame; f; f = f->caller)
    for (const auto& [variable, at] : f->code->local_offsets) {
      const uint64_t start = uint64_t{f->local_base} + at;
      if (offset >= start && offset + bytes <= start + variable->bytes) return true;
    }
  return false;
}

void Looks::locate(Warp& w, const Look& k, uint32_t slot, bool narrow, int64_t offset, Space space, uint32_t bytes,
                   uint32_t lanes, const uint32_t* sizes, Access& a, uint32_t alignment) {
  a.lanes = 0, a.bytes = bytes;
  const bool check = settings.checks & kCheckMemory;
  uint32_t refused = 0;
  for (uint32_t m = lanes; m; m &= m - 1) {
    const uint32_t l = first(m);
    uint64_t at = narrow ? uint64_t{w.lanes<uint32_t>(slot)[l] + static_cast<uint32_t>(offset)}
                         : w.lanes<uint64_t>(slot)[l] + static_cast<uint64_t>(offset);
    const uint64_t given = at;
    Space s = space;
    if (s == Space::kGeneric)
      s = (at & kWindowMask) == kSharedWindow  ? Space::kShared
          : (at & kWindowMask) == kLocalWindow ? Space::kLocal
                                               : Space::kGlobal;
    if (s == Space::kConst || s == Space::kParam) s = Space::kGlobal;
    if (s == Space::kShared) at &= 0xffffffffu;
    if (s == Space::kLocal) at &= ~kWindowMask;
    const uint32_t size = sizes ? sizes[l] : bytes;
    a.address[l] = at, a.space[l] = s, a.region[l] = nullptr;
    const auto refuse = [&](Rule rule, const char* name, const std::string& message, const Region* region) {
      refused |= 1u << l;
      if (check && once(rule, k.id, 0)) report(name, message, w, k, l, given, space_name(s), region);
    };
    if (at & (alignment - 1)) {
      refuse(kMisaligned, "misaligned",
             std::to_string(alignment) + "-byte access to " + space_name(s) + " address " + hex(given), nullptr);
      continue;
    }
    if (s == Space::kShared) {
      if (at + size > w.shared_bytes) {
        refuse(kBounds, "out-of-bounds",
               std::to_string(size) + " bytes at shared address " + std::to_string(at) + "; the block has " +
                   std::to_string(w.shared_bytes),
               nullptr);
        continue;
      }
      a.host[l] = w.shared + at;
      a.any_shared = true;
    } else if (s == Space::kLocal) {
      if (at + size > w.local_stride || (check && !in_frame(w, l, at, size))) {
        refuse(
            kBounds, "out-of-bounds",
            std::to_string(size) + " bytes at local address " + std::to_string(at) + ", in no variable of the thread",
            nullptr);
        continue;
      }
      a.host[l] = w.local + uint64_t{l} * w.local_stride + at;
    } else {
      a.host[l] = reinterpret_cast<uint8_t*>(at);
      a.any_global = true;
      Region* const region = size ? find_region(at) : nullptr;
      a.region[l] = region;
      if (check && size && !(region && at + size <= region->base + region->bytes)) {
        if ((at >= parameters_ && at + size <= parameters_ + parameter_bytes_) ||
            (at >= workspace_ && at + size <= workspace_ + workspace_bytes_)) {
          a.lanes |= 1u << l;
          continue;
        }
        a.region[l] = nullptr;
        if (const std::string gone = region ? "" : Memory::instance().freed(at); !gone.empty()) {
          refuse(kFreed, "use-after-free", std::to_string(size) + " bytes at " + hex(at) + ", in freed " + gone,
                 nullptr);
          continue;
        }
        // The nearest allocation says most.
        auto next = std::upper_bound(regions_.begin(), regions_.end(), at,
                                     [](uintptr_t x, const std::shared_ptr<Region>& r) { return x < r->base; });
        const Region* near = region;
        std::string where = "in no allocation";
        const auto consider = [&](const Region& r) {
          const uint64_t distance = at < r.base ? r.base - at : at - (r.base + r.bytes);
          if (distance > (1u << 20)) return;
          near = &r;
          where = std::to_string(distance) + (at < r.base ? " bytes before '" : " bytes after '") + region_name(r) +
                  "' of " + std::to_string(r.bytes) + " bytes";
        };
        if (region)
          where = "across the end of '" + region_name(*region) + "' of " + std::to_string(region->bytes) + " bytes";
        else {
          if (next != regions_.end()) consider(**next);
          if (next != regions_.begin()) consider(**std::prev(next));
        }
        refuse(kBounds, "out-of-bounds", std::to_string(size) + " bytes at " + hex(at) + ", " + where, near);
        continue;
      }
    }
    a.lanes |= 1u << l;
  }
  refused_ = refused;
}

void Looks::locate_rows(Warp& w, const Look& k, Access& a) {
  const uint32_t rows = k.elements >= 4 ? kAllLanes : (1u << (8 * k.elements)) - 1;
  locate(w, k, k.address, k.narrow, k.offset, Space::kShared, 16, rows, nullptr, a, 16);
}

// Asynchronous copies.

bool Looks::async_copy(Warp& w, const Instruction& i, const Look& k) {
  WarpLook& l = *w.look;
  Access to{}, from{};
  const uint32_t bytes = k.element;
  locate(w, k, k.address, k.narrow, k.offset, Space::kShared, bytes, w.active, nullptr, to, bytes);
  const uint32_t* given = w.lanes<uint32_t>(i.slots[2]);
  uint32_t sizes[kLanes], reads = 0;
  for (uint32_t m = to.lanes; m; m &= m - 1) {
    const uint32_t lane = first(m);
    sizes[lane] = std::min(given[lane], bytes);
    if (sizes[lane]) reads |= 1u << lane;
  }
  if (settings.checks & kCheckInit) {
    observe(w, k, {k.second_address, 8}, reads, "an address");
    for (const LaneSlot& s : k.sources) observe(w, k, s, to.lanes, "the size of a copy");
  }
  locate(w, k, k.second_address, false, k.second_offset, Space::kGlobal, bytes, reads, sizes, from, bytes);
  for (uint32_t m = reads & ~from.lanes; m; m &= m - 1) sizes[first(m)] = 0;
  if (counts_) {
    Counter& c = counts_->at(k.id);
    if (from.lanes) counts_->global(c, from.address, from.region, sizes, bytes, from.lanes, false, true);
    if (to.lanes) counts_->shared(c, to.address, bytes, to.lanes, false);
  }
  // Lanes whose next commit is the same group share a ticket.
  uint32_t left = to.lanes;
  const int landing = settings.schedule == Schedule::kRoundRobin    ? 0
                      : settings.schedule == Schedule::kAdversarial ? 1
                                                                    : static_cast<int>(random_() % 3);
  while (left) {
    const uint32_t group = l.committed[first(left)];
    uint32_t same = 0;
    for (uint32_t m = left; m; m &= m - 1) same |= uint32_t{l.committed[first(m)] == group} << first(m);
    left &= ~same;
    const uint32_t ticket = static_cast<uint32_t>(tickets_.size());
    tickets_.push_back({same, 0, 0, group});
    ticket_places_.push_back(k.id);
    l.pending.push_back(ticket);
    if (settings.checks & kCheckRace) {
      Access part = from;
      part.lanes &= same;
      if (part.lanes) touch(w, k, part, false, Strength::kWeak, true, ticket, nullptr, sizes);
      part = to;
      part.lanes &= same;
      touch(w, k, part, true, Strength::kWeak, true, ticket, nullptr, nullptr);
    }
    for (uint32_t m = same; m; m &= m - 1) {
      const uint32_t lane = first(m);
      const Landing copy{ticket,
                         static_cast<uint8_t>(lane),
                         static_cast<uint8_t>(bytes),
                         static_cast<uint8_t>(sizes[lane]),
                         landing == 2,
                         to.host[lane],
                         from.host[lane]};
      if (settings.checks & kCheckInit) {
        uint8_t* target = unwritten(w, to, lane, 0);
        const uint8_t* source = sizes[lane] ? unwritten(w, from, lane, 0) : nullptr;
        std::memset(target, 0, bytes);
        if (source) std::memcpy(target, source, sizes[lane]);
      }
      if (landing == 0) {
        land(l, copy);
      } else {
        if (settings.schedule == Schedule::kAdversarial) std::memset(copy.target, 0xff, bytes);
        l.landings.push_back(copy);
      }
    }
  }
  return false;
}

void Looks::land(WarpLook&, const Landing& c) {
  if (c.size && !guarded([&] { std::memcpy(c.target, c.source, c.size); })) std::memset(c.target, 0, c.size);
  std::memset(c.target + c.size, 0, c.bytes - c.size);
}

void Looks::land_early(WarpLook& l) {
  if (l.landings.empty()) return;
  std::erase_if(l.landings, [&](const Landing& c) {
    if (!c.early || (random_() & 1)) return false;
    land(l, c);
    return true;
  });
}

// Copies of these lanes that the wait is for are done. groups: the newest that may go on; -1: none, uncommitted
// neither.
void Looks::async_wait(Warp& w, uint32_t lanes, int64_t groups) {
  WarpLook& l = *w.look;
  for (size_t p = 0; p < l.pending.size();) {
    const uint32_t number = l.pending[p];
    Ticket& t = tickets_[number];
    uint32_t done = 0;
    for (uint32_t m = t.lanes & lanes & ~t.done; m; m &= m - 1) {
      const uint32_t lane = first(m);
      if (groups < 0 || int64_t{t.group} < int64_t{l.committed[lane]} - groups) done |= 1u << lane;
    }
    if (done) {
      t.done |= done, t.clock = l.clock;
      std::erase_if(l.landings, [&](const Landing& c) {
        if (c.ticket != number || !(done >> c.lane & 1)) return false;
        land(l, c);
        return true;
      });
    }
    if (t.done == t.lanes)
      l.pending.erase(l.pending.begin() + static_cast<long>(p));
    else
      ++p;
  }
}

void Looks::exit(Warp& w, uint32_t lanes) {
  WarpLook& l = *w.look;
  for (const uint32_t number : l.pending) {
    const Ticket& t = tickets_[number];
    const uint32_t left = t.lanes & lanes & ~t.done;
    if (!left || !(settings.checks & kCheckRace) || !once(kPending, ticket_places_[number], 0)) continue;
    Finding f;
    f.rule = "async-pending", f.message = "an asynchronous copy was not waited for when its thread exited";
    f.spot = spot_of(l.id, ticket_places_[number], first(left));
    f.space = "shared";
    Findings::instance().add(std::move(f));
  }
  async_wait(w, lanes, -1);
  std::erase_if(l.barriers, [&](WarpLook::Parted& p) { return !(p.missing &= ~lanes); });
}

// Races.

Clock& Looks::mutable_copy(ClockRef& ref, uint32_t block) {
  auto copy = std::make_shared<Clock>(*ref);
  copy->own = copy->parts.at(block).get();
  Clock& result = *copy;
  ref = std::move(copy);
  return result;
}

namespace {
std::shared_ptr<const ClockPart> merged(const std::shared_ptr<const ClockPart>& a,
                                        const std::shared_ptr<const ClockPart>& b) {
  if (a == b) return a;
  auto part = std::make_shared<ClockPart>(*a);
  for (size_t k = 0; k < part->epochs.size(); ++k) part->epochs[k] = std::max(part->epochs[k], b->epochs[k]);
  for (size_t k = 0; k < part->floors.size(); ++k)
    part->floors[k] = *std::min_element(part->epochs.begin() + static_cast<long>(k * kLanes),
                                        part->epochs.begin() + static_cast<long>((k + 1) * kLanes));
  return part;
}
}  // namespace

// `into` knows what `other` knows, too. Both may be null; `into` belongs to a thread of `block` or is a publication.
void Looks::join(ClockRef& into, const ClockRef& other, uint32_t block) {
  if (!other || into == other) return;
  if (!into) {
    into = other;
    return;
  }
  auto copy = std::make_shared<Clock>(*into);
  for (const auto& [index, part] : other->parts) {
    auto& mine = copy->parts[index];
    mine = mine ? merged(mine, part) : part;
  }
  const auto own = copy->parts.find(block);
  copy->own = own == copy->parts.end() ? nullptr : own->second.get();
  into = std::move(copy);
}

// What a lane knows, its own accesses up to `epoch` included.
ClockRef Looks::published(const ClockRef& clock, const WarpLook& l, uint32_t lane, uint32_t epoch) {
  auto copy = std::make_shared<Clock>(*clock);
  auto& part = copy->parts[l.block->index];
  auto own = std::make_shared<ClockPart>(*part);
  own->epochs[(l.id - l.block->first_warp) * kLanes + lane] = epoch;
  part = own;
  copy->own = own.get();
  return copy;
}

void Looks::fence(Warp& w, const Look& k) {
  WarpLook& l = *w.look;
  if (!l.syncs) l.syncs = std::make_unique<std::array<LaneSync, kLanes>>();
  const bool wide = k.strength == Strength::kDevice;
  for (uint32_t m = w.active; m; m &= m - 1) {
    const uint32_t lane = first(m);
    LaneSync& s = (*l.syncs)[lane];
    if (k.acquire) {
      join(l.clocks[lane], wide ? s.pending : s.pending_block, l.block->index);
      if (wide) s.pending.reset();
      s.pending_block.reset();
    }
    if (k.release) {
      s.fence_narrow = published(l.clocks[lane], l, lane, l.clock);
      if (wide) s.fence_wide = s.fence_narrow;
    }
  }
  if (k.release) ++l.clock;
}

// A strong access: what it publishes, and what it learns. keeps: an atomic, which adds to what is published.
void Looks::synchronise(Warp& w, const Look& k, const Access& a, bool reads, bool writes, bool keeps) {
  WarpLook& l = *w.look;
  if (!l.syncs) l.syncs = std::make_unique<std::array<LaneSync, kLanes>>();
  const uint32_t block = l.block->index;
  bool released = false;
  for (uint32_t m = a.lanes; m; m &= m - 1) {
    const uint32_t lane = first(m);
    if (a.space[lane] == Space::kLocal) continue;
    LaneSync& s = (*l.syncs)[lane];
    auto& variables = a.space[lane] == Space::kShared ? l.block->variables : variables_;
    for (uint32_t e = 0; e < k.elements; ++e) {
      const uint64_t at = a.address[lane] + uint64_t{e} * k.element;
      const bool wide = k.strength == Strength::kDevice;
      if (reads) {
        if (const auto found = variables.find(at); found != variables.end()) {
          const SyncVariable& v = found->second;
          ClockRef near, far;
          if (v.narrow && v.narrow_block == block) near = v.narrow;
          if (v.wide && v.wide_block == block) join(near, v.wide, block);
          if (v.wide && v.wide_block != block && wide) far = v.wide;
          if (k.acquire) {
            join(l.clocks[lane], near, block), join(l.clocks[lane], far, block);
          } else {
            join(s.pending_block, near, block);
            join(s.pending, near, block), join(s.pending, far, block);
          }
        }
      }
      if (writes) {
        ClockRef wide_clock = wide ? s.fence_wide : nullptr, narrow_clock = s.fence_narrow;
        if (k.release) {
          released = true;
          narrow_clock = published(l.clocks[lane], l, lane, l.clock);
          if (wide) wide_clock = narrow_clock;
        }
        if (!keeps) variables.erase(at);
        if (!wide_clock && !narrow_clock) continue;
        SyncVariable& v = variables[at];
        if (wide_clock) {
          v.wide_block = v.wide && v.wide_block != block ? ~0u : block;
          join(v.wide, wide_clock, block);
        }
        if (narrow_clock) {
          if (v.narrow_block != block) v.narrow.reset();
          v.narrow_block = block;
          join(v.narrow, narrow_clock, block);
        }
      }
    }
  }
  if (released) ++l.clock;
}

// bar.warp.sync: all these lanes know what each knew.
void Looks::sync_warp(Warp& w, uint32_t lanes) {
  WarpLook& l = *w.look;
  ClockRef all;
  for (uint32_t m = lanes; m; m &= m - 1) join(all, l.clocks[first(m)], l.block->index);
  Clock& clock = mutable_copy(all, l.block->index);
  auto own = std::make_shared<ClockPart>(*clock.parts[l.block->index]);
  const uint32_t local = l.id - l.block->first_warp;
  for (uint32_t m = lanes; m; m &= m - 1) own->epochs[local * kLanes + first(m)] = l.clock;
  own->floors[local] =
      *std::min_element(own->epochs.begin() + local * kLanes, own->epochs.begin() + (local + 1) * kLanes);
  clock.parts[l.block->index] = own, clock.own = own.get();
  ++l.clock;
  for (uint32_t m = lanes; m; m &= m - 1) l.clocks[first(m)] = all;
}

void Looks::arrive(Warp& w, const Instruction& i, const Look& k, uint32_t barrier, uint32_t count, uint32_t lanes) {
  WarpLook& l = *w.look;
  BlockLook& b = *l.block;
  BarrierLook& state = b.barriers[barrier];
  if (settings.checks & kCheckBarrier) {
    const Spot here = spot(w, k, first(lanes));
    if (lanes != w.live) {
      // Said already: only a part of the warp is here.
    } else if (state.instruction == kNoInstruction) {
      state.instruction = k.id, state.count = count, state.first = here;
    } else if (state.count != count || (state.instruction != k.id && count == 0)) {
      if (once(kMismatch, k.id, state.instruction)) {
        Finding f;
        f.rule = "mismatched-barrier";
        f.message = state.count != count
                        ? "threads wait at barrier " + std::to_string(barrier) + " for different numbers of threads (" +
                              std::to_string(count) + " and " + std::to_string(state.count) + "; 0: all)"
                        : "threads of a block meet at barrier " + std::to_string(barrier) + " in different places";
        f.spot = here;
        f.second_role = "the other place", f.second = state.first;
        Findings::instance().add(std::move(f));
      }
    }
  }
  (void)i;
  land_early(l);
  if (!(settings.checks & kCheckRace)) return;
  if (!state.clock) {
    state.clock = std::make_shared<Clock>(*l.clocks[first(lanes)]);
    auto own = std::make_shared<ClockPart>(*state.clock->parts.at(b.index));
    state.clock->parts[b.index] = own;
    state.joined = l.clocks[first(lanes)].get();
  }
  auto& own = const_cast<ClockPart&>(*state.clock->parts[b.index]);
  for (uint32_t m = lanes; m; m &= m - 1) {
    const ClockRef& mine = l.clocks[first(m)];
    if (mine.get() == state.joined) continue;
    state.joined = mine.get();
    for (const auto& [index, part] : mine->parts) {
      if (index == b.index) {
        for (size_t n = 0; n < own.epochs.size(); ++n) own.epochs[n] = std::max(own.epochs[n], part->epochs[n]);
      } else {
        auto& other = state.clock->parts[index];
        other = other ? merged(other, part) : part;
      }
    }
  }
  const uint32_t local = l.id - b.first_warp;
  for (uint32_t m = lanes; m; m &= m - 1) own.epochs[local * kLanes + first(m)] = l.clock;
  ++l.clock;
}

ClockRef Looks::complete(BlockLook& block, uint32_t barrier) {
  BarrierLook& state = block.barriers[barrier];
  std::shared_ptr<Clock> clock = std::move(state.clock);
  if (clock) {
    auto& own = const_cast<ClockPart&>(*clock->parts[block.index]);
    for (size_t k = 0; k < own.floors.size(); ++k)
      own.floors[k] = *std::min_element(own.epochs.begin() + static_cast<long>(k * kLanes),
                                        own.epochs.begin() + static_cast<long>((k + 1) * kLanes));
    clock->own = &own;
  }
  state = {};
  return clock;
}

void Looks::pass(Warp& w, uint32_t lanes, const ClockRef& clock) {
  if (!clock) return;
  for (uint32_t m = lanes; m; m &= m - 1) w.look->clocks[first(m)] = clock;
}

// Whether an earlier access happened before what these lanes do now.
bool Looks::ordered(const Stamp& e, const WarpLook& l, uint32_t lanes) const {
  uint32_t clock = e.clock;
  if (e.info & kAsync) {
    const Ticket& t = tickets_[e.clock];
    if (e.lanes & ~t.done) return false;
    clock = t.clock;
  }
  const uint32_t local = e.warp - l.block->first_warp;
  if (local < warps_) {
    const ClockPart* seen = nullptr;
    const bool same = e.warp == l.id;
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
  const uint32_t block = (e.warp - first_warp_) / warps_, other = (e.warp - first_warp_) % warps_;
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
const Work* Looks::concurrent(uint32_t warp) const {
  for (const auto& work : concurrent_)
    if (warp >= work->warps.first && warp < work->warps.second) return work.get();
  return nullptr;
}

void Looks::race(Warp& w, const Look& k, const Word& word, const Stamp& e, bool write, bool async, bool shared) {
  const uint32_t instruction = e.info >> kIdShift;
  const bool own = e.warp - first_warp_ < grid_.count() * warps_;
  if (!once(kRace, k.id, own ? instruction : 0xfffffff)) return;
  const uint32_t lane = first(word.lanes);
  // Of several lanes, name one that is not the first party itself.
  uint32_t mine = word.lanes;
  if (e.warp == w.look->id && (mine & ~e.lanes)) mine &= ~e.lanes;
  Finding f;
  const bool in_flight = async || (e.info & kAsync);
  f.rule = in_flight ? "async-race" : "race";
  f.spot = spot(w, k, first(mine ? mine : 1u << lane));
  f.address = word.at;
  f.space = shared ? "shared" : "global";
  if (word.region) f.allocation = region_name(*word.region);
  const char* const who = e.warp == w.look->id && e.lanes == word.lanes ? "the same thread" : "another thread";
  f.message = std::string(async ? "an asynchronous copy " : "") + (write ? "writes " : "reads ") + f.space +
              " address " + (shared ? std::to_string(word.at) : hex(word.at)) + ", which " +
              (e.info & kAsync ? std::string("an asynchronous copy of ") + who : who) +
              (e.info & kWrite ? " writes" : " reads") + ", without order between them";
  f.second_role = e.info & kWrite ? "written at" : "read at";
  if (own)
    f.second = spot_of(e.warp, instruction, first(e.lanes));
  else if (const Work* const work = concurrent(e.warp))
    f.second = spot_of_work(*work, e.warp, instruction, first(e.lanes)), f.message += " on another stream";
  Findings::instance().add(std::move(f));
}

void Looks::race_with_copies(Warp& w, const Look& k, const Word& word, bool write) {
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
void Looks::race_with_readers(Warp& w, const Look& k, const Word& word) {
  const BlockLook& block = *w.look->block;
  for (uint32_t residues = word.cell->readers; residues; residues &= residues - 1) {
    uint64_t reader = grid_.count();
    bool known = false;
    for (uint64_t b = first(residues); b < grid_.count() && !known; b += 32) {
      if (b == block.index || !begun_[b]) continue;
      reader = b;
      for (uint32_t m = word.lanes; m; m &= m - 1)
        known |= w.look->clocks[first(m)]->parts.contains(static_cast<uint32_t>(b));
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

void Looks::touch_word(Warp& w, const Look& k, const Word& word, bool write, Strength strength, bool async,
                       uint32_t ticket, bool shared) {
  WarpLook& l = *w.look;
  const Stamp mine{l.id, async ? ticket : l.clock, word.lanes,
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

void Looks::touch(Warp& w, const Look& k, const Access& a, bool write, Strength strength, bool async, uint32_t ticket,
                  const uint8_t (*data)[32], const uint32_t* sizes) {
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
                            ? reinterpret_cast<Cell*>(w.look->block->cells.data())
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
          const Stamp other{w.look->id, w.look->clock, old.lanes,
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
void Looks::touch_rows(Warp& w, const Look& k, const Access& a, bool write) {
  Cell* const cells = reinterpret_cast<Cell*>(w.look->block->cells.data());
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

// The instruction as a whole.

void Looks::issued(Warp& w, const Look& k, uint32_t mask, uint32_t active) {
  if (counts_) {
    Counter& c = counts_->at(k.id);
    ++c.issued;
    c.off += active == 0;
    c.lanes += static_cast<uint32_t>(std::popcount(active));
  }
  if ((settings.checks & kCheckInit) && k.guard != kNever) observe(w, k, {k.guard, 0}, mask, "a guard");
}

void Looks::divergent(Warp& w, const Look& k, uint32_t missing, uint32_t arrived) {
  if (!once(kAligned, k.id, 0)) return;
  const bool barrier = k.counted == Class::kBarrier;
  report(barrier ? "divergent-barrier" : "divergent-aligned",
         std::string(barrier ? "a barrier" : "an .aligned instruction") + " is reached by " +
             std::to_string(std::popcount(arrived)) + " of the " + std::to_string(std::popcount(arrived | missing)) +
             " live threads of its warp",
         w, k, first(missing), 0, "", nullptr);
}

bool Looks::before(Warp& w, const Instruction& i, const Look& k) {
  const uint32_t checks = settings.checks;
  if ((checks & kCheckBarrier) && k.aligned) {
    const bool barrier = k.counted == Class::kBarrier;
    if (barrier)  // lanes that left others at a barrier, and now come to one
      std::erase_if(w.look->barriers, [&](const WarpLook::Parted& p) {
        if (!(p.missing & w.active)) return false;
        divergent(w, *p.look, p.missing, p.arrived);
        return true;
      });
    if (const uint32_t missing = w.live & ~w.active) {
      if (barrier && w.look->parted)
        w.look->barriers.push_back({&k, missing, w.active});
      else
        divergent(w, k, missing, w.active);
    }
  }
  if ((checks & kCheckBarrier) && i.kind == Kind::kWarpSync) {
    const uint32_t* members = w.lanes<uint32_t>(i.slots[0]);
    for (uint32_t m = w.active; m; m &= m - 1)
      if (!(members[first(m)] >> first(m) & 1) && once(kMembers, k.id, 0))
        report(
            "warp-mask",
            "a thread executes a .sync instruction whose member mask " + hex(members[first(m)]) + " does not name it",
            w, k, first(m), 0, "", nullptr);
  }
  if ((checks & kCheckInit) && k.control)
    for (const LaneSlot& s : k.sources) observe(w, k, s, w.active, "what a branch, call or barrier depends on");
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
      for (uint32_t m = w.active; m; m &= m - 1) ++w.look->committed[first(m)];
      land_early(*w.look);
      return true;
    case Touch::kAsyncWait:
      async_wait(w, w.active, k.groups);
      return true;
    case Touch::kFence:
      if (checks & kCheckRace) fence(w, k);
      return true;
    case Touch::kMatrixLoad:
    case Touch::kMatrixStore: {
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
    default:
      break;
  }
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

}  // namespace pop::emulator
