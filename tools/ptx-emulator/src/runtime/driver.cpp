// The driver's functions that programs ask the runtime for: tensor maps.
#include <cstring>

#include "checks/settings.h"
#include "findings.h"
#include "runtime/state.h"
#include "tensor_map.h"

namespace ptx_emulator {

namespace {

constexpr int kSuccess = 0, kInvalidValue = 1, kNotSupported = 801;  // CUresult

int encode_tiled(void* out, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                 const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
  std::string problem;
  TensorMap map;
  MapResult result = MapResult::kInvalid;
  if (device_limits().capability_major < 9)
    result = MapResult::kUnsupported, problem = "tensor maps need a device of compute capability 9.0";
  else if (!out || reinterpret_cast<uintptr_t>(out) % 64)
    problem = "the tensor map does not lie on 64 bytes";
  else
    result = make_tensor_map({type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill},
                             map, problem);
  if (result == MapResult::kMade) {
    std::memset(out, 0, 128);
    std::memcpy(out, &map, sizeof(map));
    return kSuccess;
  }
  say("cuTensorMapEncodeTiled: " + problem);
  if (result == MapResult::kInvalid && launch_settings().checks) {
    Finding f;
    f.rule = "tensor-map", f.message = "cuTensorMapEncodeTiled: " + problem;
    f.address = reinterpret_cast<uint64_t>(address), f.space = "global";
    Findings::instance().add(std::move(f));
  }
  return result == MapResult::kInvalid ? kInvalidValue : kNotSupported;
}

}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                     cudaDriverEntryPointQueryResult* status) {
  if (!symbol || !function) return record(cudaErrorInvalidValue);
  const bool known = !std::strcmp(symbol, "cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  if (status) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
