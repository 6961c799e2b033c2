// CUDA's runtime interface over the device: programs and kernels, errors, devices, memory, streams, events, launches.
// Work runs when it is enqueued, in the caller's order, which is one of the orders that streams allow. A kernel's fault
// is reported as on hardware: by the calls after the launch, until the device is reset.
#include "runtime.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <thread>

#include "checks.h"
#include "fatbinary.h"
#include "memory.h"
#include "schedule.h"

namespace pop::emulator {

namespace {
thread_local cudaError_t last_error = cudaSuccess;
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

size_t attribute_limit(size_t value) { return value; }
}  // namespace

Runtime& Runtime::instance() {
  static Runtime* runtime = new Runtime;  // programs unregister in static destructors
  return *runtime;
}

cudaError_t record(cudaError_t error) {
  if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
  return error;
}

void say(const std::string& message) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  r.message = message;
  if (!std::getenv("POP_EMULATOR_QUIET")) std::fprintf(stderr, "pop emulator: %s\n", message.c_str());
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

cudaError_t Library::load() {
  const std::lock_guard lock(mutex);
  if (module || error != cudaSuccess) return error;
  try {
    if (fatbinary) {
      const DeviceLimits& d = device_limits();
      auto found = extract_ptx(fatbinary, 0, d.capability_major * 10 + d.capability_minor);
      if (!found) {
        say("the program has no PTX for this device");
        return error = cudaErrorNoKernelImageForDevice;
      }
      text = std::move(*found);
    }
    module = load_module(text);
    return cudaSuccess;
  } catch (const std::exception& problem) {
    say(problem.what());
    return error = cudaErrorInvalidPtx;
  }
}

cudaError_t KernelHandle::resolve() {
  if (kernel || error != cudaSuccess) return error;
  if (const cudaError_t failed = library->load()) return error = failed;
  try {
    kernel = library->module->kernel(name);
  } catch (const std::exception& problem) {
    say("kernel '" + name + "': " + problem.what());
    return error = cudaErrorInvalidPtx;
  }
  return kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

KernelHandle* find_kernel(const void* function) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (const auto at = r.functions.find(function); at != r.functions.end()) return at->second.get();
  if (const auto at = r.kernels.find(function); at != r.kernels.end()) return at->second.get();
  for (const auto& [stub, handle] : r.functions)
    if (handle.get() == function) return handle.get();
  return nullptr;
}

cudaError_t prepare_launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                           std::function<cudaError_t()>& work, bool cooperative) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return cudaErrorInvalidDeviceFunction;
  if (const cudaError_t error = handle->resolve()) return error;
  const Kernel& kernel = *handle->kernel;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0 || threads > 1024 || block.x > 1024 || block.y > 1024 ||
      block.z > 64 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const auto& required = kernel.function->required_threads;
  if (required[0] ? (required[0] != block.x || required[1] != block.y || required[2] != block.z)
                  : threads > static_cast<uint64_t>(kernel.max_threads))
    return cudaErrorInvalidValue;
  if (shared > attribute_limit(static_cast<size_t>(kernel.max_dynamic_shared)) ||
      shared + kernel.static_shared >
          static_cast<size_t>(std::max(device_limits().shared_per_block,
                                       kernel.max_dynamic_shared + static_cast<int>(kernel.static_shared))))
    return cudaErrorInvalidValue;
  auto request = std::make_shared<LaunchRequest>();
  request->kernel = &kernel;
  request->grid = {grid.x, grid.y, grid.z};
  request->block = {block.x, block.y, block.z};
  request->dynamic_shared = static_cast<uint32_t>(shared);
  request->cooperative = cooperative;
  request->parameters.resize(kernel.parameter_bytes);
  bool readable = true;
  if (!kernel.parameters.empty()) {
    if (!arguments) return cudaErrorInvalidValue;
    readable = guarded([&] {
      for (size_t k = 0; k < kernel.parameters.size(); ++k)
        std::memcpy(request->parameters.data() + kernel.parameters[k].offset, arguments[k], kernel.parameters[k].bytes);
    });
  }
  if (!readable) return cudaErrorInvalidValue;
  work = [request]() -> cudaError_t {
    Runtime& r = Runtime::instance();
    const auto began = std::chrono::steady_clock::now();
    if (look_settings().checks & kCheckRace) request->concurrent = StreamOrder::instance().concurrent();
    const LaunchResult result = run_grid(*request);
    const Kernel* const ran = request->kernel;
    StreamOrder::instance().done(
        {ran->name, result.warps, ran, ran->module->alive, request->grid, request->block, {}, 0, 0});
    const std::lock_guard lock(r.mutex);
    r.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    r.warp_instructions += result.warp_instructions;
    ++r.launches;
    if (result.code) {
      say(result.message);
      r.sticky = result.code;
    }
    return cudaSuccess;  // faults are asynchronous
  };
  return cudaSuccess;
}

