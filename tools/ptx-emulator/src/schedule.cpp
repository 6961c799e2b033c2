// Who runs when: lanes of a warp that part and meet again, warps of a block, blocks of a grid over the host's cores.
#include "schedule.h"

#include <setjmp.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <functional>
#include <thread>

#include "checks.h"
#include "machine.h"
#include "module.h"

namespace pop::emulator {

AlignedBytes aligned_bytes(size_t bytes) {
  const size_t rounded = (std::max<size_t>(bytes, 64) + 63) / 64 * 64;
  auto* p = static_cast<uint8_t*>(std::aligned_alloc(64, rounded));
  if (!p) throw std::bad_alloc();
  std::memset(p, 0, rounded);
  return AlignedBytes(p);
}

namespace {

constexpr uint32_t kNever = ~0u;
constexpr uint64_t kSlice = 20000;  // warp instructions after which a loop lets others run
constexpr uint32_t kReservedShared = 1024;
constexpr uint32_t kPollsPerSlice = 32;
constexpr uint64_t kHopeless = 200;  // turns in a row that a block has spent in spins
constexpr uint32_t kStallsBeforeRelease = 4, kLookedStallsBeforeRelease = 16;
// PTX frames are larger than the hardware's, which keeps arguments in registers: the stack limit is scaled by this.
constexpr uint32_t kFrameRoom = 16;

struct Waiting {
  Warp* warp;
  Fragment fragment;
  const Instruction* instruction;
};

struct Barrier {
  uint32_t arrived = 0;   // threads
  uint32_t expected = 0;  // 0: all that live
  uint32_t population = 0;
  bool all = true, any = false;
  std::vector<Waiting> waiting;
};

}  // namespace

struct Grid;

struct Block {
  Grid* grid = nullptr;
  uint64_t index = 0;
  Dim3 id;
  std::vector<std::unique_ptr<Warp>> warps;
  AlignedBytes shared;
  uint32_t shared_bytes = 0;
  std::array<Barrier, 16> barriers;
  uint32_t live = 0;
  uint64_t fruitless = 0;  // slices spent in spins since the grid last changed
  uint64_t seen_writes = 0;
  Warp* running = nullptr;
  BlockLook look;  // where the launch is looked at

  explicit Block(Grid& grid);
  void reset(uint64_t index);
  bool run();  // true: done; false: it spins, and others should run
  uint64_t writes() const;
  std::string where() const;
  void report_deadlock(const std::string& message) const;

 private:
  void run_warp(Warp& w);
  template <bool kLooks>
  void run_fragment(Warp& w, Fragment f);
  Warp* choose_warp();

  void fill_presets(Warp& w, Frame& frame);
  Frame* make_frame(Warp& w, const Code& code);
  Join* make_join(Warp& w, Frame* frame, uint32_t pc, uint32_t expected, uint32_t arrived, Join* parent);
  void drop_join(Warp& w, Join* join);
  void drop_frame(Warp& w, Frame* frame);
  void arrive(Warp& w, Join* join, uint32_t mask);
  void exit_lanes(Warp& w, uint32_t mask, Join* join, Frame* frame);
  void release_parked(Warp& w);
  bool release_joins(Warp& w);
  bool stalled(Warp& w);
  void make_ready(Warp& w, Fragment f);
  void barrier(Warp& w, const Instruction& i, Fragment f, uint32_t active);
  void check_barriers();
  void complete(Barrier& b);
  void call_builtin(Warp& w, const Call& call, Frame* frame, uint32_t mask);
  uint8_t* resolve(Warp& w, int lane, uint64_t address);
};

struct Grid {
  LaunchRequest request;
  uint64_t total = 0, limit = 1;
  uint32_t threads = 0, warps = 0;
  uint32_t local_stride = 0;
  uint64_t id = 0;
  alignas(8) uint32_t workspace[2] = {8, 0};  // of a cooperative launch: its size, and the grid's barrier

  std::mutex mutex;
  std::unique_ptr<Looks> looks;
  std::condition_variable changed;
  std::deque<std::unique_ptr<Block>> suspended;
  std::vector<std::unique_ptr<Block>> spare;
  std::vector<const Block*> running;
  uint64_t next = 0, resident = 0, finished = 0;
  bool admit_next = true;
  std::atomic<uint64_t> instructions{0};
  uint64_t useful_turns = 0;  // of warps that did not spin, in a launch that is looked at
  std::atomic<bool> failed{false};
  int code = 0;
  std::string message;
  std::chrono::steady_clock::time_point last_change = std::chrono::steady_clock::now();

  // In a launch that is looked at, the seed decides which block comes next; adversarially, all that can be resident are
  // first, and then the one that it puts first runs ahead, unless it spins.
  bool admits() {
    if (!looks || looks->settings.schedule == Schedule::kRoundRobin) return admit_next;
    return looks->settings.schedule == Schedule::kAdversarial || looks->random() % 3 == 0;
  }
  size_t choose_suspended() {
    if (!looks || looks->settings.schedule == Schedule::kRoundRobin) return 0;
    if (looks->settings.schedule == Schedule::kRandom) return looks->random() % suspended.size();
    size_t best = 0;
    const auto rank = [&](size_t k) { return std::pair(suspended[k]->fruitless, suspended[k]->look.priority); };
    for (size_t k = 1; k < suspended.size(); ++k)
      if (rank(k) < rank(best)) best = k;
    return best;
  }

