// Programs and their kernels: what nvcc's start-up code registers, and libraries loaded by hand.
#include "runtime/programs.h"

#include "fatbinary.h"
#include "guarded.h"

namespace ptx_emulator {

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

namespace {

Library* library_of(void** handle) { return reinterpret_cast<Library*>(handle); }

}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API void** __cudaRegisterFatBinary(void* wrapper) {
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
PTX_API void __cudaRegisterFatBinaryEnd(void**) {}
PTX_API void __cudaUnregisterFatBinary(void** handle) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  Library* library = library_of(handle);
  if (!r.libraries.contains(library)) return;
  std::erase_if(r.functions, [&](const auto& f) { return f.second->library == library; });
  std::erase_if(r.symbols, [&](const auto& s) { return s.second.library == library; });
  std::erase_if(r.managed, [&](const auto& s) { return s.second.library == library; });
  r.libraries.erase(library);
}
PTX_API void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, void*, void*, void*,
                                    void*, int*) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  auto kernel = std::make_unique<KernelHandle>();
  kernel->library = library_of(handle);
  kernel->name = name;
  r.functions[stub] = std::move(kernel);
}
PTX_API void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t bytes, int, int) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  r.symbols[host] = {library_of(handle), name, bytes};
}
PTX_API void __cudaRegisterHostVar(void**, const char*, char*, size_t) {}
PTX_API void __cudaRegisterManagedVar(void** handle, void** host, char*, const char* name, int, size_t bytes, int,
                                      int) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  r.managed.push_back({host, {library_of(handle), name, bytes}});
}
PTX_API char __cudaInitModule(void** handle) {
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
PTX_API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  KernelHandle* handle = find_kernel(stub);
  if (!kernel) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  *kernel = reinterpret_cast<cudaKernel_t>(handle);
  return cudaSuccess;
}
PTX_API cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* stub) { return __cudaGetKernel(kernel, stub); }
PTX_API cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* stub) {
  return __cudaGetKernel(reinterpret_cast<cudaKernel_t*>(function), stub);
}

PTX_API cudaError_t cudaLibraryLoadData(cudaLibrary_t* out, const void* code, cudaJitOption*, void**, unsigned,
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
PTX_API cudaError_t cudaLibraryUnload(cudaLibrary_t library) {
  Runtime& r = Runtime::instance();
  const std::lock_guard lock(r.mutex);
  if (!known_library(library)) return record(cudaErrorInvalidResourceHandle);
  std::erase_if(r.kernels, [&](const auto& k) { return k.second->library == reinterpret_cast<Library*>(library); });
  r.libraries.erase(library);
  return cudaSuccess;
}
PTX_API cudaError_t cudaLibraryGetKernel(cudaKernel_t* out, cudaLibrary_t library, const char* name) {
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
PTX_API cudaError_t cudaLibraryGetGlobal(void** address, size_t* bytes, cudaLibrary_t library, const char* name) {
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
PTX_API cudaError_t cudaLibraryGetManaged(void** address, size_t* bytes, cudaLibrary_t library, const char* name) {
  return cudaLibraryGetGlobal(address, bytes, library, name);
}
PTX_API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute, int value,
                                                    int device) {
  if (device) return record(cudaErrorInvalidDevice);
  return cudaFuncSetAttribute(kernel, attribute, value);
}

PTX_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
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
PTX_API cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
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
PTX_API cudaError_t cudaFuncSetCacheConfig(const void* function, cudaFuncCache) {
  return record(find_kernel(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction);
}
PTX_API cudaError_t cudaFuncGetName(const char** name, const void* function) {
  KernelHandle* handle = find_kernel(function);
  if (!name) return record(cudaErrorInvalidValue);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  *name = handle->name.c_str();
  return cudaSuccess;
}
PTX_API cudaError_t cudaFuncGetParamInfo(const void* function, size_t index, size_t* offset, size_t* bytes) {
  KernelHandle* handle = find_kernel(function);
  if (!handle) return record(cudaErrorInvalidDeviceFunction);
  if (const cudaError_t e = handle->resolve()) return record(e);
  if (index >= handle->kernel->parameters.size()) return record(cudaErrorInvalidValue);
  if (offset) *offset = handle->kernel->parameters[index].offset;
  if (bytes) *bytes = handle->kernel->parameters[index].bytes;
  return cudaSuccess;
}