namespace {

cudaError_t sticky() { return static_cast<cudaError_t>(Runtime::instance().sticky.load()); }

Library* library_of(void** handle) { return reinterpret_cast<Library*>(handle); }

// A span of device memory: known, and large enough.
bool device_span(const void* p, size_t bytes) {
  const auto a = Memory::instance().find(p);
  return a && static_cast<size_t>(static_cast<const uint8_t*>(p) - a->base) + bytes <= a->bytes;
}

// Whether so many bytes from there on can be addressed at all.
bool addressable(const void* p, size_t bytes) {
  constexpr uintptr_t kEnd = uintptr_t{1} << 47;
  return bytes <= kEnd && reinterpret_cast<uintptr_t>(p) <= kEnd - bytes;
}

cudaError_t check_copy(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return cudaSuccess;
  if (!to || !from || !addressable(to, bytes) || !addressable(from, bytes)) return cudaErrorInvalidValue;
  switch (kind) {
    case cudaMemcpyHostToHost:
      return cudaSuccess;
    case cudaMemcpyHostToDevice:
      return device_span(to, bytes) ? cudaSuccess : cudaErrorInvalidValue;
    case cudaMemcpyDeviceToHost:
      return device_span(from, bytes) ? cudaSuccess : cudaErrorInvalidValue;
    case cudaMemcpyDeviceToDevice:
      return device_span(to, bytes) && device_span(from, bytes) ? cudaSuccess : cudaErrorInvalidValue;
    case cudaMemcpyDefault:
      return (!Memory::instance().find(to) || device_span(to, bytes)) &&
                     (!Memory::instance().find(from) || device_span(from, bytes))
                 ? cudaSuccess
                 : cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidMemcpyDirection;
  }
}

// Whether the host reads these bytes as its own.
bool of_the_host(const void* p) {
  const auto a = Memory::instance().find(p);
  return !a || a->kind == Allocation::Kind::kPinned || a->kind == Allocation::Kind::kRegistered;
}

cudaError_t copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height) {
  look_at_copy("a copy", {{reinterpret_cast<uintptr_t>(from), width, from_pitch, height, false},
                          {reinterpret_cast<uintptr_t>(to), width, to_pitch, height, true}});
  if (Memory::instance().tracking()) {
    const bool leaves = of_the_host(to) && !of_the_host(from);
    for (size_t row = 0; row < height; ++row) {
      const char* const source = static_cast<const char*>(from) + row * from_pitch;
      if (leaves && !host_reads(source, width, "a copy to the host")) break;
      if (!leaves) Memory::instance().copy_written(static_cast<char*>(to) + row * to_pitch, source, width);
    }
  }
  const bool done = guarded([&] {
    for (size_t row = 0; row < height; ++row)
      std::memmove(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  });
  return done ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream, bool async) {
  if (const cudaError_t e = sticky()) return e;
  if (!valid_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (const cudaError_t e = check_copy(to, from, bytes, kind)) return e;
  if (!async) {
    if (const cudaError_t e = forbidden_in_capture(stream, true)) return e;
  }
  const cudaError_t e = submit(stream, cudaGraphNodeTypeMemcpy, [=] { return copy_rows(to, 0, from, 0, bytes, 1); });
  // Copies to the host's own memory return when they are done, asynchronous or not.
  const bool waits = !async || (!capturing(stream) && !Memory::instance().find(to) && Memory::instance().find(from));
  if (waits) StreamOrder::instance().host_waits(StreamOrder::instance().at(stream_number(stream)));
  return e;
}

cudaError_t copy_2d(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                    cudaMemcpyKind kind, cudaStream_t stream, bool async) {
  if (const cudaError_t e = sticky()) return e;
  if (!valid_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (width == 0 || height == 0) return cudaSuccess;
  if (width > to_pitch || width > from_pitch) return cudaErrorInvalidPitchValue;
  if (height > (size_t{1} << 40) / std::max(to_pitch, from_pitch)) return cudaErrorInvalidValue;
  const size_t to_span = (height - 1) * to_pitch + width, from_span = (height - 1) * from_pitch + width;
  if (const cudaError_t e = check_copy(to, from, 1, kind)) return e;
  if (!addressable(to, to_span) || !addressable(from, from_span)) return cudaErrorInvalidValue;
  if (Memory::instance().find(to) && !device_span(to, to_span)) return cudaErrorInvalidValue;
  if (Memory::instance().find(from) && !device_span(from, from_span)) return cudaErrorInvalidValue;
  if (!async) {
    if (const cudaError_t e = forbidden_in_capture(stream, true)) return e;
  }
  return submit(stream, cudaGraphNodeTypeMemcpy,
                [=] { return copy_rows(to, to_pitch, from, from_pitch, width, height); });
}

cudaError_t fill_2d(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream) {
  if (const cudaError_t e = sticky()) return e;
  if (!valid_stream(stream)) return cudaErrorInvalidResourceHandle;
  if (width == 0 || height == 0) return cudaSuccess;
  if (width > pitch) return cudaErrorInvalidPitchValue;
  if (height > (size_t{1} << 40) / pitch || !to || !device_span(to, (height - 1) * pitch + width))
    return cudaErrorInvalidValue;
  return submit(stream, cudaGraphNodeTypeMemset, [=] {
    look_at_copy("a fill", {{reinterpret_cast<uintptr_t>(to), width, pitch, height, true}});
    for (size_t row = 0; row < height; ++row) {
      std::memset(static_cast<char*>(to) + row * pitch, value, width);
      Memory::instance().mark_written(static_cast<char*>(to) + row * pitch, width);
    }
    return cudaSuccess;
  });
}

cudaError_t symbol_address(const void* symbol, uint8_t** address, size_t* bytes) {
  Runtime& r = Runtime::instance();
  DeviceSymbol found;
  {
    const std::lock_guard lock(r.mutex);
    const auto at = r.symbols.find(symbol);
    if (at == r.symbols.end()) return cudaErrorInvalidSymbol;
    found = at->second;
  }
  if (const cudaError_t e = found.library->load()) return e;
  const Variable* variable = found.library->module->variable(found.name);
  if (!variable || !found.library->module->addresses.contains(variable)) return cudaErrorInvalidSymbol;
  *address = found.library->module->addresses[variable];
  *bytes = variable->bytes;
  return cudaSuccess;
}

cudaError_t copy_symbol(const void* symbol, void* host, size_t bytes, size_t offset, cudaMemcpyKind kind,
                        cudaStream_t stream, bool to_symbol, bool async) {
  if (!symbol) return cudaErrorInvalidSymbol;
  uint8_t* address;
  size_t size;
  if (const cudaError_t e = symbol_address(symbol, &address, &size)) return e;
  if (offset > size || bytes > size - offset) return cudaErrorInvalidValue;
  if (kind == cudaMemcpyHostToHost || (to_symbol ? kind == cudaMemcpyDeviceToHost : kind == cudaMemcpyHostToDevice))
    return cudaErrorInvalidMemcpyDirection;
  return to_symbol ? copy(address + offset, host, bytes, kind == cudaMemcpyDefault ? kind : kind, stream, async)
                   : copy(host, address + offset, bytes, kind, stream, async);
}

cudaError_t allocate(void** p, size_t bytes, Allocation::Kind kind) {
  if (!p) return cudaErrorInvalidValue;
  if (const cudaError_t e = sticky()) return e;
  if (const cudaError_t e = forbidden_in_capture(nullptr, true)) return e;
  if (bytes == 0) {
    *p = nullptr;
    return kind == Allocation::Kind::kManaged ? cudaErrorInvalidValue : cudaSuccess;
  }
  *p = Memory::instance().allocate(bytes, kind);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream,
                   bool cooperative = false) {
  if (const cudaError_t e = sticky()) return e;
  if (!valid_stream(stream)) return cudaErrorInvalidResourceHandle;
  std::function<cudaError_t()> work;
  if (const cudaError_t e = prepare_launch(function, grid, block, arguments, shared, work, cooperative)) return e;
  if (Runtime& r = Runtime::instance(); r.expects_stream && r.expected_stream.load() != stream) {
    Finding f;
    f.rule = "stream", f.message = "a launch on another stream than the one expected";
    f.spot.kernel = find_kernel(function)->name;
    Findings::instance().add(std::move(f));
  }
  cudaKernelNodeParams parameters{};
  parameters.func = const_cast<void*>(function);
  parameters.gridDim = grid;
  parameters.blockDim = block;
  parameters.sharedMemBytes = static_cast<unsigned>(shared);
  return submit(stream, cudaGraphNodeTypeKernel, std::move(work), &parameters);
}

bool known_event(cudaEvent_t event) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  return r.events.contains(event);
}

int device_attribute(cudaDeviceAttr attribute, bool& known) {
  const DeviceLimits& d = device_limits();
  known = true;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return 1024;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 0x7fffffff;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return d.shared_per_block;
    case cudaDevAttrTotalConstantMemory:
      return 65536;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMaxPitch:
      return 0x7fffffff;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return d.registers_per_sm;
    case cudaDevAttrClockRate:
      return 1410000;
    case cudaDevAttrTextureAlignment:
    case cudaDevAttrSurfaceAlignment:
      return 512;
    case cudaDevAttrMultiProcessorCount:
      return d.sm_count;
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrPageableMemoryAccess:
    case cudaDevAttrConcurrentManagedAccess:
    case cudaDevAttrComputePreemptionSupported:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrHostRegisterSupported:
    case cudaDevAttrCanUseHostPointerForRegisteredMem:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported:
    case cudaDevAttrDirectManagedMemAccessFromHost:
    case cudaDevAttrHostNativeAtomicSupported:
    case cudaDevAttrPageableMemoryAccessUsesHostPageTables:
    case cudaDevAttrMemoryPoolsSupported:
      return 1;
    case cudaDevAttrAsyncEngineCount:
      return 3;
    case cudaDevAttrMemoryClockRate:
      return 1215000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrL2CacheSize:
      return 40 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return d.threads_per_sm;
    case cudaDevAttrComputeCapabilityMajor:
      return d.capability_major;
    case cudaDevAttrComputeCapabilityMinor:
      return d.capability_minor;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return d.shared_per_sm;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return d.shared_per_block_optin;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return d.blocks_per_sm;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return 1024;
    case cudaDevAttrSingleToDoublePrecisionPerfRatio:
      return 2;
    case cudaDevAttrMaxPersistingL2CacheSize:
      return 30 << 20;
    case cudaDevAttrMaxAccessPolicyWindowSize:
      return 128 << 20;
    default:
      break;
  }
  known = static_cast<int>(attribute) > 0 && attribute < cudaDevAttrMax;
  return 0;
}

struct ErrorText {
  cudaError_t code;
  const char* name;
  const char* text;
};
#define POP_ERROR(code, text) {code, #code, text}
constexpr ErrorText kErrors[] = {
    POP_ERROR(cudaSuccess, "no error"),
    POP_ERROR(cudaErrorInvalidValue, "invalid argument"),
    POP_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    POP_ERROR(cudaErrorInitializationError, "initialization error"),
    POP_ERROR(cudaErrorCudartUnloading, "driver shutting down"),
    POP_ERROR(cudaErrorProfilerDisabled, "profiler disabled while using external profiling tool"),
    POP_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    POP_ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    POP_ERROR(cudaErrorInvalidSymbol, "invalid device symbol"),
    POP_ERROR(cudaErrorInvalidHostPointer, "invalid host pointer"),
    POP_ERROR(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    POP_ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    POP_ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    POP_ERROR(cudaErrorMissingConfiguration, "__global__ function call is not configured"),
    POP_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    POP_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    POP_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    POP_ERROR(cudaErrorStartupFailure, "startup failure in cuda runtime"),
    POP_ERROR(cudaErrorInvalidKernelImage, "device kernel image is invalid"),
    POP_ERROR(cudaErrorDeviceUninitialized, "invalid device context"),
    POP_ERROR(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    POP_ERROR(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    POP_ERROR(cudaErrorUnsupportedLimit, "limit is not supported on this architecture"),
    POP_ERROR(cudaErrorPeerAccessUnsupported, "peer access is not supported between these two devices"),
    POP_ERROR(cudaErrorInvalidPtx, "a PTX JIT compilation failed"),
    POP_ERROR(cudaErrorJitCompilerNotFound, "PTX JIT compiler library not found"),
    POP_ERROR(cudaErrorUnsupportedPtxVersion, "the provided PTX was compiled with an unsupported toolchain."),
    POP_ERROR(cudaErrorInvalidSource, "device kernel image is invalid"),
    POP_ERROR(cudaErrorFileNotFound, "file not found"),
    POP_ERROR(cudaErrorSharedObjectSymbolNotFound, "shared object symbol not found"),
    POP_ERROR(cudaErrorOperatingSystem, "OS call failed or operation not supported on this OS"),
    POP_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    POP_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    POP_ERROR(cudaErrorSymbolNotFound, "named symbol not found"),
    POP_ERROR(cudaErrorNotReady, "device not ready"),
    POP_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    POP_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    POP_ERROR(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    POP_ERROR(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled"),
    POP_ERROR(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled"),
    POP_ERROR(cudaErrorSetOnActiveProcess, "cannot set while device is active in this process"),
    POP_ERROR(cudaErrorContextIsDestroyed, "context is destroyed"),
    POP_ERROR(cudaErrorAssert, "device-side assert triggered"),
    POP_ERROR(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    POP_ERROR(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    POP_ERROR(cudaErrorHardwareStackError, "hardware stack error"),
    POP_ERROR(cudaErrorIllegalInstruction, "an illegal instruction was encountered"),
    POP_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    POP_ERROR(cudaErrorInvalidAddressSpace, "operation not supported on global/shared address space"),
    POP_ERROR(cudaErrorInvalidPc, "invalid program counter"),
    POP_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    POP_ERROR(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    POP_ERROR(cudaErrorNotPermitted, "operation not permitted"),
    POP_ERROR(cudaErrorNotSupported, "operation not supported"),
    POP_ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    POP_ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    POP_ERROR(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    POP_ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    POP_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    POP_ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    POP_ERROR(cudaErrorStreamCaptureImplicit,
              "operation would make the legacy stream depend on a capturing blocking stream"),
    POP_ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    POP_ERROR(cudaErrorStreamCaptureWrongThread,
              "attempt to terminate a thread-local capture sequence from another thread"),
    POP_ERROR(cudaErrorTimeout, "wait operation timed out"),
    POP_ERROR(cudaErrorGraphExecUpdateFailure,
              "the graph update was not performed because it included changes which violated constraints specific to "
              "instantiated graph update"),
    POP_ERROR(cudaErrorInvalidClusterSize, "cluster misconfiguration"),
    POP_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef POP_ERROR

}  // namespace
}  // namespace pop::emulator

using namespace pop::emulator;

// Programs and their kernels.

POP_API void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const void* data;
    void* unused;
  };
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto library = std::make_unique<Library>();
  const auto* w = static_cast<const Wrapper*>(wrapper);
  if (w && w->magic == 0x466243b1)
    library->fatbinary = w->data;
  else
    library->error = cudaErrorInvalidKernelImage;
  Library* raw = library.get();
  r.libraries[raw] = std::move(library);
  return reinterpret_cast<void**>(raw);
}
POP_API void __cudaRegisterFatBinaryEnd(void**) {}
POP_API void __cudaUnregisterFatBinary(void** handle) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  Library* library = library_of(handle);
  if (!r.libraries.contains(library)) return;
  std::erase_if(r.functions, [&](const auto& f) { return f.second->library == library; });
  std::erase_if(r.symbols, [&](const auto& s) { return s.second.library == library; });
  std::erase_if(r.managed, [&](const auto& s) { return s.second.library == library; });
  r.libraries.erase(library);
}
POP_API void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, void*, void*, void*,
                                    void*, int*) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto kernel = std::make_unique<KernelHandle>();
  kernel->library = library_of(handle);
  kernel->name = name;
  r.functions[stub] = std::move(kernel);
}
POP_API void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t bytes, int, int) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  r.symbols[host] = {library_of(handle), name, bytes};
}
POP_API void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}
POP_API void __cudaRegisterManagedVar(void** handle, void** host, char*, const char* name, int, size_t bytes, int,
                                      int) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  r.managed.push_back({host, {library_of(handle), name, bytes}});
}
POP_API char __cudaInitModule(void** handle) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  for (auto& [host, symbol] : r.managed) {
    if (symbol.library != library_of(handle) || symbol.library->load()) continue;
    const Variable* variable = symbol.library->module->variable(symbol.name);
    if (!variable) continue;
    *host = symbol.library->module->addresses[variable];
    r.symbols[*host] = symbol;
    r.symbols[static_cast<void*>(host)] = symbol;
  }
  return 1;
}
POP_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  KernelHandle* handle = find_kernel(stub);
  if (!kernel) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(handle);
  return cudaSuccess;
}
POP_API cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* stub) { return __cudaGetKernel(kernel, stub); }
POP_API cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* stub) {
  return __cudaGetKernel(reinterpret_cast<cudaKernel_t*>(function), stub);
}