  void fail(int fault_code, std::string text) {
    const std::lock_guard lock(mutex);
    if (!failed.exchange(true)) code = fault_code, message = std::move(text);
    changed.notify_all();
  }
};

namespace {

std::string place(const Block& block, const Warp& w, uint32_t lanes) {
  char text[160];
  const Dim3& b = block.id;
  std::snprintf(text, sizeof(text), "kernel '%s', block (%u, %u, %u), warp %u, lanes 0x%08x",
                block.grid->request.kernel->name.substr(0, 60).c_str(), b.x, b.y, b.z, w.index, lanes);
  return text;
}

}  // namespace

Block::Block(Grid& g) : grid(&g) {
  const Kernel& kernel = *g.request.kernel;
  shared_bytes = kernel.static_shared + g.request.dynamic_shared;
  if (kernel.reserved_shared) shared_bytes = (shared_bytes + 15) / 16 * 16 + kReservedShared;
  shared = aligned_bytes(shared_bytes);
  for (uint32_t k = 0; k < g.warps; ++k) {
    auto w = std::make_unique<Warp>();
    w->index = k;
    w->block = this;
    w->parameters = g.request.parameters.data();
    w->shared = shared.get();
    w->shared_bytes = shared_bytes;
    w->local_stride = g.local_stride;
    if (g.local_stride) w->local_storage = aligned_bytes(size_t{g.local_stride} * kLanes);
    w->local = w->local_storage.get();
    w->entry = make_frame(*w, *kernel.entry);
    warps.push_back(std::move(w));
  }
}

void Block::reset(uint64_t new_index) {
  index = new_index;
  const Dim3& grid_size = grid->request.grid;
  id = {static_cast<uint32_t>(index % grid_size.x), static_cast<uint32_t>(index / grid_size.x % grid_size.y),
        static_cast<uint32_t>(index / grid_size.x / grid_size.y)};
  live = grid->threads;
  fruitless = 0;
  for (Barrier& b : barriers) b = Barrier{};
  for (auto& w : warps) {
    const uint32_t count = std::min<uint32_t>(kLanes, grid->threads - w->index * kLanes);
    w->present = w->live = count == kLanes ? kAllLanes : (1u << count) - 1;
    w->spins = w->stalls = 0;
    w->turns_spun = 0;
    w->polls = 0;
    w->ready.clear();
    w->parked.clear();
    while (!w->joins.empty()) drop_join(*w, w->joins.back());
    w->entry->lanes = w->live;
    fill_presets(*w, *w->entry);
    w->ready.push_back({0, w->live, w->entry, nullptr});
  }
  if (grid->looks) grid->looks->begin_block(look, index, id, warps, shared.get(), shared_bytes);
}

uint64_t Block::writes() const {
  uint64_t sum = 0;
  for (const auto& w : warps) sum += w->writes;
  return sum;
}

Frame* Block::make_frame(Warp& w, const Code& code) {
  auto& free = w.free_frames[&code];
  if (!free.empty()) {
    Frame* frame = free.back();
    free.pop_back();
    return frame;
  }
  w.storage.push_back(aligned_bytes(code.frame_bytes));
  w.frames.push_back(std::make_unique<Frame>());
  Frame* frame = w.frames.back().get();
  frame->code = &code;
  frame->registers = w.storage.back().get();
  for (const Constant& c : code.constants) {
    uint8_t* at = frame->registers + c.slot;
    if (c.bytes == 0)
      std::memcpy(at, &c.bits, 4);
    else
      for (int l = 0; l < kLanes; ++l) std::memcpy(at + l * c.bytes, &c.bits, c.bytes);
  }
  return frame;
}

void Block::fill_presets(Warp& w, Frame& frame) {
  const Dim3 &threads = grid->request.block, &blocks = grid->request.grid;
  for (const Preset& preset : frame.code->presets) {
    for (uint32_t l = 0; l < kLanes; ++l) {
      const uint32_t thread = w.index * kLanes + l;
      uint64_t v = 0;
      switch (preset.special) {
        case Special::kTidX:
          v = thread % threads.x;
          break;
        case Special::kTidY:
          v = thread / threads.x % threads.y;
          break;
        case Special::kTidZ:
          v = thread / threads.x / threads.y;
          break;
        case Special::kNtidX:
          v = threads.x;
          break;
        case Special::kNtidY:
          v = threads.y;
          break;
        case Special::kNtidZ:
          v = threads.z;
          break;
        case Special::kCtaidX:
          v = id.x;
          break;
        case Special::kCtaidY:
          v = id.y;
          break;
        case Special::kCtaidZ:
          v = id.z;
          break;
        case Special::kNctaidX:
          v = blocks.x;
          break;
        case Special::kNctaidY:
          v = blocks.y;
          break;
        case Special::kNctaidZ:
          v = blocks.z;
          break;
        case Special::kLaneId:
          v = l;
          break;
        case Special::kWarpId:
          v = w.index;
          break;
        case Special::kNwarpId:
          v = grid->warps;
          break;
        case Special::kSmId:
          v = index % static_cast<uint64_t>(device_limits().sm_count);
          break;
        case Special::kNsmId:
          v = static_cast<uint64_t>(device_limits().sm_count);
          break;
        case Special::kGridId:
          v = grid->id;
          break;
        case Special::kLanemaskEq:
          v = 1u << l;
          break;
        case Special::kLanemaskLt:
          v = (1u << l) - 1;
          break;
        case Special::kLanemaskLe:
          v = (1u << l) | ((1u << l) - 1);
          break;
        case Special::kLanemaskGe:
          v = ~((1u << l) - 1);
          break;
        case Special::kLanemaskGt:
          v = ~((1u << l) | ((1u << l) - 1));
          break;
        case Special::kDynamicShared:
          v = grid->request.dynamic_shared;
          break;
        case Special::kTotalShared:
          v = shared_bytes;
          break;
        case Special::kZero:
          v = 0;
          break;
        case Special::kOne:
          v = 1;
          break;
        case Special::kParameterBase:
          v = reinterpret_cast<uint64_t>(w.parameters);
          break;
        case Special::kReservedBegin:
          v = shared_bytes - kReservedShared;
          break;
        case Special::kReservedEnd:
          v = shared_bytes;
          break;
        case Special::kWorkspaceHigh:
          v = grid->request.cooperative ? reinterpret_cast<uint64_t>(grid->workspace) >> 32 : 0;
          break;
        case Special::kWorkspaceLow:
          v = grid->request.cooperative ? reinterpret_cast<uint64_t>(grid->workspace) & 0xffffffff : 0;
          break;
        case Special::kLocalBase:
          v = frame.local_base;
          break;
      }
      if (preset.bytes == 0) {
        const uint32_t mask = v ? kAllLanes : 0;
        std::memcpy(frame.registers + preset.slot, &mask, 4);
        break;
      }
      std::memcpy(frame.registers + preset.slot + l * preset.bytes, &v, preset.bytes);
    }
  }
}

Join* Block::make_join(Warp& w, Frame* frame, uint32_t pc, uint32_t expected, uint32_t arrived, Join* parent) {
  if (w.free_joins.empty()) {
    w.join_storage.push_back(std::make_unique<Join>());
    w.free_joins.push_back(w.join_storage.back().get());
  }
  Join* join = w.free_joins.back();
  w.free_joins.pop_back();
  *join = {frame, pc, expected, arrived, parent};
  w.joins.push_back(join);
  return join;
}

void Block::drop_join(Warp& w, Join* join) {
  w.joins.erase(std::find(w.joins.begin(), w.joins.end(), join));
  w.free_joins.push_back(join);
}

void Block::drop_frame(Warp& w, Frame* frame) {
  if (frame != w.entry) w.free_frames[frame->code].push_back(frame);
}

void Block::arrive(Warp& w, Join* join, uint32_t mask) {
  join->arrived |= mask;
  if (join->arrived != join->expected) return;
  w.ready.push_front({join->pc, join->arrived, join->frame, join->parent});
  w.stalls = 0;
  drop_join(w, join);
}

// Fragments that stand at the same place under the same join go on as one.
void Block::make_ready(Warp& w, Fragment f) {
  for (Fragment& other : w.ready)
    if (other.pc == f.pc && other.frame == f.frame && other.join == f.join) {
      other.mask |= f.mask;
      return;
    }
  w.ready.push_back(f);
}

void Block::exit_lanes(Warp& w, uint32_t mask, Join* join, Frame* frame) {
  if (grid->looks) grid->looks->exit(w, mask);
  w.live &= ~mask;
  live -= static_cast<uint32_t>(std::popcount(mask));
  for (Frame* f = frame; f;) {
    Frame* caller = f->caller;
    f->lanes &= ~mask;
    if (f->lanes == 0) drop_frame(w, f);
    f = caller;
  }
  for (Join* j = join; j;) {
    Join* parent = j->parent;
    j->expected &= ~mask;
    if (j->expected == 0)
      drop_join(w, j);
    else if (j->expected == j->arrived) {
      w.ready.push_back({j->pc, j->arrived, j->frame, j->parent});
      drop_join(w, j);
    }
    j = parent;
  }
  release_parked(w);
  check_barriers();
}

// Lanes that wait for others at a .sync instruction go on once all that live and are named have come.
void Block::release_parked(Warp& w) {
  for (size_t k = 0; k < w.parked.size(); ++k) {
    const Fragment f = w.parked[k];
    const Instruction& i = f.frame->code->instructions[f.pc];
    const bool pure =
        i.slots[0] != kNever && f.frame->code->function->statements[i.statement].opcode.starts_with("bar");
    const auto meets = [&](const Fragment& other) {
      if (other.frame == f.frame && other.pc == f.pc) return true;
      const Instruction& o = other.frame->code->instructions[other.pc];
      return pure && o.run == i.run;  // bar.warp.sync may be reached in different places
    };
    uint32_t together = 0;
    for (const Fragment& other : w.parked)
      if (meets(other)) together |= other.mask;
    const uint32_t members =
        reinterpret_cast<const uint32_t*>(f.frame->registers + i.slots[0])[std::countr_zero(f.mask)] & w.live;
    if (members & ~together) continue;
    uint8_t* const kept = w.registers;
    const uint32_t active = w.active;
    const Instruction* const current = w.current;
    w.registers = f.frame->registers;
    w.active = together;
    w.current = &i;
    Frame* const frame = w.frame;
    w.frame = f.frame;
    if (!grid->looks || grid->looks->before(w, i, f.frame->code->looks[f.pc])) i.run(w, i);
    w.frame = frame;
    w.registers = kept;
    w.active = active;
    w.current = current;
    std::vector<Fragment> stay;
    std::vector<Fragment> go;
    for (const Fragment& other : w.parked) (meets(other) ? go : stay).push_back(other);
    w.parked = std::move(stay);
    for (Fragment g : go) {
      ++g.pc;
      make_ready(w, g);
    }
    w.stalls = 0;
    return release_parked(w);
  }
}

// Whether a spin seems to wait for lanes of its own warp. A launch that is looked at is sure first that nothing else
// goes on anywhere: lanes that were let go too early would come to the next barrier alone, and that is a finding.
bool Block::stalled(Warp& w) {
  if (!grid->looks) return ++w.stalls >= kStallsBeforeRelease;
  if (w.look->useful_turns != grid->useful_turns) w.look->useful_turns = grid->useful_turns, w.stalls = 0;
  return ++w.stalls >= kLookedStallsBeforeRelease;
}

// Every thread makes progress: lanes that wait for others that spin (perhaps on them) go on alone.
bool Block::release_joins(Warp& w) {
  bool released = false;
  for (Join* j : w.joins) {
    if (j->arrived == 0 || j->arrived == j->expected) continue;
    w.ready.push_back({j->pc, j->arrived, j->frame, j->parent});
    j->expected &= ~j->arrived;
    j->arrived = 0;
    released = true;
  }
  return released;
}

void Block::complete(Barrier& b) {
  std::vector<Waiting> waiting = std::move(b.waiting);
  const Barrier done{b.arrived, b.expected, b.population, b.all, b.any, {}};
  b = Barrier{};
  const ClockRef clock =
      grid->looks ? grid->looks->complete(look, static_cast<uint32_t>(&b - barriers.data())) : nullptr;
  for (const Waiting& entry : waiting) {
    if (clock) grid->looks->pass(*entry.warp, entry.fragment.mask, clock);
    const Instruction& i = *entry.instruction;
    uint8_t* registers = entry.fragment.frame->registers;
    const uint32_t mask = entry.fragment.mask;
    if (i.immediate == 1) {
      auto* r = reinterpret_cast<uint32_t*>(registers + i.slots[2]);
      for (int l = 0; l < kLanes; ++l)
        if (mask >> l & 1) r[l] = done.population;
    } else if (i.immediate) {
      auto& r = *reinterpret_cast<uint32_t*>(registers + i.slots[2]);
      r = (r & ~mask) | ((i.immediate == 2 ? done.all : done.any) ? mask : 0);
    }
    Fragment f = entry.fragment;
    ++f.pc;
    make_ready(*entry.warp, f);
  }
}

void Block::check_barriers() {
  for (Barrier& b : barriers)
    if (!b.waiting.empty() && b.arrived >= (b.expected ? b.expected : live)) complete(b);
}

void Block::barrier(Warp& w, const Instruction& i, Fragment f, uint32_t active) {
  const int lane = std::countr_zero(active);
  const uint32_t id = w.lanes<uint32_t>(i.slots[0])[lane];
  if (id >= 16) throw KernelFault{kIllegalInstruction, "barrier " + std::to_string(id) + " does not exist"};
  Barrier& b = barriers[id];
  if (i.count & 2) {
    const uint32_t count = w.lanes<uint32_t>(i.slots[1])[lane];
    if (count == 0 || count % kLanes)
      throw KernelFault{kIllegalInstruction, "a barrier's thread count must be a multiple of the warp size"};
    b.expected = count;
  }
  if (grid->looks) grid->looks->arrive(w, i, f.frame->code->looks[f.pc], id, b.expected, active);
  const uint32_t p = w.predicate(i.slots[3]);
  // Counts are in whole warps: the last warp of an uneven block counts as a full one.
  b.arrived += b.expected && active == w.live ? kLanes : static_cast<uint32_t>(std::popcount(active));
  b.population += static_cast<uint32_t>(std::popcount(p & active));
  b.all &= (p & active) == active;
  b.any |= (p & active) != 0;
  if (i.count & 1) {
    ++f.pc;
    f.mask = active;
    w.ready.push_front(f);
  } else {
    b.waiting.push_back({&w, f, &i});
  }
  if (b.arrived >= (b.expected ? b.expected : live)) complete(b);
}

uint8_t* Block::resolve(Warp& w, int lane, uint64_t address) {
  if ((address & kWindowMask) == kSharedWindow) {
    if (address - kSharedWindow >= w.shared_bytes)
      throw KernelFault{kIllegalAddress, "shared memory address out of range"};
    return w.shared + (address - kSharedWindow);
  }
  if ((address & kWindowMask) == kLocalWindow) {
    if (address - kLocalWindow >= w.local_stride)
      throw KernelFault{kIllegalAddress, "local memory address out of range"};
    return w.local + size_t(lane) * w.local_stride + (address - kLocalWindow);
  }
  return reinterpret_cast<uint8_t*>(address);
}

namespace {

// printf's buffer holds its arguments at their natural alignment; integers are 4 bytes, or 8 with an l.
// `reads` is told of their offsets and sizes.
int print_formatted(const char* format, const uint8_t* values, const std::function<const char*(uint64_t)>& text_at,
                    const std::function<void(size_t, size_t)>& reads) {
  std::string out;
  size_t offset = 0;
  int count = 0;
  const auto take = [&](size_t bytes) {
    offset = (offset + bytes - 1) / bytes * bytes;
    uint64_t v = 0;
    if (values) reads(offset, bytes), std::memcpy(&v, values + offset, bytes);
    offset += bytes;
    ++count;
    return v;
  };
  for (const char* p = format; *p; ++p) {
    if (*p != '%') {
      out += *p;
      continue;
    }
    if (p[1] == '%') {
      out += '%';
      ++p;
      continue;
    }
    std::string spec = "%";
    bool wide = false;
    for (++p; *p && std::strchr("-+ #0123456789.*hlLjzt", *p); ++p) {
      if (*p == '*')
        spec += std::to_string(static_cast<int32_t>(take(4)));
      else if (*p == 'l' || *p == 'j' || *p == 'z' || *p == 't')
        wide = true;
      else if (*p != 'h' && *p != 'L')
        spec += *p;
    }
    if (!*p) break;
    char buffer[512];
    if (spec.size() > 32) spec = "%";
    switch (*p) {
      case 'd':
      case 'i': {
        const uint64_t v = take(wide ? 8 : 4);
        std::snprintf(buffer, sizeof(buffer), (spec + "lld").c_str(),
                      wide ? static_cast<long long>(v) : static_cast<long long>(static_cast<int32_t>(v)));
        out += buffer;
        break;
      }
      case 'u':
      case 'x':
      case 'X':
      case 'o':
        std::snprintf(buffer, sizeof(buffer), (spec + "ll" + *p).c_str(),
                      static_cast<unsigned long long>(take(wide ? 8 : 4)));
        out += buffer;
        break;
      case 'c':
        out += static_cast<char>(take(4));
        break;
      case 'f':
      case 'F':
      case 'e':
      case 'E':
      case 'g':
      case 'G':
      case 'a':
      case 'A':
        std::snprintf(buffer, sizeof(buffer), (spec + *p).c_str(), std::bit_cast<double>(take(8)));
        out += buffer;
        break;
      case 's': {
        const char* text = text_at(take(8));
        const size_t size = static_cast<size_t>(std::snprintf(nullptr, 0, (spec + "s").c_str(), text));
        std::string formatted(size + 1, '\0');
        std::snprintf(formatted.data(), size + 1, (spec + "s").c_str(), text);
        formatted.resize(size);
        out += formatted;
        break;
      }
      case 'p':
        std::snprintf(buffer, sizeof(buffer), "0x%llx", static_cast<unsigned long long>(take(8)));
        out += buffer;
        break;
      default:
        out += spec + *p;
    }
  }
  std::fwrite(out.data(), 1, out.size(), stdout);
  return count;
}

}  // namespace

void Block::call_builtin(Warp& w, const Call& call, Frame* frame, uint32_t mask) {
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    uint8_t* local = w.local + size_t(lane) * w.local_stride + frame->local_base;
    const auto argument = [&](size_t k) {
      uint64_t v = 0;
      std::memcpy(&v, local + call.arguments[k].from, std::min<uint32_t>(call.arguments[k].bytes, 8));
      return v;
    };
    const auto text = [&](uint64_t address) {
      return address ? reinterpret_cast<const char*>(resolve(w, lane, address)) : "(null)";
    };
    switch (call.builtin) {
      case Builtin::kPrintf: {
        const uint64_t values = argument(1);
        const int32_t count = print_formatted(
            text(argument(0)), values ? resolve(w, lane, values) : nullptr, text, [&](size_t offset, size_t bytes) {
              if (grid->looks)
                grid->looks->system_reads(w, static_cast<uint32_t>(lane), values + offset,
                                          static_cast<uint32_t>(bytes));
            });
        std::memcpy(local + call.results[0].to, &count, 4);
        break;
      }
      case Builtin::kAssertFail: {
        const uint32_t thread = w.index * kLanes + static_cast<uint32_t>(lane);
        const Dim3& b = grid->request.block;
        std::string message = std::string(text(argument(1))) + ":" +
                              std::to_string(static_cast<uint32_t>(argument(2))) + ": " + text(argument(3)) +
                              ": block: [" + std::to_string(id.x) + "," + std::to_string(id.y) + "," +
                              std::to_string(id.z) + "], thread: [" + std::to_string(thread % b.x) + "," +
                              std::to_string(thread / b.x % b.y) + "," + std::to_string(thread / b.x / b.y) +
                              "] Assertion `" + text(argument(0)) + "` failed.";
        std::fprintf(stderr, "%s\n", message.c_str());
        throw KernelFault{kAssertFailed, message};
      }
      case Builtin::kMalloc: {
        const uint64_t bytes = argument(0);
        const auto p = reinterpret_cast<uint64_t>(
            bytes < (uint64_t{1} << 30) ? Memory::instance().allocate(bytes, Allocation::Kind::kHeap) : nullptr);
        std::memcpy(local + call.results[0].to, &p, 8);
        break;
      }
      case Builtin::kFree:
        Memory::instance().release(reinterpret_cast<void*>(argument(0)));
        break;
      case Builtin::kNone:
        break;
    }
    if (grid->looks)
      for (const ArgumentCopy& result : call.results)
        grid->looks->write_local(w, static_cast<uint32_t>(lane), frame->local_base + result.to, result.bytes);
  }
}

