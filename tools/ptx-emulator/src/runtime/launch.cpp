// Launches: kernels and host functions, and what fits on a multiprocessor.
#include "runtime/launch.h"

#include <algorithm>
#include <cstring>

#include "checks/settings.h"
#include "findings.h"
#include "guarded.h"
#include "runtime/programs.h"

namespace ptx_emulator {

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
  if (shared > static_cast<size_t>(kernel.max_dynamic_shared) ||
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
    if (launch_settings().checks & kCheckRace) request->concurrent = StreamOrder::instance().concurrent();
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

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

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

}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
PTX_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return record(cudaErrorMissingConfiguration);
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
PTX_API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                       cudaStream_t stream) {
  return record(launch(kernel, grid, block, arguments, shared, stream));
}
PTX_API cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                            cudaStream_t stream) {
  return record(launch(kernel, grid, block, arguments, shared, stream));
}
PTX_API cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                     cudaStream_t stream) {
  return record(launch(function, grid, block, arguments, shared, stream));
}
PTX_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
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
PTX_API cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments,
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
PTX_API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (!function) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  return record(submit(stream, cudaGraphNodeTypeHost, [=] { return function(data), cudaSuccess; }));
}
PTX_API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data,
                                          unsigned flags) {
  if (!callback || flags) return record(cudaErrorInvalidValue);
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  return record(submit(stream, cudaGraphNodeTypeHost, [=] { return callback(stream, sticky(), data), cudaSuccess; }));
}

PTX_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function,
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
PTX_API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                                  size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
PTX_API cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* function, int blocks, int) {
  KernelHandle* handle = find_kernel(function);
  if (!bytes || blocks <= 0) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  const int64_t per =
      device_limits().shared_per_sm / blocks - 1024 - static_cast<int64_t>(handle->kernel->static_shared);
  *bytes = static_cast<size_t>(std::clamp<int64_t>(per, 0, device_limits().shared_per_block_optin));
  return cudaSuccess;
}
