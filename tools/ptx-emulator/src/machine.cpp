
#include "machine.h"

#include <algorithm>
#include <new>

namespace ptx_emulator {

AlignedBytes aligned_bytes(size_t bytes) {
  const size_t rounded = (std::max<size_t>(bytes, 64) + 63) / 64 * 64;
  auto* p = static_cast<uint8_t*>(std::aligned_alloc(64, rounded));
  if (!p) throw std::bad_alloc();
  std::memset(p, 0, rounded);
  return AlignedBytes(p);
}

}  // namespace ptx_emulator