POP_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
POP_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return record(cudaErrorMissingConfiguration);
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
POP_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                       cudaStream_t stream) {
  return record(launch(kernel, grid, block, arguments, shared, stream));
}
POP_API cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                            cudaStream_t stream) {
  return record(launch(kernel, grid, block, arguments, shared, stream));
}
POP_API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                     cudaStream_t stream) {
  return record(launch(function, grid, block, arguments, shared, stream));
}
POP_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (!config || (config->numAttrs && !config->attrs)) return record(cudaErrorInvalidValue);
  for (unsigned k = 0; k < config->numAttrs; ++k) {
    const cudaLaunchAttribute& a = config->attrs[k];
    if (a.id == cudaLaunchAttributeClusterDimension &&
        uint64_t{a.val.clusterDim.x} * a.val.clusterDim.y * a.val.clusterDim.z != 1) {
      say("launches in clusters are not supported");
      return record(cudaErrorNotSupported);
    }
    if (a.id == cudaLaunchAttributeCooperative && a.val.cooperative)
      return cudaLaunchCooperativeKernel(function, config->gridDim, config->blockDim, arguments,
                                         config->dynamicSmemBytes, config->stream);
  }
  return record(
      launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream));
}
POP_API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                                                size_t shared, cudaStream_t stream) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  const int fits = occupancy(*handle->kernel, block.x * block.y * block.z, static_cast<uint32_t>(shared));
  if (uint64_t{grid.x} * grid.y * grid.z >
      static_cast<uint64_t>(fits) * static_cast<uint64_t>(device_limits().sm_count))
    return record(cudaErrorCooperativeLaunchTooLarge);
  return record(launch(function, grid, block, arguments, shared, stream, true));
}
POP_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (!function) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  return record(submit(stream, cudaGraphNodeTypeHost, [=] { return function(data), cudaSuccess; }));
}
POP_API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                                          unsigned flags) {
  if (!callback || flags) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  return record(submit(stream, cudaGraphNodeTypeHost, [=] { return callback(stream, sticky(), data), cudaSuccess; }));
}