// Runs lanes until they wait, exit, or have had their turn.
template <bool kLooks>
void Block::run_fragment(Warp& w, Fragment f) {
  uint32_t pc = f.pc, mask = f.mask;
  Frame* frame = f.frame;
  Join* join = f.join;
  const Instruction* code;
  uint32_t end, stop;
  const auto enter = [&](Frame* to) {
    frame = to;
    w.frame = to;
    w.registers = to->registers;
    code = to->code->instructions.data();
    end = static_cast<uint32_t>(to->code->instructions.size());
  };
  const auto join_at = [&](Join* to) {
    join = to;
    stop = to && to->frame == frame ? to->pc : kNever;
  };
  // The rest of the mask waits behind the instruction for the active lanes.
  const auto set_aside = [&](uint32_t active) {
    if (active == mask) return;
    join_at(make_join(w, frame, pc + 1, mask, mask & ~active, join));
    mask = active;
  };
  enter(frame);
  join_at(join);
  const uint64_t began = w.issued;

  for (;;) {
    if (pc == stop) return arrive(w, join, mask);
    if (pc >= end) {
      if (!frame->caller) return exit_lanes(w, mask, join, frame);
      const Call& call = *frame->call;
      Frame* callee = frame;
      const auto& formals = callee->code->function->returns;
      for (uint32_t m = mask; m; m &= m - 1) {
        uint8_t* local = w.local + size_t(std::countr_zero(m)) * w.local_stride;
        for (size_t k = 0; k < call.results.size() && k < formals.size(); ++k) {
          const uint32_t from = callee->code->local_offsets.at(formals[k]);
          std::memcpy(local + callee->caller->local_base + call.results[k].to, local + callee->local_base + from,
                      std::min<uint64_t>(call.results[k].bytes, formals[k]->bytes));
          if constexpr (kLooks)
            grid->looks->copy_local(
                w, static_cast<uint32_t>(std::countr_zero(m)), callee->caller->local_base + call.results[k].to,
                callee->local_base + from,
                static_cast<uint32_t>(std::min<uint64_t>(call.results[k].bytes, formals[k]->bytes)));
        }
      }
      pc = callee->return_pc;
      callee->lanes &= ~mask;
      enter(callee->caller);
      if (callee->lanes == 0) drop_frame(w, callee);
      join_at(join);
      continue;
    }
    const Instruction& i = code[pc];
    if constexpr (kLooks) {
      if (w.slice == 0) {  // another warp's turn
        w.ready.push_front({pc, mask, frame, join});
        return;
      }
      --w.slice;
    }
    const uint32_t active = mask & (w.predicate(i.guard) ^ i.guard_flip);
    ++w.issued;
    if constexpr (kLooks) {
      w.active = active;
      w.current = &i;
      if (const Look& look = frame->code->looks[pc]; look.last) {
        grid->looks->issued(w, look, mask, active);
        w.look->parted = !join && active == mask;
        // What lanes do together is looked at when they have come together.
        if (active && i.kind != Kind::kWarpSync && !grid->looks->before(w, i, look)) {
          ++pc;
          continue;
        }
      }
    }
    if (active == 0) {
      ++pc;
      continue;
    }
    if constexpr (!kLooks) w.active = active;
    w.current = &i;
    if (i.kind == Kind::kPlain) [[likely]] {
      i.run(w, i);
      ++pc;
      continue;
    }
    switch (i.kind) {
      case Kind::kBranch:
      case Kind::kReturn: {
        const uint32_t target = i.kind == Kind::kReturn ? end : i.target;
        if (active == mask) {
          const bool backward = target <= pc;
          pc = target;
          if (!backward) break;
          // A loop: it may be a spin, and others must have their turn.
          bool turn = w.issued - began > kSlice;
          if (w.polls) {
            w.polls = 0;
            if (++w.spins >= kPollsPerSlice) w.spins = 0, w.spinning = turn = true;
          }
          if (!turn) break;
          w.ready.push_back({pc, mask, frame, join});
          if (w.spinning && stalled(w) && release_joins(w)) w.stalls = 0;
          return;
        }
        const uint32_t rest = mask & ~active;
        const bool leaves = i.reconverge >= end && !frame->caller;
        if (!leaves && stop != i.reconverge) join_at(make_join(w, frame, i.reconverge, mask, 0, join));
        mask = rest;
        if (!leaves && target == i.reconverge)
          join->arrived |= active;  // the rest has yet to come
        else
          w.ready.push_front({target, active, frame, join});
        ++pc;
        break;
      }
      case Kind::kBranchIndirect: {
        const auto& table = frame->code->tables[i.target];
        const uint32_t* index = w.lanes<uint32_t>(i.slots[0]);
        set_aside(active);
        const uint32_t chosen = index[std::countr_zero(active)];
        if (chosen >= table.size())
          throw KernelFault{kInvalidPc, "branch index " + std::to_string(chosen) + " is beyond its table"};
        uint32_t same = 0;
        for (uint32_t m = active; m; m &= m - 1)
          same |= static_cast<uint32_t>(index[std::countr_zero(m)] == chosen) << std::countr_zero(m);
        if (same != mask) {
          const bool leaves = i.reconverge >= end && !frame->caller;
          if (!leaves && stop != i.reconverge) join_at(make_join(w, frame, i.reconverge, mask, 0, join));
          w.ready.push_front({pc, mask & ~same, frame, join});
          mask = same;
        }
        pc = table[chosen];
        break;
      }
      case Kind::kExit: {
        exit_lanes(w, active, join, frame);
        mask &= ~active;
        if (mask == 0) return;
        ++pc;
        break;
      }
      case Kind::kCall: {
        const Call& call = frame->code->calls[i.target];
        set_aside(active);
        if (call.builtin != Builtin::kNone) {
          call_builtin(w, call, frame, mask);
          ++pc;
          break;
        }
        const Code* callee = call.callee;
        if (!callee) {
          const uint64_t* pointers = w.lanes<uint64_t>(call.pointer_slot);
          const uint64_t chosen = pointers[std::countr_zero(mask)];
          uint32_t same = 0;
          for (uint32_t m = mask; m; m &= m - 1)
            same |= static_cast<uint32_t>(pointers[std::countr_zero(m)] == chosen) << std::countr_zero(m);
          const auto& codes = grid->request.kernel->codes;
          const auto known = codes.find(reinterpret_cast<const Function*>(chosen));
          if (known == codes.end() || known->second->entry)
            throw KernelFault{kInvalidPc, "an indirect call to no function"};
          callee = known->second.get();
          if (callee->function->parameters.size() != call.arguments.size())
            throw KernelFault{kInvalidPc, "an indirect call to a function with other parameters"};
          if (same != mask) {
            join_at(make_join(w, frame, pc + 1, mask, 0, join));
            w.ready.push_front({pc, mask & ~same, frame, join});
            mask = same;
          }
        }
        Frame* next = make_frame(w, *callee);
        next->caller = frame;
        next->call = &call;
        next->return_pc = pc + 1;
        next->local_base = frame->local_base + frame->code->local_bytes;
        next->lanes = mask;
        if (uint64_t{next->local_base} + callee->local_bytes > w.local_stride)
          throw KernelFault{kLaunchFailure, "stack overflow"};
        const auto& formals = callee->function->parameters;
        for (uint32_t m = mask; m; m &= m - 1) {
          uint8_t* local = w.local + size_t(std::countr_zero(m)) * w.local_stride;
          for (size_t k = 0; k < call.arguments.size(); ++k)
            std::memcpy(local + next->local_base + callee->local_offsets.at(formals[k]),
                        local + frame->local_base + call.arguments[k].from,
                        std::min<uint64_t>(call.arguments[k].bytes, formals[k]->bytes));
        }
        fill_presets(w, *next);
        if constexpr (kLooks) {
          grid->looks->new_frame(w, *next, mask);
          for (uint32_t m = mask; m; m &= m - 1)
            for (size_t k = 0; k < call.arguments.size(); ++k)
              grid->looks->copy_local(
                  w, static_cast<uint32_t>(std::countr_zero(m)),
                  next->local_base + callee->local_offsets.at(formals[k]), frame->local_base + call.arguments[k].from,
                  static_cast<uint32_t>(std::min<uint64_t>(call.arguments[k].bytes, formals[k]->bytes)));
        }
        enter(next);
        join_at(join);
        pc = 0;
        break;
      }
      case Kind::kBarrier: {
        set_aside(active);
        return barrier(w, i, {pc, mask, frame, join}, mask);
      }
      case Kind::kWarpSync: {
        const uint32_t members = w.lanes<uint32_t>(i.slots[0])[std::countr_zero(active)] & w.live;
        if ((members & ~active) == 0) {
          bool runs = true;
          if constexpr (kLooks) runs = grid->looks->before(w, i, frame->code->looks[pc]);
          if (runs) i.run(w, i);
          ++pc;
          break;
        }
        set_aside(active);
        w.parked.push_back({pc, mask, frame, join});
        return release_parked(w);
      }
      case Kind::kSleep: {
        w.spinning = true;
        w.ready.push_back({pc + 1, mask, frame, join});
        if (stalled(w) && release_joins(w)) w.stalls = 0;
        return;
      }
      case Kind::kPlain:
        break;
    }
  }
}

