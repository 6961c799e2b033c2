// Memory: allocations, copies, fills, symbols.
#include "memory.h"

#include <algorithm>
#include <cstring>

#include "checks/transfers.h"
#include "guarded.h"
#include "runtime/programs.h"

namespace ptx_emulator {

namespace {

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
  check_transfer("a copy", {{reinterpret_cast<uintptr_t>(from), width, from_pitch, height, false},
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
    check_transfer("a fill", {{reinterpret_cast<uintptr_t>(to), width, pitch, height, true}});
    for (size_t row = 0; row < height; ++row) {
      std::memset(static_cast<char*>(to) + row * pitch, value, width);
      Memory::instance().mark_written(static_cast<char*>(to) + row * pitch, width);
    }
    return cudaSuccess;
  });
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

}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API cudaError_t cudaMalloc(void** p, size_t bytes) { return record(allocate(p, bytes, Allocation::Kind::kDevice)); }
PTX_API cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned flags) {
  if (flags != cudaMemAttachGlobal && flags != cudaMemAttachHost) return record(cudaErrorInvalidValue);
  return record(allocate(p, bytes, Allocation::Kind::kManaged));
}
PTX_API cudaError_t cudaMallocHost(void** p, size_t bytes) {
  return record(allocate(p, bytes, Allocation::Kind::kPinned));
}
PTX_API cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned flags) {
  return record(flags > 7 ? cudaErrorInvalidValue : allocate(p, bytes, Allocation::Kind::kPinned));
}
PTX_API cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  if (!pitch) return record(cudaErrorInvalidValue);
  *pitch = (width + 511) / 512 * 512;
  if (height && *pitch > (size_t{1} << 44) / height) return record(cudaErrorMemoryAllocation);
  return record(allocate(p, *pitch * height, Allocation::Kind::kDevice));
}
PTX_API cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (capturing(stream)) return record(forbidden_in_capture(stream, false));
  return record(allocate(p, bytes, Allocation::Kind::kDevice));
}
PTX_API cudaError_t cudaFree(void* p) {
  if (const cudaError_t e = sticky()) return record(e);
  if (!p) return cudaSuccess;
  if (const cudaError_t e = forbidden_in_capture(nullptr, true)) return record(e);
  const auto a = Memory::instance().find(p);
  if (!a || a->kind == Allocation::Kind::kVariable) return record(cudaErrorInvalidValue);
  StreamOrder::instance().host_waits_for_all();
  return record(Memory::instance().release(p) ? cudaSuccess : cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaFreeAsync(void* p, cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  if (capturing(stream)) return record(forbidden_in_capture(stream, false));
  return cudaFree(p);
}
PTX_API cudaError_t cudaFreeHost(void* p) {
  return record(!p || Memory::instance().release(p, true) ? cudaSuccess : cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  if (!p || !bytes) return record(cudaErrorInvalidValue);
  return record(Memory::instance().add(p, bytes, Allocation::Kind::kRegistered, "")
                    ? cudaSuccess
                    : cudaErrorHostMemoryAlreadyRegistered);
}
PTX_API cudaError_t cudaHostUnregister(void* p) {
  return record(Memory::instance().remove(p) ? cudaSuccess : cudaErrorHostMemoryNotRegistered);
}
PTX_API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  if (!device || flags) return record(cudaErrorInvalidValue);
  if (!Memory::instance().find(host)) return record(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}
PTX_API cudaError_t cudaHostGetFlags(unsigned* flags, void* host) {
  const auto a = Memory::instance().find(host);
  if (!flags || !a) return record(cudaErrorInvalidValue);
  *flags = cudaHostAllocMapped;
  return cudaSuccess;
}
PTX_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const size_t capacity = Memory::instance().capacity();
  if (free) *free = capacity - Memory::instance().used();
  if (total) *total = capacity;
  return cudaSuccess;
}
PTX_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* p) {
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
PTX_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return record(copy(to, from, bytes, kind, nullptr, false));
}
PTX_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                    cudaStream_t stream) {
  return record(copy(to, from, bytes, kind, stream, true));
}
PTX_API cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
  return record(copy(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr, false));
}
PTX_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return record(copy(to, from, bytes, cudaMemcpyDeviceToDevice, stream, true));
}
PTX_API cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                 size_t height, cudaMemcpyKind kind) {
  return record(copy_2d(to, to_pitch, from, from_pitch, width, height, kind, nullptr, false));
}
PTX_API cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                      size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  return record(copy_2d(to, to_pitch, from, from_pitch, width, height, kind, stream, true));
}
PTX_API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                                       cudaMemcpyKind kind) {
  return record(copy_symbol(symbol, const_cast<void*>(from), bytes, offset, kind, nullptr, true, false));
}
PTX_API cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset,
                                         cudaMemcpyKind kind) {
  return record(copy_symbol(symbol, to, bytes, offset, kind, nullptr, false, false));
}
PTX_API cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                            cudaMemcpyKind kind, cudaStream_t stream) {
  return record(copy_symbol(symbol, const_cast<void*>(from), bytes, offset, kind, stream, true, true));
}
PTX_API cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset,
                                              cudaMemcpyKind kind, cudaStream_t stream) {
  return record(copy_symbol(symbol, to, bytes, offset, kind, stream, false, true));
}
PTX_API cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  uint8_t* found;
  size_t bytes;
  if (!address) return record(cudaErrorInvalidValue);
  if (const cudaError_t e = symbol_address(symbol, &found, &bytes)) return record(e);
  *address = found;
  return cudaSuccess;
}
PTX_API cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  uint8_t* found;
  if (!bytes) return record(cudaErrorInvalidValue);
  return record(symbol_address(symbol, &found, bytes));
}
PTX_API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (const cudaError_t e = forbidden_in_capture(nullptr, true)) return record(e);
  return record(fill_2d(to, bytes, value, bytes, 1, nullptr));
}
PTX_API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return record(fill_2d(to, bytes, value, bytes, 1, stream));
}
PTX_API cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  return record(fill_2d(to, pitch, value, width, height, nullptr));
}
PTX_API cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height,
                                      cudaStream_t stream) {
  return record(fill_2d(to, pitch, value, width, height, stream));
}
PTX_API cudaError_t cudaMemAdvise(const void* p, size_t bytes, cudaMemoryAdvise, cudaMemLocation) {
  return record(device_span(p, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}
PTX_API cudaError_t cudaMemPrefetchAsync(const void* p, size_t bytes, cudaMemLocation, unsigned, cudaStream_t stream) {
  if (!valid_stream(stream)) return record(cudaErrorInvalidResourceHandle);
  return record(device_span(p, bytes) ? cudaSuccess : cudaErrorInvalidValue);
}
