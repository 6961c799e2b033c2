#include "counts.h"

#include <algorithm>
#include <cstdio>

#include "findings.h"
#include "module.h"

namespace pop::emulator {

namespace {

constexpr size_t kMostLaunches = 4096;

struct Line {
  int line, source_line;
  std::string text, source, function;
  Class counted;
  uint64_t operations;
  Counter counter;
};

struct Loop {
  size_t header, back;  // instructions of the record
  std::vector<size_t> body;
  uint64_t trips = 0;  // of warps
  int depth = 0;
  bool main = false;
};

struct LaunchRecord {
  uint64_t launch;
  std::string kernel;
  Dim3 grid, block;
  uint32_t static_shared, dynamic_shared;
  size_t module;
  std::vector<Line> lines;
  std::vector<Loop> loops;
  std::vector<AllocationCount> allocations;
};

struct History {
  std::mutex mutex;
  std::vector<LaunchRecord> launches;
  std::vector<std::shared_ptr<const std::string>> modules;  // PTX texts
  uint64_t next = 1;
  static History& instance() {
    static History* history = new History;
    return *history;
  }
};

// Natural loops, by their back edges; those with one header are one loop.
std::vector<Loop> find_loops(const Code& code) {
  const auto& ins = code.instructions;
  const size_t n = ins.size();
  std::vector<std::vector<uint32_t>> before(n + 1);
  const auto ends = [](Kind k) { return k == Kind::kReturn || k == Kind::kExit; };
  for (uint32_t pc = 0; pc < n; ++pc) {
    const bool guarded = code.looks[pc].guard != ~0u;
    if (ins[pc].kind == Kind::kBranch) before[ins[pc].target].push_back(pc);
    if (ins[pc].kind == Kind::kBranchIndirect)
      for (const uint32_t t : code.tables[ins[pc].target]) before[t].push_back(pc);
    if (guarded || !(ins[pc].kind == Kind::kBranch || ins[pc].kind == Kind::kBranchIndirect || ends(ins[pc].kind)))
      before[pc + 1].push_back(pc);
  }
  std::map<size_t, std::vector<bool>> bodies;
  std::map<size_t, size_t> backs;
  for (uint32_t pc = 0; pc < n; ++pc) {
    if (ins[pc].kind != Kind::kBranch || ins[pc].target > pc) continue;
    const uint32_t header = ins[pc].target;
    std::vector<bool> body(n);
    body[header] = true;
    std::vector<uint32_t> stack{pc};
    bool natural = true;
    while (!stack.empty() && natural) {
      const uint32_t at = stack.back();
      stack.pop_back();
      if (body[at]) continue;
      body[at] = true;
      natural = at != 0;
      for (const uint32_t p : before[at]) stack.push_back(p);
    }
    if (!natural) continue;
    auto& all = bodies[header];
    all.resize(n);
    for (size_t k = 0; k < n; ++k) all[k] = all[k] || body[k];
    backs[header] = std::max<size_t>(backs[header], pc);
  }
  std::vector<Loop> loops;
  for (const auto& [header, body] : bodies) {
    Loop loop;
    loop.header = header, loop.back = backs[header];
    for (size_t k = 0; k < n; ++k)
      if (body[k]) loop.body.push_back(k);
    for (const auto& [other, outer] : bodies) loop.depth += outer[header];
    loops.push_back(std::move(loop));
  }
  return loops;
}

std::string number(uint64_t v) { return std::to_string(v); }

std::string counter_json(const Counter& c, uint64_t operations) {
  return "\"issued\": " + number(c.issued) + ", \"off\": " + number(c.off) + ", \"lanes\": " + number(c.lanes) +
         ", \"requests\": " + number(c.requests) + ", \"sectors\": " + number(c.sectors) +
         ", \"bytes\": " + number(c.bytes) + ", \"shared_requests\": " + number(c.shared_requests) +
         ", \"groups\": " + number(c.groups) + ", \"wavefronts\": " + number(c.wavefronts) +
         ", \"conflicts\": " + number(c.wavefronts - c.groups) + ", \"operations\": " + number(operations);
}

// Sums over some of a record's lines: in all, and by class.
struct Totals {
  Counter all;
  uint64_t operations = 0;
  Counter classes[kClasses];