void Block::run_warp(Warp& w) {
  running = &w;
  w.spinning = false;
  const uint64_t began = w.issued;
  Looks* const looks = grid->looks.get();
  if (!looks) {
    while (!w.ready.empty() && !w.spinning && w.issued - began < kSlice) {
      const Fragment f = w.ready.front();
      w.ready.pop_front();
      run_fragment<false>(w, f);
    }
    return;
  }
  const bool random = looks->settings.schedule == Schedule::kRandom;
  w.slice = random ? 1 + looks->random() % (looks->random() % 4 ? 16 : 256) : kSlice;
  while (!w.ready.empty() && !w.spinning && w.slice) {
    const size_t at = random ? looks->random() % w.ready.size() : 0;
    const Fragment f = w.ready[at];
    w.ready.erase(w.ready.begin() + static_cast<long>(at));
    run_fragment<true>(w, f);
  }
  grid->useful_turns += !w.spinning;
}

// Of a launch that is looked at, the warp whose turn it is: any, or always the one that the seed puts first, which then
// runs ahead of all others until it has to wait. Warps that spin let the others go first.
Warp* Block::choose_warp() {
  Looks& looks = *grid->looks;
  Warp* best = nullptr;
  uint32_t count = 0;
  for (auto& w : warps) {
    if (w->ready.empty()) continue;
    if (looks.settings.schedule == Schedule::kRandom) {
      if (looks.random() % ++count == 0) best = w.get();
    } else {
      const auto rank = [](const Warp& x) { return std::pair(x.turns_spun, x.look->priority); };
      if (!best || rank(*w) < rank(*best)) best = w.get();
    }
  }
  return best;
}

