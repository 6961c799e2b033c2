// The device's memory: host memory, known by allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <string>

namespace pop::emulator {

struct Allocation {
  enum class Kind : uint8_t { kDevice, kManaged, kPinned, kRegistered, kVariable };
  uint8_t* base = nullptr;
  size_t bytes = 0;
  Kind kind = Kind::kDevice;
  std::string name;  // of a variable, or what a caller gave
};

class Memory {
 public:
  static Memory& instance();

  uint8_t* allocate(size_t bytes, Allocation::Kind kind, std::string name = {});  // null where there is not enough
  bool release(const void* base, bool only_pinned = false);                       // false: no such allocation
  bool add(void* base, size_t bytes, Allocation::Kind kind,
           std::string name);  // someone else's memory; false on overlap
  bool remove(const void* base);
  std::optional<Allocation> find(const void* address) const;
  size_t used() const;
  size_t capacity() const;

 private:
  mutable std::mutex mutex_;
  std::map<uintptr_t, Allocation> allocations_;
  size_t used_ = 0;
};

}  // namespace pop::emulator
