#include "findings.h"

#include <cstdio>
#include <cstdlib>

namespace ptx_emulator {

namespace {
constexpr size_t kMost = 1000;

std::string three(const uint32_t (&v)[3], const char* open, const char* close) {
  return open + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) + close;
}

std::string place(const Spot& s) {
  std::string text = "kernel '" + s.kernel.substr(0, 60) + "'";
  if (s.line) {
    text += ", block " + three(s.block, "(", ")") + ", thread " + three(s.thread, "(", ")");
    if (s.source_line) text += ", " + s.source + ":" + std::to_string(s.source_line);
    text += ", line " + std::to_string(s.line) + ": " + s.text;
  }
  return text;
}

std::string finding_text(const Finding& f) {
  std::string text = f.rule + ": " + f.message + "\n    " + place(f.spot);
  if (!f.second_role.empty()) text += "\n    " + f.second_role + ": " + place(f.second);
  return text + "\n";
}

std::string spot_json(const Spot& s) {
  return "\"kernel\": " + quoted(s.kernel) + ", \"line\": " + std::to_string(s.line) + ", \"text\": " + quoted(s.text) +
         ", \"source\": " + quoted(s.source) + ", \"source_line\": " + std::to_string(s.source_line) +
         ", \"block\": " + three(s.block, "[", "]") + ", \"thread\": " + three(s.thread, "[", "]");
}
}  // namespace

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    char escape[8];
    if (c == '"' || c == '\\')
      out += '\\', out += c;
    else if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f)
      std::snprintf(escape, sizeof(escape), "\\u%04x", static_cast<unsigned char>(c)), out += escape;
    else
      out += c;
  }
  return out + "\"";
}

Findings& Findings::instance() {
  static Findings* findings = new Findings;  // kernels may run in static destructors
  return *findings;
}

void Findings::add(Finding f) {
  const std::lock_guard lock(mutex_);
  for (Finding& old : findings_)
    if (old.rule == f.rule && old.spot.kernel == f.spot.kernel && old.spot.line == f.spot.line &&
        old.second.line == f.second.line && old.allocation == f.allocation) {
      ++old.count;
      return;
    }
  if (findings_.size() >= kMost) return;
  if (!std::getenv("PTX_EMULATOR_QUIET")) std::fprintf(stderr, "PTX emulator: %s", finding_text(f).c_str());
  findings_.push_back(std::move(f));
}

std::string Findings::text() const {
  const std::lock_guard lock(mutex_);
  std::string out;
  for (const Finding& f : findings_) out += finding_text(f);
  return out;
}

void Findings::clear() {
  const std::lock_guard lock(mutex_);
  findings_.clear();
}

size_t Findings::size() const {
  const std::lock_guard lock(mutex_);
  return findings_.size();
}

std::string Findings::json() const {
  const std::lock_guard lock(mutex_);
  std::string out = "[";
  for (const Finding& f : findings_) {
    out += out.size() > 1 ? ",\n" : "";
    out += "{\"rule\": " + quoted(f.rule) + ", \"message\": " + quoted(f.message) + ", " + spot_json(f.spot) +
           ", \"address\": " + std::to_string(f.address) + ", \"space\": " + quoted(f.space) +
           ", \"allocation\": " + quoted(f.allocation) + ", \"count\": " + std::to_string(f.count) + ", \"second\": ";
    out += f.second_role.empty() ? "null" : "{\"role\": " + quoted(f.second_role) + ", " + spot_json(f.second) + "}";
    out += "}";
  }
  return out + "]";
}

}  // namespace ptx_emulator