bool Block::run() {
  uint64_t before = 0, slices = 0;
  for (auto& w : warps) before += w->issued;
  const auto account = [&] {
    uint64_t after = 0;
    for (auto& w : warps) after += w->issued;
    grid->instructions += after - before;
    before = after;
  };
  const bool in_order = !grid->looks || grid->looks->settings.schedule == Schedule::kRoundRobin;
  for (;;) {
    bool any = false, spinning = false;
    if (in_order) {
      for (auto& w : warps) {
        if (w->ready.empty()) continue;
        any = true;
        run_warp(*w);
        spinning |= w->spinning;
      }
    } else if (Warp* const w = choose_warp()) {
      any = true;
      run_warp(*w);
      w->turns_spun = w->spinning ? w->turns_spun + 1 : 0;
      spinning = w->spinning;
    }
    if (live == 0) {
      account();
      return true;
    }
    if (!any) {
      bool released = false;
      for (auto& w : warps) released |= release_joins(*w);
      if (!released) throw KernelFault{kLaunchTimeout, "deadlock: no thread of the block can run" + where()};
    }
    if (spinning) ++fruitless;
    if (spinning || (++slices & 7) == 0) {
      account();
      if (!spinning) fruitless = 0;
      return false;
    }
  }
}

// The finding names a thread that waits, and where.
void Block::report_deadlock(const std::string& message) const {
  for (const Barrier& b : barriers)
    for (const Waiting& entry : b.waiting) return grid->looks->deadlock(message, *entry.warp, entry.fragment);
  for (const auto& w : warps)
    for (const auto* list : {&w->parked})
      for (const Fragment& f : *list) return grid->looks->deadlock(message, *w, f);
  for (const auto& w : warps)
    for (const Fragment& f : w->ready) return grid->looks->deadlock(message, *w, f);
  for (const auto& w : warps)
    for (const Join* j : w->joins)
      if (j->arrived) return grid->looks->deadlock(message, *w, {j->pc, j->arrived, j->frame, nullptr});
}

