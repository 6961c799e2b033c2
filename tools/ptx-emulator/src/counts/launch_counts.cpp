
#include "counts/launch_counts.h"

#include <algorithm>

#include "counts/history.h"
#include "module.h"

namespace ptx_emulator {

namespace {

constexpr size_t kMostLaunches = 4096;

}  // namespace

void Counter::add(const Counter& o) {
  issued += o.issued, off += o.off, lanes += o.lanes, requests += o.requests, sectors += o.sectors, bytes += o.bytes;
  shared_requests += o.shared_requests, groups += o.groups, wavefronts += o.wavefronts;
}

LaunchCounts::LaunchCounts(const Kernel& kernel, Dim3 grid, Dim3 block, uint32_t dynamic_shared)
    : kernel_(kernel), grid_(grid), block_(block), dynamic_shared_(dynamic_shared), counters_(kernel.instructions) {
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  launch_ = h.next++;
}

AllocationCount& LaunchCounts::allocation(Region& r) {
  AllocationCount& a = allocations_[r.id];
  if (a.name.empty()) {
    a.name = r.name.empty() ? "allocation " + std::to_string(r.id) : r.name, a.bytes = r.bytes;
    if (r.footprint_launch != launch_) r.footprint.drop(), r.footprint_launch = launch_;
  }
  return a;
}

void LaunchCounts::global(Counter& c, const uint64_t* address, Region* const* region, const uint32_t* sizes,
                          uint32_t bytes, uint32_t lanes, bool write, bool read) {
  struct Part {
    uint64_t at;
    uint32_t size, lane;
  } parts[kLanes];
  size_t count = 0;
  bool sorted = true;
  for (uint32_t m = lanes; m; m &= m - 1) {
    const auto lane = static_cast<uint32_t>(std::countr_zero(m));
    parts[count] = {address[lane], sizes ? sizes[lane] : bytes, lane};
    sorted &= count == 0 || parts[count].at >= parts[count - 1].at;
    ++count;
  }
  if (!sorted) std::sort(parts, parts + count, [](const Part& a, const Part& b) { return a.at < b.at; });
  ++c.requests;
  uint64_t end = 0, next_sector = 0;
  Region* last = nullptr;
  bool first = true;
  for (size_t k = 0; k < count; ++k) {
    const Part& p = parts[k];
    const uint64_t from = first ? p.at : std::max(p.at, end), to = p.at + p.size;
    const uint64_t sector = first ? p.at / 32 : std::max(p.at / 32, next_sector), sector_end = (to + 31) / 32;
    first = false;
    const uint64_t sectors = sector_end > sector ? sector_end - sector : 0, fresh = to > from ? to - from : 0;
    end = std::max(end, to), next_sector = std::max(next_sector, sector_end);
    c.sectors += sectors, c.bytes += fresh;
    Region* const r = region[p.lane];
    if (!r) continue;
    AllocationCount& a = allocation(*r);
    a.requests += r != last;
    last = r;
    a.sectors += sectors;
    if (read) a.read_bytes += fresh;
    if (write) a.written_bytes += fresh;
    if (!fresh) continue;
    uint8_t* touched = r->footprint.reserve(r->bytes) + (from - r->base);
    const uint64_t inside = std::min<uint64_t>(fresh, r->base + r->bytes - from);
    for (uint64_t b = 0; b < inside; ++b) {
      if (read) a.distinct_read += !(touched[b] & 1), touched[b] |= 1;
      if (write) a.distinct_written += !(touched[b] & 2), touched[b] |= 2;
    }
  }
}

void LaunchCounts::bulk(Counter& c, const std::vector<std::pair<uint64_t, uint32_t>>& pieces, Region* region,
                        bool write) {
  ++c.requests;
  uint64_t next_sector = 0;
  AllocationCount* a = nullptr;
  uint8_t* footprint = nullptr;
  if (region) {
    a = &allocation(*region), ++a->requests;
    footprint = region->footprint.reserve(region->bytes);
  }
  for (const auto& [at, size] : pieces) {
    const uint64_t sector =
        std::max(at / 32, at / 32 < next_sector && next_sector - at / 32 < 4 ? next_sector : at / 32);
    const uint64_t end = (at + size + 31) / 32, sectors = end > sector ? end - sector : 0;
    next_sector = end;
    c.sectors += sectors, c.bytes += size;
    if (!a) continue;
    a->sectors += sectors;
    (write ? a->written_bytes : a->read_bytes) += size;
    const uint8_t bit = write ? 2 : 1;
    for (uint64_t b = at - region->base; b < at - region->base + size && b < region->bytes; ++b) {
      (write ? a->distinct_written : a->distinct_read) += !(footprint[b] & bit);
      footprint[b] |= bit;
    }
  }
}

// 32 banks of 4 bytes. Lanes are served in groups: 32 for accesses of up to 4 bytes, 16 for 8, 8 for 16, and the 8 rows
// of a matrix. A group takes as many wavefronts as the most distinct words that it wants from one bank.
void LaunchCounts::shared(Counter& c, const uint64_t* address, uint32_t bytes, uint32_t lanes, bool matrix) {
  ++c.shared_requests;
  const uint32_t size = matrix || bytes > 8 ? 8 : bytes > 4 ? 16 : 32, words = std::max(bytes / 4, 1u);
  for (uint32_t group = 0; group < kLanes; group += size) {
    const uint32_t members = size == 32 ? lanes : lanes >> group & ((1u << size) - 1);
    if (!members) continue;
    ++c.groups;
    uint64_t seen[kLanes][kLanes];
    uint8_t used[kLanes] = {};
    uint32_t most = 1;
    for (uint32_t m = members; m; m &= m - 1) {
      const uint64_t at = address[group + static_cast<uint32_t>(std::countr_zero(m))] / 4;
      for (uint32_t k = 0; k < words; ++k) {
        const uint64_t word = at + k;
        const uint32_t bank = word % 32;
        bool known = false;
        for (uint32_t j = 0; j < used[bank] && !known; ++j) known = seen[bank][j] == word;
        if (known) continue;
        if (used[bank] < kLanes) seen[bank][used[bank]++] = word;
        most = std::max<uint32_t>(most, used[bank]);
      }
    }
    c.wavefronts += most;
  }
}

void LaunchCounts::finish() {
  LaunchRecord record;
  record.launch = launch_, record.kernel = kernel_.name, record.grid = grid_, record.block = block_;
  record.static_shared = kernel_.static_shared, record.dynamic_shared = dynamic_shared_;
  for (const Code* code : kernel_.ordered_codes) {
    const size_t start = record.lines.size();
    for (size_t pc = 0; pc < code->instructions.size(); ++pc) {
      const InstructionEffects& effects = code->effects[pc];
      Line line{};
      const Statement& s = code->function->statements[code->instructions[pc].statement];
      line.line = s.line, line.counted = effects.counted, line.operations = effects.operations;
      line.function = code->function->name;
      if (effects.last) {
        line.text = s.text, line.source_line = s.source_line;
        if (s.source_line) line.source = source_file(kernel_, s.source_file);
        line.counter = counters_[effects.id];
      }
      record.lines.push_back(std::move(line));
    }
    for (Loop& loop : find_loops(*code)) {
      for (size_t& k : loop.body) k += start;
      loop.header += start, loop.back += start;
      for (const size_t k : loop.body)
        if (k >= loop.header && !record.lines[k].text.empty()) {
          loop.trips = record.lines[k].counter.issued;
          break;
        }
      record.loops.push_back(std::move(loop));
    }
  }
  Loop* main = nullptr;
  uint64_t best = 0;
  for (Loop& loop : record.loops) {
    uint64_t tensor = 0;
    for (const size_t k : loop.body)
      if (record.lines[k].counted == Class::kTensor) tensor += record.lines[k].counter.issued;
    bool inner = false;  // has a loop within that has mma, too
    for (const Loop& other : record.loops)
      if (&other != &loop && std::binary_search(loop.body.begin(), loop.body.end(), other.header))
        for (const size_t k : other.body) inner |= record.lines[k].counted == Class::kTensor;
    if (!inner && tensor > best) best = tensor, main = &loop;
  }
  if (main) main->main = true;
  for (auto& [id, a] : allocations_) record.allocations.push_back(std::move(a));
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  if (h.launches.size() >= kMostLaunches) h.launches.erase(h.launches.begin());
  const auto module = std::find(h.modules.begin(), h.modules.end(), kernel_.module->text);
  record.module = static_cast<size_t>(module - h.modules.begin());
  if (module == h.modules.end()) h.modules.push_back(kernel_.module->text);
  h.launches.push_back(std::move(record));
}

}  // namespace ptx_emulator
