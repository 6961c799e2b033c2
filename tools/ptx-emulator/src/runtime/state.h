// The runtime's state, which its other files share: errors, programs, streams, captures, graphs.
#pragma once

#pragma GCC visibility push(default)
#include <cuda_runtime_api.h>
#pragma GCC visibility pop

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "machine.h"
#include "module.h"
#include "stream_order.h"

struct CUgraphNode_st {
  cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
  std::function<cudaError_t()> run;
  std::vector<cudaGraphNode_t> dependencies;
  cudaGraph_t graph = nullptr;
  cudaKernelNodeParams kernel{};
};

struct CUgraph_st {
  std::vector<std::unique_ptr<CUgraphNode_st>> nodes;  // in an order in which they may run
};

struct CUgraphExec_st {
  std::vector<std::function<cudaError_t()>> work;
};

namespace ptx_emulator {

// A capture in progress: begun on one stream, joined by others through events.
struct Capture {
  cudaGraph_t graph = nullptr;
  bool owns_graph = true;
  cudaStream_t origin = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread;
  bool invalid = false;
  unsigned long long id = 0;
};

}  // namespace ptx_emulator

struct CUstream_st {
  unsigned flags = 0;
  int priority = 0;
  unsigned long long id = 0;
  std::shared_ptr<ptx_emulator::Capture> capture;
  std::vector<cudaGraphNode_t> tail;  // what the next captured node depends on
};

struct CUevent_st {
  unsigned flags = 0;
  bool recorded = false;
  std::chrono::steady_clock::time_point time;
  std::shared_ptr<ptx_emulator::Capture> capture;
  std::vector<cudaGraphNode_t> tail;
  ptx_emulator::StreamClock done;  // what the event stands for
};

namespace ptx_emulator {

// PTX that came with a program or was loaded; compiled when first used.
struct Library {
  const void* fatbinary = nullptr;
  std::string text;
  std::unique_ptr<Module> module;
  cudaError_t error = cudaSuccess;
  std::mutex mutex;
  std::vector<struct KernelHandle*> handles;

  cudaError_t load();
};

struct KernelHandle {
  Library* library = nullptr;
  std::string name;
  Kernel* kernel = nullptr;
  cudaError_t error = cudaSuccess;

  cudaError_t resolve();
};

struct DeviceSymbol {
  Library* library;
  std::string name;
  size_t bytes;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::unordered_map<const void*, std::unique_ptr<KernelHandle>> functions;  // by host stub
  std::unordered_map<const void*, DeviceSymbol> symbols;                     // by host shadow variable
  std::vector<std::pair<void**, DeviceSymbol>> managed;
  std::unordered_map<const void*, std::unique_ptr<KernelHandle>> kernels;  // made by cudaLibraryGetKernel, by address
  std::unordered_map<const void*, std::unique_ptr<Library>> libraries;
  std::unordered_set<cudaStream_t> streams;
  std::unordered_set<cudaEvent_t> events;
  std::unordered_set<cudaGraph_t> graphs;
  std::unordered_set<cudaGraphExec_t> executables;
  std::set<std::shared_ptr<Capture>> captures;
  std::atomic<int> sticky{cudaSuccess};  // a kernel's fault stays until the device is reset
  std::string message;                   // of the last failed kernel or module
  uint64_t warp_instructions = 0;        // of all launches
  uint64_t launches = 0;
  double seconds = 0;  // spent in them
  unsigned long long next_id = 1;
  std::atomic<bool> expects_stream{false};  // launches on another are findings
  std::atomic<cudaStream_t> expected_stream{nullptr};

  static Runtime& instance();
};

cudaError_t& last_error();              // the thread's
cudaError_t record(cudaError_t error);  // remembers a failure as the thread's last error
void say(const std::string& message);   // keeps it, and prints it once for a person to read

cudaError_t sticky();  // a kernel's fault, which stays until the device is reset

bool valid_stream(cudaStream_t stream);
uint64_t stream_number(cudaStream_t stream);  // 0: the default stream, by any of its names
CUstream_st* capturing(cudaStream_t stream);  // the stream if it is being captured

// Does the work now, or adds it to the graph being captured.
cudaError_t submit(cudaStream_t stream, cudaGraphNodeType type, std::function<cudaError_t()> work,
                   const cudaKernelNodeParams* kernel = nullptr);
cudaGraphNode_t add_node(cudaGraph_t graph, cudaGraphNodeType type, std::function<cudaError_t()> work,
                         std::vector<cudaGraphNode_t> dependencies);
// For calls that a capture forbids: the error, having invalidated the capture; or success.
cudaError_t forbidden_in_capture(cudaStream_t stream, bool whole_device);

}  // namespace ptx_emulator

#define PTX_API extern "C" __attribute__((visibility("default")))