std::string Block::where() const {
  std::string text;
  for (const auto& w : warps) {
    const auto add = [&](const char* state, const Fragment& f) {
      if (text.size() > 3000) return;
      const auto& code = *f.frame->code;
      text += "\n  " + place(*this, *w, f.mask) + " " + state + " at " +
              (f.pc < code.instructions.size() ? describe(code, code.instructions[f.pc]) : std::string("its end"));
    };
    for (const Fragment& f : w->ready) add("runs", f);
    for (const Fragment& f : w->parked) add("waits for other lanes", f);
    for (const Join* j : w->joins)
      if (j->arrived) add("waits to reconverge", {j->pc, j->arrived, j->frame, nullptr});
    for (size_t k = 0; k < barriers.size(); ++k)
      for (const Waiting& entry : barriers[k].waiting)
        if (entry.warp == w.get())
          add(("waits at barrier " + std::to_string(k) + " (" + std::to_string(barriers[k].arrived) + " threads of " +
               std::to_string(barriers[k].expected ? barriers[k].expected : live) + ")")
                  .c_str(),
              entry.fragment);
  }
  return text;
}

namespace {

// A wild pointer in a kernel is a fault of that kernel, not of the process.
thread_local sigjmp_buf* fault_return = nullptr;
thread_local void* fault_address = nullptr;
struct sigaction previous_segv, previous_bus;

void on_fault(int number, siginfo_t* info, void* context) {
  if (fault_return) {
    fault_address = info->si_addr;
    siglongjmp(*fault_return, 1);
  }
  const struct sigaction& previous = number == SIGSEGV ? previous_segv : previous_bus;
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(number, info, context);
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) return previous.sa_handler(number);
  signal(number, SIG_DFL);
  raise(number);
}

