#include "stream_order.h"

#include <algorithm>

namespace pop::emulator {

namespace {
constexpr size_t kMostLaunches = 1000;  // remembered

void join(StreamClock& into, const StreamClock& other) {
  for (const auto& [stream, number] : other) into[stream] = std::max(into[stream], number);
}
}  // namespace

StreamOrder& StreamOrder::instance() {
  static StreamOrder* order = new StreamOrder;
  return *order;
}

void StreamOrder::enqueue(uint64_t stream, bool blocking) {
  const std::lock_guard lock(mutex_);
  current_ = stream;
  blocking_[stream] = blocking;
  StreamClock& clock = streams_[stream];
  join(clock, host_);
  if (stream == 0) {
    for (const auto& [other, seen] : streams_)
      if (other != 0 && blocking_[other]) join(clock, seen);
  } else if (blocking) {
    join(clock, streams_[0]);
  }
  ++clock[stream];
}

StreamClock StreamOrder::at(uint64_t stream) {
  const std::lock_guard lock(mutex_);
  return streams_[stream];
}

void StreamOrder::wait(uint64_t stream, const StreamClock& event) {
  const std::lock_guard lock(mutex_);
  join(streams_[stream], event);
}

void StreamOrder::host_waits(const StreamClock& event) {
  const std::lock_guard lock(mutex_);
  join(host_, event);
  std::erase_if(launches_, [&](const Launch& l) { return l.number <= host_[l.stream]; });
}

void StreamOrder::host_waits_for_all() {
  const std::lock_guard lock(mutex_);
  for (const auto& [stream, clock] : streams_) join(host_, clock);
  launches_.clear();
}

void StreamOrder::launched(std::pair<uint32_t, uint32_t> warps) {
  const std::lock_guard lock(mutex_);
  if (warps.first == warps.second) return;
  if (launches_.size() >= kMostLaunches) launches_.erase(launches_.begin());
  launches_.push_back({current_, streams_[current_][current_], warps});
}

std::vector<std::pair<uint32_t, uint32_t>> StreamOrder::concurrent() {
  const std::lock_guard lock(mutex_);
  std::vector<std::pair<uint32_t, uint32_t>> result;
  const StreamClock& clock = streams_[current_];
  for (const Launch& l : launches_) {
    const auto seen = clock.find(l.stream);
    if (seen == clock.end() || seen->second < l.number) result.push_back(l.warps);
  }
  return result;
}

}  // namespace pop::emulator
