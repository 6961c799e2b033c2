#pragma once

#include <cstddef>

#include "pop/types.h"

// What concerns the current CUDA device and no operation in particular. Errors are std::runtime_error.

namespace pop::cuda {

/// Loads every kernel onto the current device; returns how many there are. Later calls cost nothing.
int load_kernels();

/// What the driver runs of this library on the current device: the compute capabilities (90 for 9.0) of the machine
/// code and of the PTX that it was compiled from.
struct Image {
  int sm, ptx;
};
Image loaded_image();

/// Whether work on the stream is being captured into a graph.
bool capturing(Stream);

/// Copies from the device's memory once all earlier work on the stream is done, and waits for it.
void read(const char* operation, void* to, const void* from, size_t bytes, Stream);

}  // namespace pop::cuda
