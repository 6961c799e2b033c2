// Errors: the last one, names and texts.
#include "runtime/state.h"

namespace ptx_emulator {

namespace {

struct ErrorText {
  cudaError_t code;
  const char* name;
  const char* text;
};
#define PTX_ERROR(code, text) {code, #code, text}
constexpr ErrorText kErrors[] = {
    PTX_ERROR(cudaSuccess, "no error"),
    PTX_ERROR(cudaErrorInvalidValue, "invalid argument"),
    PTX_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    PTX_ERROR(cudaErrorInitializationError, "initialization error"),
    PTX_ERROR(cudaErrorCudartUnloading, "driver shutting down"),
    PTX_ERROR(cudaErrorProfilerDisabled, "profiler disabled while using external profiling tool"),
    PTX_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    PTX_ERROR(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    PTX_ERROR(cudaErrorInvalidSymbol, "invalid device symbol"),
    PTX_ERROR(cudaErrorInvalidHostPointer, "invalid host pointer"),
    PTX_ERROR(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    PTX_ERROR(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    PTX_ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    PTX_ERROR(cudaErrorMissingConfiguration, "__global__ function call is not configured"),
    PTX_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    PTX_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    PTX_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    PTX_ERROR(cudaErrorStartupFailure, "startup failure in cuda runtime"),
    PTX_ERROR(cudaErrorInvalidKernelImage, "device kernel image is invalid"),
    PTX_ERROR(cudaErrorDeviceUninitialized, "invalid device context"),
    PTX_ERROR(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    PTX_ERROR(cudaErrorECCUncorrectable, "uncorrectable ECC error encountered"),
    PTX_ERROR(cudaErrorUnsupportedLimit, "limit is not supported on this architecture"),
    PTX_ERROR(cudaErrorPeerAccessUnsupported, "peer access is not supported between these two devices"),
    PTX_ERROR(cudaErrorInvalidPtx, "a PTX JIT compilation failed"),
    PTX_ERROR(cudaErrorJitCompilerNotFound, "PTX JIT compiler library not found"),
    PTX_ERROR(cudaErrorUnsupportedPtxVersion, "the provided PTX was compiled with an unsupported toolchain."),
    PTX_ERROR(cudaErrorInvalidSource, "device kernel image is invalid"),
    PTX_ERROR(cudaErrorFileNotFound, "file not found"),
    PTX_ERROR(cudaErrorSharedObjectSymbolNotFound, "shared object symbol not found"),
    PTX_ERROR(cudaErrorOperatingSystem, "OS call failed or operation not supported on this OS"),
    PTX_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    PTX_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    PTX_ERROR(cudaErrorSymbolNotFound, "named symbol not found"),
    PTX_ERROR(cudaErrorNotReady, "device not ready"),
    PTX_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    PTX_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    PTX_ERROR(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    PTX_ERROR(cudaErrorPeerAccessAlreadyEnabled, "peer access is already enabled"),
    PTX_ERROR(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled"),
    PTX_ERROR(cudaErrorSetOnActiveProcess, "cannot set while device is active in this process"),
    PTX_ERROR(cudaErrorContextIsDestroyed, "context is destroyed"),
    PTX_ERROR(cudaErrorAssert, "device-side assert triggered"),
    PTX_ERROR(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    PTX_ERROR(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    PTX_ERROR(cudaErrorHardwareStackError, "hardware stack error"),
    PTX_ERROR(cudaErrorIllegalInstruction, "an illegal instruction was encountered"),
    PTX_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    PTX_ERROR(cudaErrorInvalidAddressSpace, "operation not supported on global/shared address space"),
    PTX_ERROR(cudaErrorInvalidPc, "invalid program counter"),
    PTX_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    PTX_ERROR(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    PTX_ERROR(cudaErrorNotPermitted, "operation not permitted"),
    PTX_ERROR(cudaErrorNotSupported, "operation not supported"),
    PTX_ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    PTX_ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    PTX_ERROR(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    PTX_ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    PTX_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    PTX_ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    PTX_ERROR(cudaErrorStreamCaptureImplicit,
              "operation would make the legacy stream depend on a capturing blocking stream"),
    PTX_ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    PTX_ERROR(cudaErrorStreamCaptureWrongThread,
              "attempt to terminate a thread-local capture sequence from another thread"),
    PTX_ERROR(cudaErrorTimeout, "wait operation timed out"),
    PTX_ERROR(cudaErrorGraphExecUpdateFailure,
              "the graph update was not performed because it included changes which violated constraints specific to "
              "instantiated graph update"),
    PTX_ERROR(cudaErrorInvalidClusterSize, "cluster misconfiguration"),
    PTX_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef PTX_ERROR

}  // namespace

}  // namespace ptx_emulator

using namespace ptx_emulator;

PTX_API cudaError_t cudaGetLastError() {
  const cudaError_t error = sticky() ? sticky() : last_error();
  last_error() = cudaSuccess;
  return error;
}
PTX_API cudaError_t cudaPeekAtLastError() { return sticky() ? sticky() : last_error(); }
PTX_API const char* cudaGetErrorName(cudaError_t code) {
  for (const ErrorText& e : kErrors)
    if (e.code == code) return e.name;
  return "unrecognized error code";
}
PTX_API const char* cudaGetErrorString(cudaError_t code) {
  for (const ErrorText& e : kErrors)
    if (e.code == code) return e.text;
  return "unrecognized error code";
}
