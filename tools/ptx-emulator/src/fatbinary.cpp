#include "fatbinary.h"

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

namespace ptx_emulator {

namespace {

constexpr uint32_t kMagic = 0xba55ed50;
constexpr uint64_t kFlagLz4 = 0x2000, kFlagZstd = 0x8000;
constexpr size_t kLargestText = size_t{1} << 30;

template <class T>
T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

struct Entry {
  uint16_t kind;  // 1: PTX, 2: machine code
  uint32_t header_bytes;
  uint64_t payload_bytes;
  uint32_t compressed_bytes;
  uint32_t sm;
  uint64_t flags;
  uint64_t uncompressed_bytes;
};

Entry read_entry(const uint8_t* at) {
  return {load<uint16_t>(at),      load<uint32_t>(at + 4),  load<uint64_t>(at + 8), load<uint32_t>(at + 16),
          load<uint32_t>(at + 28), load<uint64_t>(at + 40), load<uint64_t>(at + 56)};
}

}  // namespace

bool is_fatbinary(const void* data) { return load<uint32_t>(static_cast<const uint8_t*>(data)) == kMagic; }

// A block of the LZ4 format: runs of literals, each followed by a copy from what has been written.
std::string decompress_lz4(const uint8_t* data, size_t size, size_t expected) {
  if (expected > kLargestText) throw std::runtime_error("fatbinary: LZ4 data claims an impossible size");
  std::string out;
  out.reserve(expected);
  size_t at = 0;
  const auto byte = [&] {
    if (at >= size) throw std::runtime_error("fatbinary: LZ4 data ends early");
    return data[at++];
  };
  const auto length = [&](size_t value) {
    if (value == 15)
      for (uint8_t more = 255; more == 255;) value += more = byte();
    return value;
  };
  while (at < size && out.size() < expected) {
    const uint8_t token = byte();
    const size_t literals = length(token >> 4);
    if (literals > size - at || literals > expected - out.size())
      throw std::runtime_error("fatbinary: LZ4 literals overrun");
    out.append(reinterpret_cast<const char*>(data + at), literals);
    at += literals;
    if (at >= size || out.size() >= expected) break;
    const size_t low = byte(), offset = low | static_cast<size_t>(byte()) << 8;
    const size_t count = length(token & 15) + 4;
    if (offset == 0 || offset > out.size() || count > expected - out.size())
      throw std::runtime_error("fatbinary: LZ4 match out of range");
    for (size_t k = 0; k < count; ++k) out += out[out.size() - offset];
  }
  if (out.size() != expected) throw std::runtime_error("fatbinary: LZ4 data has the wrong size");
  return out;
}

// libzstd is there wherever a package manager is; it is opened when it is needed, and needs no headers.
std::string decompress_zstd(const uint8_t* data, size_t size, size_t expected) {
  using Decompress = size_t (*)(void*, size_t, const void*, size_t);
  using IsError = unsigned (*)(size_t);
  static void* library = dlopen("libzstd.so.1", RTLD_NOW);
  static const auto decompress = library ? reinterpret_cast<Decompress>(dlsym(library, "ZSTD_decompress")) : nullptr;
  static const auto is_error = library ? reinterpret_cast<IsError>(dlsym(library, "ZSTD_isError")) : nullptr;
  if (!decompress || !is_error)
    throw std::runtime_error("fatbinary: libzstd.so.1 is needed to unpack this program's PTX");
  if (expected > kLargestText) throw std::runtime_error("fatbinary: zstd data claims an impossible size");
  std::string out(expected, '\0');
  const size_t got = decompress(out.data(), expected, data, size);
  if (is_error(got) || got != expected) throw std::runtime_error("fatbinary: zstd data cannot be unpacked");
  return out;
}

namespace {

std::string unpack(const Entry& e, const uint8_t* payload) {
  const size_t compressed = e.compressed_bytes ? e.compressed_bytes : e.payload_bytes;
  if (compressed > e.payload_bytes) throw std::runtime_error("fatbinary: bad entry");
  std::string text = e.flags & kFlagZstd  ? decompress_zstd(payload, compressed, e.uncompressed_bytes)
                     : e.flags & kFlagLz4 ? decompress_lz4(payload, compressed, e.uncompressed_bytes)
                                          : std::string(reinterpret_cast<const char*>(payload), e.payload_bytes);
  text.resize(std::strlen(text.c_str()));  // padding
  return text;
}

// Whether the text's target has a letter after its number, as sm_90a has.
bool for_one_device(const std::string& text) {
  size_t at = text.find(".target sm_");
  if (at == std::string::npos) return false;
  at = text.find_first_not_of("0123456789", at + 11);
  return at != std::string::npos && text[at] >= 'a' && text[at] <= 'z';
}

}  // namespace

std::optional<std::string> extract_ptx(const void* fatbinary, size_t size, int sm) {
  const auto* bytes = static_cast<const uint8_t*>(fatbinary);
  if (size && size < 16) throw std::runtime_error("fatbinary: too short");
  if (!is_fatbinary(bytes)) throw std::runtime_error("fatbinary: bad magic number");
  const size_t header = load<uint16_t>(bytes + 6);
  const uint64_t total = load<uint64_t>(bytes + 8);
  if (header < 16 || total > (uint64_t{1} << 40) || (size && header + total > size))
    throw std::runtime_error("fatbinary: bad header");
  const uint8_t* at = bytes + header;
  const uint8_t* const end = at + total;
  std::optional<std::string> best;
  uint32_t best_sm = 0;
  while (end - at >= 64) {
    const Entry e = read_entry(at);
    if (e.header_bytes < 64 || e.header_bytes > static_cast<uint64_t>(end - at) ||
        e.payload_bytes > static_cast<uint64_t>(end - at) - e.header_bytes)
      throw std::runtime_error("fatbinary: bad entry");
    const auto device = static_cast<uint32_t>(sm);
    // Of two texts for the device itself, the one for it alone (sm_90a) is the richer.
    if (e.kind == 1 && e.sm <= device && (!best || e.sm > best_sm || (e.sm == best_sm && e.sm == device))) {
      std::string text = unpack(e, at + e.header_bytes);
      const bool own = for_one_device(text);
      if (!own || e.sm == device)
        if (!best || e.sm > best_sm || own) best = std::move(text), best_sm = e.sm;
    }
    at += e.header_bytes + e.payload_bytes;
  }
  return best;
}

}  // namespace ptx_emulator
