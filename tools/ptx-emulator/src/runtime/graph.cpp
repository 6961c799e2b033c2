// Stream capture and graphs.
#include <algorithm>
#include <thread>

#include "runtime/launch.h"

namespace ptx_emulator {

namespace {
bool known_graph(cudaGraph_t graph) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  return r.graphs.contains(graph);
}
cudaGraph_t new_graph() {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto* graph = new CUgraph_st;
  r.graphs.insert(graph);
  return graph;
}

cudaError_t begin(cudaStream_t stream, cudaGraph_t graph, cudaStreamCaptureMode mode,
                  std::vector<cudaGraphNode_t> tail) {
  if (!valid_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (mode < cudaStreamCaptureModeGlobal || mode > cudaStreamCaptureModeRelaxed) return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(stream) <= 2) return cudaErrorStreamCaptureUnsupported;
  if (stream->capture) return cudaErrorIllegalState;
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto capture = std::make_shared<Capture>();
  capture->owns_graph = !graph;
  capture->graph = graph ? graph : new_graph();
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = std::this_thread::get_id();
  capture->id = ++r.next_id;
  stream->capture = capture;
  stream->tail = std::move(tail);
  r.captures.insert(capture);
  return cudaSuccess;
}
}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return record(begin(stream, nullptr, mode, {}));
}
PTX_API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                                  const cudaGraphNode_t* dependencies, const cudaGraphEdgeData*,
                                                  size_t count, cudaStreamCaptureMode mode) {
  if (!known_graph(graph) || (count && !dependencies)) return record(cudaErrorInvalidValue);
  return record(begin(stream, graph, mode, {dependencies, dependencies + count}));
}

PTX_API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (!out) return record(cudaErrorInvalidValue);
  if (!capturing(stream)) return record(cudaErrorIllegalState);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  const std::shared_ptr<Capture> capture = stream->capture;
  if (capture->origin != stream) return record(cudaErrorStreamCaptureUnmatched);
  if (capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id())
    return record(cudaErrorStreamCaptureWrongThread);
  // Every captured node must come before the end of the stream that the capture began on.
  std::set<cudaGraphNode_t> before;
  std::vector<cudaGraphNode_t> open = stream->tail;
  while (!open.empty()) {
    cudaGraphNode_t node = open.back();
    open.pop_back();
    if (!before.insert(node).second) continue;
    open.insert(open.end(), node->dependencies.begin(), node->dependencies.end());
  }
  bool joined = true;
  for (cudaStream_t other : r.streams) {
    if (other->capture != capture) continue;
    for (cudaGraphNode_t node : other->tail) joined &= before.contains(node);
  }
  for (cudaStream_t other : r.streams)
    if (other->capture == capture) other->capture.reset(), other->tail.clear();
  r.captures.erase(capture);
  if (capture->invalid || !joined) {
    if (capture->owns_graph) r.graphs.erase(capture->graph), delete capture->graph;
    *out = nullptr;
    return record(capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined);
  }
  *out = capture->graph;
  return cudaSuccess;
}

PTX_API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (!status) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  CUstream_st* s = capturing(stream);
  *status = !s                    ? cudaStreamCaptureStatusNone
            : s->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                             unsigned long long* id, cudaGraph_t* graph,
                                             const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges,
                                             size_t* count) {
  if (const cudaError_t e = cudaStreamIsCapturing(stream, status)) return e;
  CUstream_st* s = capturing(stream);
  if (!s) return cudaSuccess;
  if (id) *id = s->capture->id;
  if (graph) *graph = s->capture->graph;
  if (dependencies) *dependencies = s->tail.data();
  if (edges) *edges = nullptr;
  if (count) *count = s->tail.size();
  return cudaSuccess;
}
PTX_API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  if (!mode) return record(cudaErrorInvalidValue);
  std::swap(*mode, current);
  return cudaSuccess;
}
PTX_API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  if (flags > 1) return record(cudaErrorInvalidValue);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!valid_stream(stream) || !r.events.contains(event)) return record(cudaErrorInvalidResourceHandle);
  CUstream_st* s = capturing(stream);
  if (!event->capture) {
    if (s && !(flags & cudaEventWaitExternal) && event->recorded) {
      s->capture->invalid = true;
      return record(cudaErrorStreamCaptureIsolation);
    }
    StreamOrder::instance().wait(stream_number(stream), event->done);
    return cudaSuccess;
  }
  if (!r.captures.contains(event->capture)) return record(cudaErrorInvalidValue);
  if (reinterpret_cast<uintptr_t>(stream) <= 2) {
    event->capture->invalid = true;
    return record(cudaErrorStreamCaptureImplicit);
  }
  if (s && s->capture != event->capture) {
    s->capture->invalid = event->capture->invalid = true;
    return record(cudaErrorStreamCaptureMerge);
  }
  stream->capture = event->capture;
  for (cudaGraphNode_t node : event->tail)
    if (std::find(stream->tail.begin(), stream->tail.end(), node) == stream->tail.end()) stream->tail.push_back(node);
  return cudaSuccess;
}

