// printf, assert, malloc and free.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>

#include "schedule/block.h"

namespace ptx_emulator {

uint8_t* Block::resolve(Warp& w, int lane, uint64_t address) {
  if ((address & kWindowMask) == kSharedWindow) {
    if (address - kSharedWindow >= w.shared_bytes)
      throw KernelFault{kIllegalAddress, "shared memory address out of range"};
    return w.shared + (address - kSharedWindow);
  }
  if ((address & kWindowMask) == kLocalWindow) {
    if (address - kLocalWindow >= w.local_stride)
      throw KernelFault{kIllegalAddress, "local memory address out of range"};
    return w.local + size_t(lane) * w.local_stride + (address - kLocalWindow);
  }
  return reinterpret_cast<uint8_t*>(address);
}

namespace {

// printf's buffer holds its arguments at their natural alignment; integers are 4 bytes, or 8 with an l.
// `reads` is told of their offsets and sizes.
int print_formatted(const char* format, const uint8_t* values, const std::function<const char*(uint64_t)>& text_at,
                    const std::function<void(size_t, size_t)>& reads) {
  std::string out;
  size_t offset = 0;
  int count = 0;
  const auto take = [&](size_t bytes) {
    offset = (offset + bytes - 1) / bytes * bytes;
    uint64_t v = 0;
    if (values) reads(offset, bytes), std::memcpy(&v, values + offset, bytes);
    offset += bytes;
    ++count;
    return v;
  };
  for (const char* p = format; *p; ++p) {
    if (*p != '%') {
      out += *p;
      continue;
    }
    if (p[1] == '%') {
      out += '%';
      ++p;
      continue;
    }
    std::string spec = "%";
    bool wide = false;
    for (++p; *p && std::strchr("-+ #0123456789.*hlLjzt", *p); ++p) {
      if (*p == '*')
        spec += std::to_string(static_cast<int32_t>(take(4)));
      else if (*p == 'l' || *p == 'j' || *p == 'z' || *p == 't')
        wide = true;
      else if (*p != 'h' && *p != 'L')
        spec += *p;
    }
    if (!*p) break;
    char buffer[512];
    if (spec.size() > 32) spec = "%";
    switch (*p) {
      case 'd':
      case 'i': {
        const uint64_t v = take(wide ? 8 : 4);
        std::snprintf(buffer, sizeof(buffer), (spec + "lld").c_str(),
                      wide ? static_cast<long long>(v) : static_cast<long long>(static_cast<int32_t>(v)));
        out += buffer;
        break;
      }
      case 'u':
      case 'x':
      case 'X':
      case 'o':
        std::snprintf(buffer, sizeof(buffer), (spec + "ll" + *p).c_str(),
                      static_cast<unsigned long long>(take(wide ? 8 : 4)));
        out += buffer;
        break;
      case 'c':
        out += static_cast<char>(take(4));
        break;
      case 'f':
      case 'F':
      case 'e':
      case 'E':
      case 'g':
      case 'G':
      case 'a':
      case 'A':
        std::snprintf(buffer, sizeof(buffer), (spec + *p).c_str(), std::bit_cast<double>(take(8)));
        out += buffer;
        break;
      case 's': {
        const char* text = text_at(take(8));
        const size_t size = static_cast<size_t>(std::snprintf(nullptr, 0, (spec + "s").c_str(), text));
        std::string formatted(size + 1, '\0');
        std::snprintf(formatted.data(), size + 1, (spec + "s").c_str(), text);
        formatted.resize(size);
        out += formatted;
        break;
      }
      case 'p':
        std::snprintf(buffer, sizeof(buffer), "0x%llx", static_cast<unsigned long long>(take(8)));
        out += buffer;
        break;
      default:
        out += spec + *p;
    }
  }
  std::fwrite(out.data(), 1, out.size(), stdout);
  return count;
}

}  // namespace

void Block::call_builtin(Warp& w, const Call& call, Frame* frame, uint32_t mask) {
  for (; mask; mask &= mask - 1) {
    const int lane = std::countr_zero(mask);
    uint8_t* local = w.local + size_t(lane) * w.local_stride + frame->local_base;
    const auto argument = [&](size_t k) {
      uint64_t v = 0;
      std::memcpy(&v, local + call.arguments[k].from, std::min<uint32_t>(call.arguments[k].bytes, 8));
      return v;
    };
    const auto text = [&](uint64_t address) {
      return address ? reinterpret_cast<const char*>(resolve(w, lane, address)) : "(null)";
    };
    switch (call.builtin) {
      case Builtin::kPrintf: {
        const uint64_t values = argument(1);
        const int32_t count = print_formatted(
            text(argument(0)), values ? resolve(w, lane, values) : nullptr, text, [&](size_t offset, size_t bytes) {
              if (grid->checker)
                grid->checker->system_reads(w, static_cast<uint32_t>(lane), values + offset,
                                            static_cast<uint32_t>(bytes));
            });
        std::memcpy(local + call.results[0].to, &count, 4);
        break;
      }
      case Builtin::kAssertFail: {
        const uint32_t thread = w.index * kLanes + static_cast<uint32_t>(lane);
        const Dim3& b = grid->request.block;
        std::string message = std::string(text(argument(1))) + ":" +
                              std::to_string(static_cast<uint32_t>(argument(2))) + ": " + text(argument(3)) +
                              ": block: [" + std::to_string(id.x) + "," + std::to_string(id.y) + "," +
                              std::to_string(id.z) + "], thread: [" + std::to_string(thread % b.x) + "," +
                              std::to_string(thread / b.x % b.y) + "," + std::to_string(thread / b.x / b.y) +
                              "] Assertion `" + text(argument(0)) + "` failed.";
        std::fprintf(stderr, "%s\n", message.c_str());
        throw KernelFault{kAssertFailed, message};
      }
      case Builtin::kMalloc: {
        const uint64_t bytes = argument(0);
        const auto p = reinterpret_cast<uint64_t>(
            bytes < (uint64_t{1} << 30) ? Memory::instance().allocate(bytes, Allocation::Kind::kHeap) : nullptr);
        std::memcpy(local + call.results[0].to, &p, 8);
        break;
      }
      case Builtin::kFree:
        Memory::instance().release(reinterpret_cast<void*>(argument(0)));
        break;
      case Builtin::kNone:
        break;
    }
    if (grid->checker)
      for (const ArgumentCopy& result : call.results)
        grid->checker->write_local(w, static_cast<uint32_t>(lane), frame->local_base + result.to, result.bytes);
  }
}

}  // namespace ptx_emulator
