#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
int main(int argc, char** argv) {
  // A fatbinary with damage: every load ends in an error or a library.
  FILE* f = fopen(argv[1], "rb");
  std::vector<char> good(1 << 20);
  good.resize(fread(good.data(), 1, good.size(), f));
  fclose(f);
  std::mt19937 random(7);
  int loaded = 0;
  for (int k = 0; k < 400; k++) {
    std::vector<char> bad = good;
    bad.resize(good.size() + 4096);
    for (int j = 0; j < 1 + k % 5; j++) bad[random() % (k % 2 ? 200 : good.size())] ^= 1 << random() % 8;
    cudaLibrary_t library = nullptr;
    if (!cudaLibraryLoadData(&library, bad.data(), nullptr, nullptr, 0, nullptr, nullptr, 0)) {
      loaded++;
      cudaLibraryUnload(library);
    }
  }
  // Null and foreign pointers for handles and memory.
  void* wild[] = {nullptr, (void*)8, (void*)&loaded, (void*)0x123456789000, (void*)-1};
  for (void* p : wild)
    for (void* q : wild) {
      cudaStreamSynchronize((cudaStream_t)p);
      cudaStreamDestroy((cudaStream_t)p);
      cudaEventRecord((cudaEvent_t)p, (cudaStream_t)q);
      cudaEventDestroy((cudaEvent_t)p);
      cudaEventSynchronize((cudaEvent_t)q);
      cudaGraphDestroy((cudaGraph_t)p);
      cudaGraphLaunch((cudaGraphExec_t)p, (cudaStream_t)q);
      cudaGraphExecDestroy((cudaGraphExec_t)p);
      cudaStreamWaitEvent((cudaStream_t)q, (cudaEvent_t)p, 0);
      if (p != &loaded) {
        cudaMemcpy(p, q, 64, cudaMemcpyDefault);
        cudaMemset(p, 0, 64);
        cudaMemcpyAsync(p, q, 64, cudaMemcpyHostToDevice, (cudaStream_t)q);
      }
      cudaFree(p == &loaded ? q : p);
      cudaFreeHost(p);
      cudaHostUnregister(p);
      cudaPointerAttributes a;
      cudaPointerGetAttributes(&a, p);
      cudaLaunchKernel(p, 1, 1, (void**)q, 0, (cudaStream_t)q);
      cudaFuncAttributes fa;
      cudaFuncGetAttributes(&fa, p);
      cudaMemcpyToSymbol(p, &loaded, 4);
      cudaLibraryUnload((cudaLibrary_t)p);
      cudaGetDeviceProperties(nullptr, 0);
      cudaMalloc(nullptr, 1);
      cudaStreamBeginCapture((cudaStream_t)p, cudaStreamCaptureModeGlobal);
      cudaGraph_t g;
      cudaStreamEndCapture((cudaStream_t)p, &g);
      cudaGraphInstantiate(nullptr, (cudaGraph_t)p, 0);
    }
  printf("alive %d\n", loaded < 400);
}