PTX_API cudaError_t cudaGraphCreate(cudaGraph_t* out, unsigned flags) {
  if (!out || flags) return record(cudaErrorInvalidValue);
  *out = new_graph();
  return cudaSuccess;
}
PTX_API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.graphs.erase(graph)) return record(cudaErrorInvalidValue);
  for (const auto& capture : r.captures)
    if (capture->graph == graph) {
      r.graphs.insert(graph);
      return record(cudaErrorIllegalState);
    }
  delete graph;
  return cudaSuccess;
}
PTX_API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  if (!out || !known_graph(graph)) return record(cudaErrorInvalidValue);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto* executable = new CUgraphExec_st;
  for (const auto& node : graph->nodes)
    if (node->run) executable->work.push_back(node->run);
  r.executables.insert(executable);
  *out = executable;
  return cudaSuccess;
}
PTX_API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(out, graph, flags);
}
PTX_API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.executables.erase(executable)) return record(cudaErrorInvalidValue);
  delete executable;
  return cudaSuccess;
}
PTX_API cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.executables.contains(executable)) return record(cudaErrorInvalidValue);
  return record(valid_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}
PTX_API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  Runtime& r = Runtime::instance();
  std::vector<std::function<cudaError_t()>> work;
  {
    const std::lock_guard lock(r.mutex);
    if (!r.executables.contains(executable)) return record(cudaErrorInvalidValue);
    work = executable->work;
  }
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (r.sticky) return record(static_cast<cudaError_t>(r.sticky.load()));
  return record(submit(stream, cudaGraphNodeTypeGraph, [work] {
    for (const auto& step : work)
      if (const cudaError_t e = step()) return e;
    return cudaSuccess;
  }));
}
PTX_API cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                        cudaGraphExecUpdateResultInfo* info) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.executables.contains(executable) || !r.graphs.contains(graph)) return record(cudaErrorInvalidValue);
  std::vector<std::function<cudaError_t()>> work;
  for (const auto& node : graph->nodes)
    if (node->run) work.push_back(node->run);
  if (info) *info = {};
  if (work.size() != executable->work.size()) {
    if (info) info->result = cudaGraphExecUpdateErrorTopologyChanged;
    return record(cudaErrorGraphExecUpdateFailure);
  }
  executable->work = std::move(work);
  return cudaSuccess;
}
PTX_API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!known_graph(graph) || !count) return record(cudaErrorInvalidValue);
  const size_t total = graph->nodes.size();
  if (nodes)
    for (size_t k = 0; k < std::min(*count, total); ++k) nodes[k] = graph->nodes[k].get();
  *count = nodes ? std::min(*count, total) : total;
  return cudaSuccess;
}
PTX_API cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  if (!node || !type) return record(cudaErrorInvalidValue);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  for (const cudaGraph_t graph : r.graphs)
    for (const auto& known : graph->nodes)
      if (known.get() == node) return *type = node->type, cudaSuccess;
  return record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaGraphAddKernelNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                                           size_t count, const cudaKernelNodeParams* p) {
  if (!out || !p || !known_graph(graph) || (count && !dependencies)) return record(cudaErrorInvalidValue);
  std::function<cudaError_t()> work;
  if (const cudaError_t e = prepare_launch(p->func, p->gridDim, p->blockDim, p->kernelParams, p->sharedMemBytes, work))
    return record(e);
  *out = add_node(graph, cudaGraphNodeTypeKernel, std::move(work), {dependencies, dependencies + count});
  (*out)->kernel = *p;
  return cudaSuccess;
}
PTX_API cudaError_t cudaGraphAddEmptyNode(cudaGraphNode_t* out, cudaGraph_t graph, const cudaGraphNode_t* dependencies,
                                          size_t count) {
  if (!out || !known_graph(graph) || (count && !dependencies)) return record(cudaErrorInvalidValue);
  *out = add_node(graph, cudaGraphNodeTypeEmpty, nullptr, {dependencies, dependencies + count});
  return cudaSuccess;
}
