// The device: its attributes and limits.
#include <cstdio>
#include <cstring>

#include "memory.h"
#include "runtime/state.h"
#include "schedule/stack.h"

namespace ptx_emulator {

namespace {

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

}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API cudaError_t cudaGetDeviceCount(int* count) {
  return count ? (*count = 1, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaGetDevice(int* device) {
  return device ? (*device = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaSetDevice(int device) { return record(device ? cudaErrorInvalidDevice : sticky()); }
PTX_API cudaError_t cudaInitDevice(int device, unsigned, unsigned) {
  return record(device ? cudaErrorInvalidDevice : cudaSuccess);
}
PTX_API cudaError_t cudaSetValidDevices(int*, int) { return cudaSuccess; }
PTX_API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
PTX_API cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  return flags ? (*flags = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaChooseDevice(int* device, const cudaDeviceProp*) {
  return device ? (*device = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (!value) return record(cudaErrorInvalidValue);
  if (device) return record(cudaErrorInvalidDevice);
  bool known;
  *value = device_attribute(attribute, known);
  return record(known ? cudaSuccess : cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
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
PTX_API cudaError_t cudaDeviceSynchronize() {
  StreamOrder::instance().host_waits_for_all();
  if (const cudaError_t e = sticky()) return record(e);
  return record(forbidden_in_capture(nullptr, true));
}
PTX_API cudaError_t cudaDeviceReset() {
  Runtime::instance().sticky = cudaSuccess;
  last_error() = cudaSuccess;
  return cudaSuccess;
}
PTX_API cudaError_t cudaDeviceSetLimit(cudaLimit limit, size_t value) {
  if (limit == cudaLimitStackSize) {
    if (value > (8u << 20)) return record(cudaErrorInvalidValue);
    set_stack_limit(static_cast<uint32_t>(value));
  }
  return record(static_cast<int>(limit) < 0 || limit > cudaLimitPersistingL2CacheSize ? cudaErrorUnsupportedLimit
                                                                                      : cudaSuccess);
}
PTX_API cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
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
PTX_API cudaError_t cudaDeviceGetCacheConfig(cudaFuncCache* config) {
  return config ? (*config = cudaFuncCachePreferNone, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return cudaSuccess; }
PTX_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
PTX_API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  return can ? (*can = 0, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  if (!text || bytes < 13) return record(cudaErrorInvalidValue);
  if (device) return record(cudaErrorInvalidDevice);
  std::snprintf(text, static_cast<size_t>(bytes), "0000:00:00.0");
  return cudaSuccess;
}
PTX_API cudaError_t cudaCtxResetPersistingL2Cache() { return cudaSuccess; }
PTX_API cudaError_t cudaDriverGetVersion(int* version) {
  return version ? (*version = 13000, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaRuntimeGetVersion(int* version) {
  return version ? (*version = 13000, cudaSuccess) : record(cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaProfilerStart() { return cudaSuccess; }
PTX_API cudaError_t cudaProfilerStop() { return cudaSuccess; }