void install_fault_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
  });
}

std::string fault_place(const Block& block, const Warp* w) {
  if (!w || !w->current || !w->frame) return "";
  return place(block, *w, w->active) + ", " + describe(*w->frame->code, *w->current);
}

// Runs one block for a turn; true when it is done.
bool guarded_run(Grid& grid, Block& block) {
  sigjmp_buf here;
  if (sigsetjmp(here, 0)) {
    fault_return = nullptr;
    char text[80];
    std::snprintf(text, sizeof(text), "illegal memory access at 0x%llx",
                  static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(fault_address)));
    grid.fail(kIllegalAddress, std::string(text) + ": " + fault_place(block, block.running));
    return true;
  }
  try {
    fault_return = &here;
    const bool done = block.run();
    fault_return = nullptr;
    return done;
  } catch (const KernelFault& fault) {
    fault_return = nullptr;
    const bool deadlock = fault.message.starts_with("deadlock");
    const std::string at = deadlock ? "" : ": " + fault_place(block, block.running);
    if (deadlock && grid.looks) block.report_deadlock(fault.message);
    grid.fail(fault.code, fault.message + at);
  } catch (const std::exception& error) {
    fault_return = nullptr;
    grid.fail(kLaunchFailure, std::string("out of resources: ") + error.what());
  }
  return true;
}

double deadlock_seconds() {
  static const double seconds = [] {
    const char* text = std::getenv("POP_EMULATOR_DEADLOCK_SECONDS");
    return text ? std::atof(text) : 5.0;
  }();
  return seconds;
}

