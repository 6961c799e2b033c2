#include "check.h"

__global__ void add(int* x, int v) { *x += v; }
__global__ void twice(int* x) { *x *= 2; }
int main() {
  int* x;
  OK(cudaMallocManaged(&x, 4));
  *x = 1;
  cudaStream_t s, t;
  OK(cudaStreamCreate(&s));
  OK(cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking));
  cudaEvent_t fork, join, a, b;
  OK(cudaEventCreate(&fork));
  OK(cudaEventCreate(&join));
  OK(cudaEventCreate(&a));
  OK(cudaEventCreate(&b));
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  add<<<1, 1, 0, s>>>(x, 2);
  OK(cudaEventRecord(fork, s));
  OK(cudaStreamWaitEvent(t, fork, 0));
  twice<<<1, 1, 0, t>>>(x);
  OK(cudaEventRecord(join, t));
  OK(cudaStreamWaitEvent(s, join, 0));
  cudaStreamCaptureStatus status;
  OK(cudaStreamIsCapturing(t, &status));
  EXPECT(status == cudaStreamCaptureStatusActive);
  cudaGraph_t g;
  cudaGraphExec_t e;
  OK(cudaStreamEndCapture(s, &g));
  EXPECT(*x == 1);
  size_t n;
  OK(cudaGraphGetNodes(g, nullptr, &n));
  EXPECT(n == 2);
  OK(cudaGraphInstantiate(&e, g, 0));
  OK(cudaGraphLaunch(e, s));
  OK(cudaGraphLaunch(e, s));
  OK(cudaStreamSynchronize(s));
  EXPECT(*x == 16);
  OK(cudaGraphExecDestroy(e));
  OK(cudaGraphDestroy(g));
  EXPECT(cudaGraphLaunch(e, s) == cudaErrorInvalidValue);
  // What a capture forbids fails, and ends it.
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  EXPECT(cudaStreamSynchronize(s) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamEndCapture(s, &g) == cudaErrorStreamCaptureInvalidated);
  void* p;
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  EXPECT(cudaMalloc(&p, 4) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamEndCapture(s, &g) == cudaErrorStreamCaptureInvalidated);
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeRelaxed));
  OK(cudaMalloc(&p, 4));
  OK(cudaStreamEndCapture(s, &g));
  OK(cudaGraphDestroy(g));
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  add<<<1, 1>>>(x, 1);
  EXPECT(cudaGetLastError() == cudaErrorStreamCaptureImplicit);
  EXPECT(cudaStreamEndCapture(s, &g) == cudaErrorStreamCaptureInvalidated);
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  OK(cudaEventRecord(fork, s));
  OK(cudaStreamWaitEvent(t, fork, 0));
  add<<<1, 1, 0, t>>>(x, 1);
  EXPECT(cudaEventQuery(fork) == cudaErrorCapturedEvent);
  EXPECT(cudaStreamEndCapture(t, &g) == cudaErrorStreamCaptureUnmatched);
  cudaStreamEndCapture(s, &g);
  OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  OK(cudaEventRecord(fork, s));
  OK(cudaStreamWaitEvent(t, fork, 0));
  add<<<1, 1, 0, t>>>(x, 1);
  EXPECT(cudaStreamEndCapture(s, &g) == cudaErrorStreamCaptureUnjoined);
  EXPECT(cudaStreamEndCapture(s, &g) == cudaErrorIllegalState &&
         cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
  cudaGetLastError();
  float ms;
  OK(cudaEventRecord(a, s));
  add<<<1, 1, 0, s>>>(x, 1);
  OK(cudaEventRecord(b, s));
  OK(cudaEventSynchronize(b));
  OK(cudaEventElapsedTime(&ms, a, b));
  EXPECT(ms >= 0);
  const char* ptx =
      ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p) { .reg .b64 %p; ld.param.u64 "
      "%p, [p]; st.global.u32 [%p], 77; ret; }";
  cudaLibrary_t library;
  cudaKernel_t kernel;
  OK(cudaLibraryLoadData(&library, ptx, nullptr, nullptr, 0, nullptr, nullptr, 0));
  OK(cudaLibraryGetKernel(&kernel, library, "k"));
  EXPECT(cudaLibraryGetKernel(&kernel, library, "j") == cudaErrorSymbolNotFound);
  OK(cudaLibraryGetKernel(&kernel, library, "k"));
  void* arguments[] = {&x};
  OK(cudaLaunchKernel((void*)kernel, 1, 1, arguments, 0, s));
  EXPECT(*x == 77);
  OK(cudaLibraryUnload(library));
  EXPECT(cudaLibraryLoadData(&library, "rubbish", nullptr, nullptr, 0, nullptr, nullptr, 0) == cudaErrorInvalidPtx);
  void* f;
  cudaDriverEntryPointQueryResult r;
  OK(cudaGetDriverEntryPointByVersion("cuMemAlloc", &f, 13000, 0, &r));
  EXPECT(!f && r == cudaDriverEntryPointSymbolNotFound);
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 1;
  config.stream = s;
  OK(cudaLaunchKernelEx(&config, add, x, 3));
  EXPECT(*x == 80);
  puts("fine");
}