POP_API cudaError_t cudaLibraryLoadData(cudaLibrary_t* out, const void* code, cudaJitOption*, void**, unsigned,
                                        cudaLibraryOption*, void**, unsigned) {
  if (!out || !code) return record(cudaErrorInvalidValue);
  auto library = std::make_unique<Library>();
  bool text = false;
  if (!guarded([&] {
        if (is_fatbinary(code))
          library->fatbinary = code;
        else
          text = true, library->text = static_cast<const char*>(code);
      }))
    return record(cudaErrorInvalidValue);
  cudaError_t error = cudaSuccess;
  if (!guarded([&] { error = library->load(); })) error = cudaErrorInvalidKernelImage;
  if (!error && text) {
    try {
      library->module->decode_all();
    } catch (const std::exception& problem) {
      say(problem.what());
      error = cudaErrorInvalidPtx;
    }
  }
  if (error) return record(error);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  *out = reinterpret_cast<cudaLibrary_t>(library.get());
  r.libraries[library.get()] = std::move(library);
  return cudaSuccess;
}
namespace {
Library* known_library(cudaLibrary_t library) {
  Runtime& r = Runtime::instance();
  const auto at = r.libraries.find(library);
  return at == r.libraries.end() ? nullptr : at->second.get();
}
}  // namespace
POP_API cudaError_t cudaLibraryUnload(cudaLibrary_t library) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!known_library(library)) return record(cudaErrorInvalidResourceHandle);
  std::erase_if(r.kernels, [&](const auto& k) { return k.second->library == reinterpret_cast<Library*>(library); });
  r.libraries.erase(library);
  return cudaSuccess;
}
POP_API cudaError_t cudaLibraryGetKernel(cudaKernel_t* out, cudaLibrary_t library, const char* name) {
  if (!out || !name) return record(cudaErrorInvalidValue);
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  Library* l = known_library(library);
  if (!l) return record(cudaErrorInvalidResourceHandle);
  auto handle = std::make_unique<KernelHandle>();
  handle->library = l;
  handle->name = name;
  if (const cudaError_t e = handle->resolve())
    return record(e == cudaErrorInvalidDeviceFunction ? cudaErrorSymbolNotFound : e);
  *out = reinterpret_cast<cudaKernel_t>(handle.get());
  r.kernels[handle.get()] = std::move(handle);
  return cudaSuccess;
}
POP_API cudaError_t cudaLibraryGetGlobal(void** address, size_t* bytes, cudaLibrary_t library, const char* name) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  Library* l = known_library(library);
  if (!l || !name) return record(l ? cudaErrorInvalidValue : cudaErrorInvalidResourceHandle);
  const Variable* variable = l->module->variable(name);
  if (!variable || !l->module->addresses.contains(variable)) return record(cudaErrorSymbolNotFound);
  if (address) *address = l->module->addresses[variable];
  if (bytes) *bytes = variable->bytes;
  return cudaSuccess;
}
POP_API cudaError_t cudaLibraryGetManaged(void** address, size_t* bytes, cudaLibrary_t library, const char* name) {
  return cudaLibraryGetGlobal(address, bytes, library, name);
}
POP_API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute, int value,
                                                    int device) {
  if (device) return record(cudaErrorInvalidDevice);
  return cudaFuncSetAttribute(kernel, attribute, value);
}
POP_API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                     cudaDriverEntryPointQueryResult* status) {
  if (!symbol || !function) return record(cudaErrorInvalidValue);
  *function = nullptr;  // there is no driver interface yet: tensor maps come with the asynchronous engines
  if (status) *status = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

POP_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  KernelHandle* handle = find_kernel(function);
  if (!out) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  const Kernel& k = *handle->kernel;
  const DeviceLimits& d = device_limits();
  *out = {};
  out->sharedSizeBytes = k.static_shared;
  out->localSizeBytes = k.local_bytes;
  out->maxThreadsPerBlock = k.max_threads;
  out->numRegs = k.registers;
  out->ptxVersion = out->binaryVersion = d.capability_major * 10 + d.capability_minor;
  out->maxDynamicSharedSizeBytes = k.max_dynamic_shared;
  out->preferredShmemCarveout = -1;
  return cudaSuccess;
}
POP_API cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 ||
        value + static_cast<int64_t>(handle->kernel->static_shared) > device_limits().shared_per_block_optin)
      return record(cudaErrorInvalidValue);
    handle->kernel->max_dynamic_shared = value;
    return cudaSuccess;
  }
  return attribute >= cudaFuncAttributePreferredSharedMemoryCarveout && attribute < cudaFuncAttributeMax
             ? cudaSuccess
             : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaFuncSetCacheConfig(const void* function, cudaFuncCache) {
  return record(find_kernel(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
POP_API cudaError_t cudaFuncGetName(const char** name, const void* function) {
  KernelHandle* handle = find_kernel(function);
  if (!name) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  *name = handle->name.c_str();
  return cudaSuccess;
}
POP_API cudaError_t cudaFuncGetParamInfo(const void* function, size_t index, size_t* offset, size_t* bytes) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  if (index >= handle->kernel->parameters.size()) return record(cudaErrorInvalidValue);
  if (offset) *offset = handle->kernel->parameters[index].offset;
  if (bytes) *bytes = handle->kernel->parameters[index].bytes;
  return cudaSuccess;
}
POP_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
                                                                           int threads, size_t shared, unsigned) {
  KernelHandle* handle = find_kernel(function);
  if (!blocks || threads <= 0) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  *blocks = shared > (1u << 30)
                ? 0
                : occupancy(*handle->kernel, static_cast<uint32_t>(threads), static_cast<uint32_t>(shared));
  return cudaSuccess;
}
POP_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                                  size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
POP_API cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* function, int blocks, int) {
  KernelHandle* handle = find_kernel(function);
  if (!bytes || blocks <= 0) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  const int64_t per =
      device_limits().shared_per_sm / blocks - 1024 - static_cast<int64_t>(handle->kernel->static_shared);
  *bytes = static_cast<size_t>(std::clamp<int64_t>(per, 0, device_limits().shared_per_block_optin));
  return cudaSuccess;
}