void work(Grid& grid) {
  std::unique_lock lock(grid.mutex);
  for (;;) {
    if (grid.failed || grid.finished == grid.total) break;
    std::unique_ptr<Block> block;
    const bool can_admit = grid.next < grid.total && grid.resident < grid.limit;
    if (can_admit && (grid.suspended.empty() || grid.admits())) {
      const uint64_t index = grid.next++;
      ++grid.resident;
      grid.admit_next = false;
      grid.last_change = std::chrono::steady_clock::now();
      if (!grid.spare.empty()) {
        block = std::move(grid.spare.back());
        grid.spare.pop_back();
      }
      lock.unlock();
      try {
        if (!block) block = std::make_unique<Block>(grid);
        block->reset(index);
      } catch (const std::exception& error) {
        grid.fail(kLaunchFailure, std::string("out of resources: ") + error.what());
        lock.lock();
        break;
      }
    } else if (!grid.suspended.empty()) {
      const size_t at = grid.choose_suspended();
      block = std::move(grid.suspended[at]);
      grid.suspended.erase(grid.suspended.begin() + static_cast<long>(at));
      grid.admit_next = true;
      lock.unlock();
    } else {
      grid.changed.wait(lock);
      continue;
    }
    lock.lock();
    grid.running.push_back(block.get());
    lock.unlock();
    const bool done = guarded_run(grid, *block);
    lock.lock();
    std::erase(grid.running, block.get());
    if (done) {
      ++grid.finished;
      --grid.resident;
      grid.last_change = std::chrono::steady_clock::now();
      grid.spare.push_back(std::move(block));
    } else {
      const uint64_t writes = block->writes();
      if (writes != block->seen_writes || block->fruitless == 0)
        grid.last_change = std::chrono::steady_clock::now(), block->seen_writes = writes;
      Block* spinner = block.get();
      grid.suspended.push_back(std::move(block));
      // Every resident block spins, nothing has been written, and no block came or went for a long time: no store can
      // end these spins.
      bool all_spin = spinner->fruitless > kHopeless;
      for (const auto& other : grid.suspended) all_spin &= other->fruitless > kHopeless;
      for (const Block* other : grid.running) all_spin &= other->fruitless > kHopeless;
      if (all_spin && std::chrono::duration<double>(std::chrono::steady_clock::now() - grid.last_change).count() >
                          deadlock_seconds()) {
        std::string text = "deadlock: every resident block spins and none writes";
        for (const auto& other : grid.suspended) text += text.size() < 4000 ? other->where() : "";
        if (grid.looks && !grid.suspended.empty()) grid.suspended.front()->report_deadlock(text);
        if (!grid.failed.exchange(true)) grid.code = kLaunchTimeout, grid.message = text;
      }
    }
    grid.changed.notify_all();
  }
  grid.changed.notify_all();
}

// Threads that wait for grids, one for each core.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: kernels may run in static destructors
    return *pool;
  }

  void run(Grid& grid, uint64_t most = ~uint64_t{0}) {
    const std::lock_guard one_at_a_time(run_mutex_);
    ensure_started();
    const size_t wanted = static_cast<size_t>(std::min<uint64_t>({threads_.size(), grid.total, most}));
    std::unique_lock lock(mutex_);
    grid_ = &grid;
    wanted_ = busy_ = wanted;
    wake_.notify_all();
    done_.wait(lock, [&] { return busy_ == 0; });
    grid_ = nullptr;
  }

 private:
  void ensure_started() {
    // A child of fork has none of its parent's threads.
    if (!threads_.empty() && owner_ == getpid()) return;
    owner_ = getpid();
    threads_.clear();
    const char* text = std::getenv("POP_EMULATOR_THREADS");
    const int count =
        std::clamp(text ? std::atoi(text) : static_cast<int>(std::thread::hardware_concurrency()), 1, 256);
    for (int k = 0; k < count; ++k) {
      threads_.push_back(new std::thread([this] { loop(); }));
      threads_.back()->detach();
    }
  }

  void loop() {
    std::fesetenv(FE_DFL_ENV);
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return grid_ && wanted_ > 0; });
      --wanted_;
      Grid* grid = grid_;
      lock.unlock();
      work(*grid);
      lock.lock();
      if (--busy_ == 0) done_.notify_all();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread*> threads_;
  Grid* grid_ = nullptr;
  size_t wanted_ = 0, busy_ = 0;
  pid_t owner_ = 0;
};

}  // namespace

int occupancy(const Kernel& kernel, uint32_t threads, uint32_t dynamic_shared) {
  const DeviceLimits& d = device_limits();
  if (threads == 0 || threads > static_cast<uint32_t>(kernel.max_threads)) return 0;
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  const uint64_t shared = uint64_t{kernel.static_shared} + dynamic_shared;
  if (shared > static_cast<uint64_t>(d.shared_per_block_optin)) return 0;
  const int by_threads = d.threads_per_sm / static_cast<int>(warps * kLanes);
  const int by_shared = static_cast<int>(static_cast<uint64_t>(d.shared_per_sm) / (shared + 1024));
  const int by_registers = d.registers_per_sm / static_cast<int>(warps * kLanes) / kernel.registers;
  return std::min({d.blocks_per_sm, by_threads, by_shared, by_registers});
}

LaunchResult run_grid(const LaunchRequest& request) {
  install_fault_handler();
  static std::atomic<uint64_t> launches{0};
  Grid grid;
  grid.request = request;
  grid.request.parameters.resize(std::max<size_t>(request.parameters.size(), request.kernel->parameter_bytes) + 64);
  grid.total = request.grid.count();
  grid.threads = static_cast<uint32_t>(request.block.count());
  grid.warps = (grid.threads + kLanes - 1) / kLanes;
  grid.id = ++launches;
  grid.limit = static_cast<uint64_t>(std::max(1, occupancy(*request.kernel, grid.threads, request.dynamic_shared))) *
               static_cast<uint64_t>(device_limits().sm_count);
  grid.local_stride =
      (request.kernel->local_bytes + (request.kernel->recursive ? kFrameRoom * stack_limit() : 0) + 63) / 64 * 64;
  if (!look_settings().any()) {
    Pool::instance().run(grid);
    std::fflush(stdout);
    return {grid.code, grid.message, grid.instructions, {}};
  }
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  grid.looks = std::make_unique<Looks>(grid.request, grid.warps, look_settings());
  grid.looks->set_memory(grid.request.parameters.data(), grid.request.parameters.size(), grid.workspace,
                         sizeof(grid.workspace));
  const std::pair<uint32_t, uint32_t> warps = grid.looks->warps();
  Pool::instance().run(grid, 1);
  std::fflush(stdout);
  grid.suspended.clear(), grid.spare.clear();
  grid.looks.reset();
  return {grid.code, grid.message, grid.instructions, warps};
}

}  // namespace pop::emulator

namespace pop::emulator {
bool guarded(const std::function<void()>& access) {
  install_fault_handler();
  sigjmp_buf here;
  sigjmp_buf* const outer = fault_return;
  if (sigsetjmp(here, 0)) {
    fault_return = outer;
    return false;
  }
  fault_return = &here;
  access();
  fault_return = outer;
  return true;
}
}  // namespace pop::emulator
