
#include "counts/report.h"

#include <algorithm>
#include <cstdio>

#include "counts/history.h"
#include "findings.h"

namespace ptx_emulator {

namespace {

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

}  // namespace ptx_emulator
