#include "stream_order.h"

#include <algorithm>

namespace ptx_emulator {

namespace {
constexpr size_t kMostWorks = 1000;  // remembered

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
  std::erase_if(works_, [&](const auto& w) { return w->number <= host_[w->stream]; });
}

void StreamOrder::host_waits_for_all() {
  const std::lock_guard lock(mutex_);
  for (const auto& [stream, clock] : streams_) join(host_, clock);
  works_.clear();
}

void StreamOrder::done(Work work) {
  const std::lock_guard lock(mutex_);
  if (work.warps.first == work.warps.second && work.extents.empty()) return;
  if (works_.size() >= kMostWorks) works_.erase(works_.begin());
  work.stream = current_, work.number = streams_[current_][current_];
  works_.push_back(std::make_shared<const Work>(std::move(work)));
}

std::vector<std::shared_ptr<const Work>> StreamOrder::concurrent() {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<const Work>> result;
  const StreamClock& clock = streams_[current_];
  for (const auto& work : works_) {
    const auto seen = clock.find(work->stream);
    if (seen == clock.end() || seen->second < work->number) result.push_back(work);
  }
  return result;
}

}  // namespace ptx_emulator