// Errors.

POP_API cudaError_t cudaGetLastError() {
  const cudaError_t error = sticky() ? sticky() : last_error;
  last_error = cudaSuccess;
  return error;
}
POP_API cudaError_t cudaPeekAtLastError() { return sticky() ? sticky() : last_error; }
POP_API const char* cudaGetErrorName(cudaError_t code) {
  for (const ErrorText& e : kErrors)
    if (e.code == code) return e.name;
  return "unrecognized error code";
}
POP_API const char* cudaGetErrorString(cudaError_t code) {
  for (const ErrorText& e : kErrors)
    if (e.code == code) return e.text;
  return "unrecognized error code";
}

// The device.

POP_API cudaError_t cudaGetDeviceCount(int* count) {
  return count ? (*count = 1, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaGetDevice(int* device) {
  return device ? (*device = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaSetDevice(int device) { return record(device ? cudaErrorInvalidDevice : sticky()); }
POP_API cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return record(device ? cudaErrorInvalidDevice : cudaSuccess);
}
POP_API cudaError_t cudaSetValidDevices(int*, int) { return cudaSuccess; }
POP_API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
POP_API cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  return flags ? (*flags = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaChooseDevice(int* device, const cudaDeviceProp*) {
  return device ? (*device = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!value) return record(cudaErrorInvalidValue);
  if (device) return record(cudaErrorInvalidDevice);
  bool known;
  *value = device_attribute(attribute, known);
  return record(known ? cudaSuccess : cudaErrorInvalidValue);
}
POP_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  if (!p) return record(cudaErrorInvalidValue);
  if (device) return record(cudaErrorInvalidDevice);
  const DeviceLimits& d = device_limits();
  *p = {};
  std::snprintf(p->name, sizeof(p->name), "%s", d.name);
  p->totalGlobalMem = Memory::instance().capacity();
  p->sharedMemPerBlock = static_cast<size_t>(d.shared_per_block);
  p->regsPerBlock = p->regsPerMultiprocessor = d.registers_per_sm;
  p->warpSize = 32;
  p->memPitch = 0x7fffffff;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = d.capability_major, p->minor = d.capability_minor;
  p->textureAlignment = 512, p->texturePitchAlignment = 32;
  p->multiProcessorCount = d.sm_count;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = p->concurrentManagedAccess =
      p->pageableMemoryAccess = 1;
  p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = p->computePreemptionSupported =
      p->cooperativeLaunch = p->hostRegisterSupported = 1;
  p->canUseHostPointerForRegisteredMem = p->hostNativeAtomicSupported = p->memoryPoolsSupported =
      p->pageableMemoryAccessUsesHostPageTables = p->directManagedMemAccessFromHost = 1;
  p->asyncEngineCount = 3;
  p->memoryBusWidth = 5120;
  p->l2CacheSize = 40 << 20, p->persistingL2CacheMaxSize = 30 << 20, p->accessPolicyMaxWindowSize = 128 << 20;
  p->maxThreadsPerMultiProcessor = d.threads_per_sm;
  p->sharedMemPerMultiprocessor = static_cast<size_t>(d.shared_per_sm);
  p->sharedMemPerBlockOptin = static_cast<size_t>(d.shared_per_block_optin);
  p->maxBlocksPerMultiProcessor = d.blocks_per_sm;
  p->reservedSharedMemPerBlock = 1024;
  return cudaSuccess;
}
POP_API cudaError_t cudaDeviceSynchronize() {
  StreamOrder::instance().host_waits_for_all();
  if (const cudaError_t e = sticky()) return record(e);
  return record(forbidden_in_capture(nullptr, true));
}
POP_API cudaError_t cudaDeviceReset() {
  Runtime::instance().sticky = cudaSuccess;
  last_error = cudaSuccess;
  return cudaSuccess;
}
POP_API cudaError_t cudaDeviceSetLimit(cudaLimit limit, size_t value) {
  if (limit == cudaLimitStackSize) {
    if (value > (8u << 20)) return record(cudaErrorInvalidValue);
    set_stack_limit(static_cast<uint32_t>(value));
  }
  return record(static_cast<int>(limit) < 0 || limit > cudaLimitPersistingL2CacheSize ? cudaErrorUnsupportedLimit
                                                                                      : cudaSuccess);
}
POP_API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
  if (!value) return record(cudaErrorInvalidValue);
  switch (limit) {
    case cudaLimitStackSize:
      *value = stack_limit();
      return cudaSuccess;
    case cudaLimitPrintfFifoSize:
      *value = 7 << 20;
      return cudaSuccess;
    case cudaLimitMallocHeapSize:
      *value = 8 << 20;
      return cudaSuccess;
    default:
      return record(cudaErrorUnsupportedLimit);
  }
}
POP_API cudaError_t cudaDeviceGetCacheConfig(cudaFuncCache* config) {
  return config ? (*config = cudaFuncCachePreferNone, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
POP_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
POP_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  return can ? (*can = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  if (!text || bytes < 13) return record(cudaErrorInvalidValue);
  if (device) return record(cudaErrorInvalidDevice);
  std::snprintf(text, static_cast<size_t>(bytes), "0000:00:00.0");
  return cudaSuccess;
}
POP_API cudaError_t cudaCtxResetPersistingL2Cache() { return cudaSuccess; }
POP_API cudaError_t cudaDriverGetVersion(int* version) {
  return version ? (*version = 13000, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaRuntimeGetVersion(int* version) {
  return version ? (*version = 13000, cudaSuccess) : record(cudaErrorInvalidValue);
}
POP_API cudaError_t cudaProfilerStart() { return cudaSuccess; }
POP_API cudaError_t cudaProfilerStop() { return cudaSuccess; }

// Memory.

POP_API cudaError_t cudaMalloc(void** p, size_t bytes) { return record(allocate(p, bytes, Allocation::Kind::kDevice)); }
POP_API cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned flags) {
  if (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost) return record(cudaErrorInvalidValue);
  return record(allocate(p, bytes, Allocation::Kind::kManaged));
}
POP_API cudaError_t cudaMallocHost(void** p, size_t bytes) {
  return record(allocate(p, bytes, Allocation::Kind::kPinned));
}
POP_API cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags) {
  return record(flags > 7 ? cudaErrorInvalidValue : allocate(p, bytes, Allocation::Kind::kPinned));
}
POP_API cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  if (!pitch) return record(cudaErrorInvalidValue);
  *pitch = (width + 511) / 512 * 512;
  if (height && *pitch > (size_t{1} << 44) / height) return record(cudaErrorMemoryAllocation);
  return record(allocate(p, *pitch * height, Allocation::Kind::kDevice));
}
POP_API cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (capturing(stream)) return record(forbidden_in_capture(stream, false));
  return record(allocate(p, bytes, Allocation::Kind::kDevice));
}
POP_API cudaError_t cudaFree(void* p) {
  if (const cudaError_t e = sticky()) return record(e);
  if (!p) return cudaSuccess;
  if (const cudaError_t e = forbidden_in_capture(nullptr, true)) return record(e);
  const auto a = Memory::instance().find(p);
  if (!a || a->kind == Allocation::Kind::kVariable) return record(cudaErrorInvalidValue);
  StreamOrder::instance().host_waits_for_all();
  return record(Memory::instance().release(p) ? cudaSuccess : cudaErrorInvalidValue);
}
POP_API cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (capturing(stream)) return record(forbidden_in_capture(stream, false));
  return cudaFree(p);
}
POP_API cudaError_t cudaFreeHost(void* p) {
  return record(!p || Memory::instance().release(p, true) ? cudaSuccess : cudaErrorInvalidValue);
}
POP_API cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  if (!p || !bytes) return record(cudaErrorInvalidValue);
  return record(Memory::instance().add(p, bytes, Allocation::Kind::kRegistered, "")
                    ? cudaSuccess
                    : cudaErrorHostMemoryAlreadyRegistered);
}
POP_API cudaError_t cudaHostUnregister(void* p) {
  return record(Memory::instance().remove(p) ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}
POP_API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  if (!device || flags) return record(cudaErrorInvalidValue);
  if (!Memory::instance().find(host)) return record(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}
POP_API cudaError_t cudaHostGetFlags(unsigned* flags, void* host) {
  const auto a = Memory::instance().find(host);
  if (!flags || !a) return record(cudaErrorInvalidValue);
  *flags = cudaHostAllocMapped;
  return cudaSuccess;
}
POP_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const size_t capacity = Memory::instance().capacity();
  if (free) *free = capacity - Memory::instance().used();
  if (total) *total = capacity;
  return cudaSuccess;
}
POP_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p) {
  if (!out) return record(cudaErrorInvalidValue);
  *out = {};
  const auto a = Memory::instance().find(p);
  out->device = a ? 0 : -2;
  if (!a) {
    out->type = cudaMemoryTypeUnregistered;
    out->hostPointer = const_cast<void*>(p);
    return cudaSuccess;
  }
  const bool host = a->kind == Allocation::Kind::kPinned || a->kind == Allocation::Kind::kRegistered;
  out->type = host                                    ? cudaMemoryTypeHost
              : a->kind == Allocation::Kind::kManaged ? cudaMemoryTypeManaged
                                                      : cudaMemoryTypeDevice;
  out->devicePointer = const_cast<void*>(p);
  out->hostPointer = out->type == cudaMemoryTypeDevice ? nullptr : const_cast<void*>(p);
  return cudaSuccess;
}
POP_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return record(copy(to, from, bytes, kind, nullptr, false));
}
POP_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                    cudaStream_t stream) {
  return record(copy(to, from, bytes, kind, stream, true));
}
POP_API cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
  return record(copy(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr, false));
}
POP_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return record(copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream, true));
}
POP_API cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                 size_t height, cudaMemcpyKind kind) {
  return record(copy_2d(to, to_pitch, from, from_pitch, width, height, kind, nullptr, false));
}
POP_API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                      size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return record(copy_2d(to, to_pitch, from, from_pitch, width, height, kind, stream, true));
}
POP_API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                                       cudaMemcpyKind kind) {
  return record(copy_symbol(symbol, const_cast<void*>(from), bytes, offset, kind, nullptr, true, false));
}
POP_API cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                         cudaMemcpyKind kind) {
  return record(copy_symbol(symbol, to, bytes, offset, kind, nullptr, false, false));
}
POP_API cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                            cudaMemcpyKind kind, cudaStream_t stream) {
  return record(copy_symbol(symbol, const_cast<void*>(from), bytes, offset, kind, stream, true, true));
}
POP_API cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset,
                                              cudaMemcpyKind kind, cudaStream_t stream) {
  return record(copy_symbol(symbol, to, bytes, offset, kind, stream, false, true));
}
POP_API cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  uint8_t* found;
  size_t bytes;
  if (!address) return record(cudaErrorInvalidValue);
  if (const cudaError_t e = symbol_address(symbol, &found, &bytes)) return record(e);
  *address = found;
  return cudaSuccess;
}
POP_API cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  uint8_t* found;
  if (!bytes) return record(cudaErrorInvalidValue);
  return record(symbol_address(symbol, &found, bytes));
}
POP_API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (const cudaError_t e = forbidden_in_capture(nullptr, true)) return record(e);
  return record(fill_2d(to, bytes, value, bytes, 1, nullptr));
}
POP_API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return record(fill_2d(to, bytes, value, bytes, 1, stream));
}
POP_API cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  return record(fill_2d(to, pitch, value, width, height, nullptr));
}
POP_API cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height,
                                      cudaStream_t stream) {
  return record(fill_2d(to, pitch, value, width, height, stream));
}
POP_API cudaError_t cudaMemAdvise(const void* p, size_t bytes, cudaMemoryAdvise, cudaMemLocation) {
  return record(device_span(p, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}
POP_API cudaError_t cudaMemPrefetchAsync(const void* p, size_t bytes, cudaMemLocation, unsigned, cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  return record(device_span(p, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}

// Streams.

POP_API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int priority) {
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
POP_API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}
POP_API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }
POP_API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.streams.erase(stream)) return record(cudaErrorInvalidResourceHandle);
  if (stream->capture) stream->capture->invalid = true;
  delete stream;
  return cudaSuccess;
}
POP_API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (const cudaError_t e = sticky()) return record(e);
  StreamOrder::instance().host_waits(StreamOrder::instance().at(stream_number(stream)));
  return record(forbidden_in_capture(stream, false));
}
POP_API cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
POP_API cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  if (!flags) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *flags = reinterpret_cast<uintptr_t>(stream) <= 2 ? 0 : stream->flags;
  return cudaSuccess;
}
POP_API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  if (!priority) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *priority = reinterpret_cast<uintptr_t>(stream) <= 2 ? 0 : stream->priority;
  return cudaSuccess;
}
POP_API cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  if (!id) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *id = reinterpret_cast<uintptr_t>(stream) <= 2 ? 0 : stream->id;
  return cudaSuccess;
}
POP_API cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  if (!device) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  *device = 0;
  return cudaSuccess;
}
POP_API cudaError_t cudaStreamSetAttribute(cudaStream_t stream, cudaStreamAttrID, const cudaStreamAttrValue* value) {
  return record(!value ? cudaErrorInvalidValue : valid_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}
POP_API cudaError_t cudaStreamAttachMemAsync(cudaStream_t stream, void*, size_t, unsigned) {
  return record(valid_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
}

// Events.

POP_API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned flags) {
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
POP_API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }
POP_API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!r.events.erase(event)) return record(cudaErrorInvalidResourceHandle);
  delete event;
  return cudaSuccess;
}
POP_API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
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
POP_API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
POP_API cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (!known_event(event)) return record(cudaErrorInvalidResourceHandle);
  if (event->capture) {
    event->capture->invalid = true;
    return record(cudaErrorCapturedEvent);
  }
  StreamOrder::instance().host_waits(event->done);
  return record(sticky());
}
POP_API cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }
POP_API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  if (!ms) return record(cudaErrorInvalidValue);
  if (!known_event(start) || !known_event(end)) return record(cudaErrorInvalidResourceHandle);
  if (!start->recorded || !end->recorded || ((start->flags | end->flags) & cudaEventDisableTiming))
    return record(cudaErrorInvalidResourceHandle);
  if (const cudaError_t e = sticky()) return record(e);
  *ms = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}
