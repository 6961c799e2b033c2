// What all parts of the runtime need of one another: errors, and how work is enqueued or captured.
#include "runtime/state.h"

#include <cstdio>

namespace ptx_emulator {

Runtime& Runtime::instance() {
  static Runtime* runtime = new Runtime;  // programs unregister in static destructors
  return *runtime;
}

cudaError_t& last_error() {
  thread_local cudaError_t error = cudaSuccess;
  return error;
}

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error() = error;
  return error;
}

cudaError_t sticky() { return static_cast<cudaError_t>(Runtime::instance().sticky.load()); }

void say(const std::string& message) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  r.message = message;
  if (!std::getenv("PTX_EMULATOR_QUIET")) std::fprintf(stderr, "PTX emulator: %s\n", message.c_str());
}

bool valid_stream(cudaStream_t stream) {
  const auto value = reinterpret_cast<uintptr_t>(stream);
  if (value <= 2) return true;  // the default stream, by its three names
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  return r.streams.contains(stream);
}

uint64_t stream_number(cudaStream_t stream) { return reinterpret_cast<uintptr_t>(stream) <= 2 ? 0 : stream->id; }

CUstream_st* capturing(cudaStream_t stream) {
  return reinterpret_cast<uintptr_t>(stream) > 2 && stream->capture ? stream : nullptr;
}

cudaGraphNode_t add_node(cudaGraph_t graph, cudaGraphNodeType type, std::function<cudaError_t()> work,
                         std::vector<cudaGraphNode_t> dependencies) {
  auto node = std::make_unique<CUgraphNode_st>();
  node->type = type;
  node->run = std::move(work);
  node->dependencies = std::move(dependencies);
  node->graph = graph;
  graph->nodes.push_back(std::move(node));
  return graph->nodes.back().get();
}

cudaError_t submit(cudaStream_t stream, cudaGraphNodeType type, std::function<cudaError_t()> work,
                   const cudaKernelNodeParams* kernel) {
  if (CUstream_st* s = capturing(stream)) {
    if (s->capture->invalid) return cudaErrorStreamCaptureInvalidated;
    cudaGraphNode_t node = add_node(s->capture->graph, type, std::move(work), s->tail);
    if (kernel) node->kernel = *kernel;
    s->tail = {node};
    return cudaSuccess;
  }
  // Work on the legacy stream would wait for a capturing stream that blocks it.
  if (reinterpret_cast<uintptr_t>(stream) <= 1) {
    Runtime& r = Runtime::instance();
    const std::lock_guard lock(r.mutex);
    for (const auto& capture : r.captures)
      if (!(capture->origin->flags & cudaStreamNonBlocking)) {
        capture->invalid = true;
        return cudaErrorStreamCaptureImplicit;
      }
  }
  const uint64_t number = stream_number(stream);
  StreamOrder::instance().enqueue(number, number && !(stream->flags & cudaStreamNonBlocking));
  return work();
}

cudaError_t forbidden_in_capture(cudaStream_t stream, bool whole_device) {
  if (CUstream_st* s = capturing(stream)) {
    s->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  if (!whole_device) return cudaSuccess;
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  for (const auto& capture : r.captures) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    if (capture->mode == cudaStreamCaptureModeThreadLocal && capture->thread != std::this_thread::get_id()) continue;
    capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  return cudaSuccess;
}

}  // namespace ptx_emulator
