// Finds PTX text in what nvcc embeds in a program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace ptx_emulator {

// The PTX for the newest target that is not above `sm` (a target such as sm_90a only where it is the device's own).
// Returns nothing where there is none; throws std::runtime_error for data that is no fatbinary or cannot be unpacked.
// `size` bounds what may be read (0: the header says).
std::optional<std::string> extract_ptx(const void* fatbinary, size_t size, int sm);

bool is_fatbinary(const void* data);

std::string decompress_lz4(const uint8_t* data, size_t size, size_t expected);
std::string decompress_zstd(const uint8_t* data, size_t size, size_t expected);

}  // namespace ptx_emulator