  void add(const Line& l) {
    all.add(l.counter);
    operations += l.operations * (l.counter.issued - l.counter.off);
    classes[static_cast<int>(l.counted)].add(l.counter);
  }
  std::string json() const {
    std::string out = counter_json(all, operations) + ", \"classes\": {";
    bool any = false;
    for (int k = 0; k < kClasses; ++k) {
      if (!classes[k].issued) continue;
      out += std::string(any ? ", " : "") + "\"" + class_name(static_cast<Class>(k)) +
             "\": {\"issued\": " + number(classes[k].issued) + ", \"lanes\": " + number(classes[k].lanes) + "}";
      any = true;
    }
    return out + "}";
  }
};

Totals totals_of(const LaunchRecord& r, const Loop* loop) {
  Totals t;
  if (loop)
    for (const size_t k : loop->body) t.add(r.lines[k]);
  else
    for (const Line& l : r.lines) t.add(l);
  return t;
}

std::string launch_json(const LaunchRecord& r) {
  std::string out = "{\"launch\": " + number(r.launch) + ", \"kernel\": " + quoted(r.kernel) + ", \"grid\": [" +
                    number(r.grid.x) + ", " + number(r.grid.y) + ", " + number(r.grid.z) + "], \"block\": [" +
                    number(r.block.x) + ", " + number(r.block.y) + ", " + number(r.block.z) +
                    "], \"static_shared\": " + number(r.static_shared) +
                    ", \"dynamic_shared\": " + number(r.dynamic_shared) + ", \"module\": " + number(r.module) + ", " +
                    totals_of(r, nullptr).json();
  out += ", \"allocations\": [";
  for (const AllocationCount& a : r.allocations)
    out += std::string(&a == &r.allocations[0] ? "" : ", ") + "{\"name\": " + quoted(a.name) +
           ", \"size\": " + number(a.bytes) + ", \"requests\": " + number(a.requests) +
           ", \"sectors\": " + number(a.sectors) + ", \"read_bytes\": " + number(a.read_bytes) +
           ", \"written_bytes\": " + number(a.written_bytes) + ", \"distinct_read\": " + number(a.distinct_read) +
           ", \"distinct_written\": " + number(a.distinct_written) + "}";
  out += "], \"loops\": [";
  for (const Loop& l : r.loops)
    out += std::string(&l == &r.loops[0] ? "" : ", ") +
           "{\"line\": " + number(static_cast<uint64_t>(r.lines[l.header].line)) +
           ", \"last_line\": " + number(static_cast<uint64_t>(r.lines[l.back].line)) +
           ", \"depth\": " + number(static_cast<uint64_t>(l.depth)) + ", \"main\": " + (l.main ? "true" : "false") +
           ", \"trips\": " + number(l.trips) + ", " + totals_of(r, &l).json() + "}";
  out += "], \"instructions\": [";
  bool any = false;
  for (const Line& l : r.lines) {
    if (!l.counter.issued) continue;
    out += std::string(any ? ", " : "") + "{\"line\": " + number(static_cast<uint64_t>(l.line)) +
           ", \"source\": " + quoted(l.source) + ", \"source_line\": " + number(static_cast<uint64_t>(l.source_line)) +
           ", \"text\": " + quoted(l.text) + ", \"class\": \"" + class_name(l.counted) + "\", " +
           counter_json(l.counter, l.operations * (l.counter.issued - l.counter.off)) + "}";
    any = true;
  }
  return out + "]}";
}

std::string format(const char* pattern, auto... values) {
  char text[512];
  std::snprintf(text, sizeof(text), pattern, values...);
  return text;
}

std::string totals_text(const Totals& t) {
  using ull = unsigned long long;
  std::string out =
      format("  %llu warp instructions (%llu without a lane), %.2f lanes each\n", ull{t.all.issued}, ull{t.all.off},
             t.all.issued ? static_cast<double>(t.all.lanes) / static_cast<double>(t.all.issued) : 0);
  for (int k = 0; k < kClasses; ++k)
    if (t.classes[k].issued)
      out += format("    %-14s %12llu\n", class_name(static_cast<Class>(k)), ull{t.classes[k].issued});
  if (t.operations) out += format("  tensor cores: %llu operations\n", ull{t.operations});
  if (t.all.requests)
    out += format("  global: %llu requests, %llu sectors, %llu bytes (%.0f%% of the sectors)\n", ull{t.all.requests},
                  ull{t.all.sectors}, ull{t.all.bytes},
                  100.0 * static_cast<double>(t.all.bytes) / (32.0 * static_cast<double>(t.all.sectors)));
  if (t.all.shared_requests)
    out += format("  shared: %llu requests, %llu wavefronts, %llu of them conflicts\n", ull{t.all.shared_requests},
                  ull{t.all.wavefronts}, ull{t.all.wavefronts - t.all.groups});
  return out;
}

std::string launch_text(const LaunchRecord& r, bool annotate) {
  using ull = unsigned long long;
  std::string out = format("launch %llu: grid (%u, %u, %u), block (%u, %u, %u), kernel ", ull{r.launch}, r.grid.x,
                           r.grid.y, r.grid.z, r.block.x, r.block.y, r.block.z) +
                    r.kernel + "\n" + totals_text(totals_of(r, nullptr));
  for (const AllocationCount& a : r.allocations)
    out +=
        "  " + a.name +
        format(": %llu requests, %llu sectors; read %llu bytes (%llu distinct), wrote %llu (%llu distinct) of %llu\n",
               ull{a.requests}, ull{a.sectors}, ull{a.read_bytes}, ull{a.distinct_read}, ull{a.written_bytes},
               ull{a.distinct_written}, ull{a.bytes});
  for (const Loop& l : r.loops) {
    if (!l.trips) continue;
    out += format("  %sloop, lines %d to %d, depth %d: %llu warp trips\n", l.main ? "main " : "",
                  r.lines[l.header].line, r.lines[l.back].line, l.depth, ull{l.trips});
    if (l.main) {
      std::string inner = totals_text(totals_of(r, &l));
      for (size_t at = 0; at < inner.size(); at = inner.find('\n', at) + 1) inner.insert(at, "  ");
      out += inner;
    }
  }
  if (!annotate) return out;
  out += format("  %10s %6s %10s %10s %10s %10s  %s\n", "issued", "lanes", "sectors", "bytes", "wavefronts",
                "conflicts", "PTX");
  for (const Line& l : r.lines) {
    if (l.text.empty()) continue;
    const Counter& c = l.counter;
    out += format("  %10llu %6.2f ", ull{c.issued},
                  c.issued ? static_cast<double>(c.lanes) / static_cast<double>(c.issued) : 0);
    out += c.requests ? format("%10llu %10llu ", ull{c.sectors}, ull{c.bytes}) : format("%10s %10s ", "", "");
    out += c.groups ? format("%10llu %10llu", ull{c.wavefronts}, ull{c.wavefronts - c.groups})
                    : format("%10s %10s", "", "");
    out += "  " + std::to_string(l.line) + ": " + l.text;
    if (l.source_line) out += "  // " + l.source.substr(l.source.rfind('/') + 1) + ":" + std::to_string(l.source_line);
    out += "\n";
  }
  return out;
}

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
    AllocationCount& a = allocations_[r->id];
    if (a.name.empty()) {
      a.name = r->name.empty() ? "allocation " + number(r->id) : r->name, a.bytes = r->bytes;
      if (r->footprint_launch != launch_) r->footprint.drop(), r->footprint_launch = launch_;
    }
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
      const Look& look = code->looks[pc];
      Line line{};
      const Statement& s = code->function->statements[code->instructions[pc].statement];
      line.line = s.line, line.counted = look.counted, line.operations = look.operations;
      line.function = code->function->name;
      if (look.last) {
        line.text = s.text, line.source_line = s.source_line;
        if (s.source_line) line.source = source_file(kernel_, s.source_file);
        line.counter = counters_[look.id];
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

std::string counts_json() {
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  std::string out = "[";
  for (const LaunchRecord& r : h.launches) out += (out.size() > 1 ? ",\n" : "") + launch_json(r);
  return out + "]";
}

std::string counts_text(bool annotate) {
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  std::string out;
  for (const LaunchRecord& r : h.launches) out += launch_text(r, annotate);
  return out;
}

std::shared_ptr<const std::string> counted_module(size_t number) {
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  return number < h.modules.size() ? h.modules[number] : nullptr;
}

void clear_counts() {
  History& h = History::instance();
  const std::lock_guard lock(h.mutex);
  h.launches.clear(), h.modules.clear();
}

}  // namespace pop::emulator
