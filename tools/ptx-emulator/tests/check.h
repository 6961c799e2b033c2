// What the test programs share: expectations that end the program.
#pragma once

#include <cuda_runtime.h>

#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#define EXPECT(x)                            \
  do {                                       \
    if (!(x)) {                              \
      printf("line %d: %s\n", __LINE__, #x); \
      exit(1);                               \
    }                                        \
  } while (0)
#define OK(x)                                                          \
  do {                                                                 \
    cudaError_t e_ = (x);                                              \
    if (e_) {                                                          \
      printf("line %d: %s: %s\n", __LINE__, #x, cudaGetErrorName(e_)); \
      exit(1);                                                         \
    }                                                                  \
  } while (0)
