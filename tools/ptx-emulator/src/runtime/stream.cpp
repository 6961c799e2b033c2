// Streams and events.
#include <algorithm>

#include "runtime/state.h"

namespace ptx_emulator {

namespace {

bool known_event(cudaEvent_t event) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  return r.events.contains(event);
}

}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

// Streams.

PTX_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
  if (!out || flags > 1) return record(cudaErrorInvalidValue);
  if (const cudaError_t e = sticky()) return record(e);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto* stream = new CUstream_st;
  stream->flags = flags;
  stream->priority = std::clamp(priority, -5, 0);
  stream->id = ++r.next_id;
  r.streams.insert(stream);
  *out = stream;
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
PTX_API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
PTX_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.streams.erase(stream)) return record(cudaErrorInvalidResourceHandle);
  if (stream->capture) stream->capture->invalid = true;
  delete stream;
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (const cudaError_t e = sticky()) return record(e);
  StreamOrder::instance().host_waits(StreamOrder::instance().at(stream_number(stream)));
  return record(forbidden_in_capture(stream, false));
}
PTX_API cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
PTX_API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  if (!flags) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *flags = reinterpret_cast<uintptr_t>(stream) <= 2 ? 0 : stream->flags;
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  if (!priority) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *priority = reinterpret_cast<uintptr_t>(stream) <= 2 ? 0 : stream->priority;
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  if (!id) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *id = reinterpret_cast<uintptr_t>(stream) <= 2 ? 0 : stream->id;
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  if (!device) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *device = 0;
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamSetAttribute(cudaStream_t stream, cudaStreamAttrID, const cudaStreamAttrValue* value) {
  return record(!value ? cudaErrorInvalidValue : valid_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}
PTX_API cudaError_t cudaStreamAttachMemAsync(cudaStream_t stream, void*, size_t, unsigned) {
  return record(valid_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

// Events.

PTX_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
  if (!out || flags > 7) return record(cudaErrorInvalidValue);
  if (const cudaError_t e = sticky()) return record(e);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto* event = new CUevent_st;
  event->flags = flags;
  r.events.insert(event);
  *out = event;
  return cudaSuccess;
}
PTX_API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
PTX_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.events.erase(event)) return record(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
PTX_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  if (!known_event(event) || !valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (flags > 1) return record(cudaErrorInvalidValue);
  if (const cudaError_t e = sticky()) return record(e);
  if (CUstream_st* s = capturing(stream)) {
    event->capture = s->capture;
    event->tail = s->tail;
    return cudaSuccess;
  }
  event->capture.reset();
  event->done = StreamOrder::instance().at(stream_number(stream));
  event->recorded = true;
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}
PTX_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
PTX_API cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!known_event(event)) return record(cudaErrorInvalidResourceHandle);
  if (event->capture) {
    event->capture->invalid = true;
    return record(cudaErrorCapturedEvent);
  }
  StreamOrder::instance().host_waits(event->done);
  return record(sticky());
}
PTX_API cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
PTX_API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  if (!ms) return record(cudaErrorInvalidValue);
  if (!known_event(start) || !known_event(end)) return record(cudaErrorInvalidResourceHandle);
  if (!start->recorded || !end->recorded || ((start->flags | end->flags) & cudaEventDisableTiming))
    return record(cudaErrorInvalidResourceHandle);
  if (const cudaError_t e = sticky()) return record(e);
  *ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}
