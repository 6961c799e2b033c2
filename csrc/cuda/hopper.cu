#include "cuda/device.h"
#include "cuda/hopper.h"

namespace pop::cuda {
namespace {

/// Is never launched: that it takes shared memory tells the image for sm_90a from others.
__global__ void marker_kernel(int value) {
#if POP_SM90A
  __shared__ volatile int mark;
  mark = value;
#endif
}

bool find_sm90a(const char* operation) {
  cudaFuncAttributes found;
  check(operation, cudaFuncGetAttributes(&found, marker_kernel));
  return found.sharedSizeBytes > 0;
}

}  // namespace

bool runs_sm90a(const char* operation) {
  enum { kUnknown, kNo, kYes };
  static std::atomic<int> known[kMaxDevices];
  int device;
  check(operation, cudaGetDevice(&device));
  if (device >= kMaxDevices) return find_sm90a(operation);
  if (known[device].load(std::memory_order_relaxed) == kUnknown) known[device] = find_sm90a(operation) ? kYes : kNo;
  return known[device].load(std::memory_order_relaxed) == kYes;
}

CUtensorMap tensor_map(const char* operation, DType dtype, const TensorBoxes& t) {
  // By the runtime, so that nothing links to the driver's library.
  static const auto encode = [&] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    check(operation,
          cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status));
    if (!function) throw std::runtime_error(std::string("pop::") + operation + ": the driver makes no tensor maps");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  constexpr cuuint32_t kSteps[TensorBoxes::kDimensions] = {1, 1, 1, 1};
  cuuint64_t strides[TensorBoxes::kDimensions - 1];
  for (int d = 0; d < TensorBoxes::kDimensions - 1; ++d)
    strides[d] = t.sizes[d + 1] > 1 ? t.strides[d] * 2 : 16;  // of one of a kind, strides may be anything
  CUtensorMap map;
  const CUresult result =
      encode(&map, dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             TensorBoxes::kDimensions, const_cast<void*>(t.data), t.sizes, strides, t.box, kSteps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("pop::") + operation + ": cuTensorMapEncodeTiled returned " +
                             std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace pop::cuda
