// The device's memory: host memory, known by allocation. Beside each allocation, where the checks ask for it, lie its
// shadows: which bytes were never written, and who touched what last.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace ptx_emulator {

struct Allocation {
  enum class Kind : uint8_t { kDevice, kManaged, kPinned, kRegistered, kVariable, kHeap };
  uint8_t* base = nullptr;
  size_t bytes = 0;
  Kind kind = Kind::kDevice;
  std::string name;          // of a variable, or what a caller gave
  uint8_t* block = nullptr;  // what malloc gave: with red zones, before the base
};

// Zeroed pages that cost nothing until they are touched.
class Pages {
 public:
  Pages() = default;
  Pages(Pages&& other) noexcept { *this = std::move(other); }
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_), std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Pages();
  // Throws std::bad_alloc.
  uint8_t* reserve(size_t bytes);
  void drop();
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// A stretch of known memory: an allocation, or registered tensors that overlap.
struct Region {
  uintptr_t base = 0;
  size_t bytes = 0;
  std::string name;
  uint64_t id = 0;
  Pages unwritten;  // a byte of ones for each byte that was never written; none: all are written
  Pages cells;      // races: a Cell (checks/shadow.h) for each aligned word
  Pages footprint;  // counts: for each byte, bit 0: read, bit 1: written in the current launch
  uint64_t footprint_launch = 0;

  bool holds(uintptr_t at, size_t size) const { return at >= base && at + size <= base + bytes; }
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

  // Memory that someone else owns and kernels may touch. Overlapping registrations are one region. `written`: its bytes
  // count as written (of memory that is known already, too).
  void enroll(const void* base, size_t bytes, bool written, std::string name);
  bool dismiss(const void* base);  // undoes the last `enroll` with that base; false: there is none

  // Whether shadows of written bytes are kept from now on: memory that is known already then counts as written.
  void track(bool on);
  bool tracking() const { return tracking_; }
  void mark_written(const void* base, size_t bytes);
  void copy_written(const void* to, const void* from, size_t bytes);  // `from` outside of known memory: written
  // The first byte of these that was never written, null for none.
  const void* first_unwritten(const void* base, size_t bytes) const;

  // Changes whenever regions() would.
  uint64_t version() const { return version_; }
  std::vector<std::shared_ptr<Region>> regions() const;  // by address
  // What lay at an address that is free now, empty if unknown.
  std::string freed(uintptr_t address) const;

 private:
  struct Registration {
    uintptr_t base;
    size_t bytes;
    std::string name;
  };
  struct Freed {
    uintptr_t base;
    size_t bytes;
    std::string name;
    uint8_t* block;
  };
  void open(uintptr_t base, size_t bytes, bool written, std::string name);
  void close(uintptr_t base, uint8_t* block);
  void forget_freed(uintptr_t base, size_t bytes);
  std::shared_ptr<Region> region_at(uintptr_t address) const;

  mutable std::recursive_mutex mutex_;
  std::map<uintptr_t, Allocation> allocations_;
  std::vector<Registration> registrations_;
  std::map<uintptr_t, std::shared_ptr<Region>> regions_;
  std::deque<Freed> freed_;
  size_t quarantined_ = 0;
  size_t used_ = 0;
  uint64_t next_id_ = 1;
  std::atomic<uint64_t> version_{1};
  std::atomic<bool> tracking_{false};
};

}  // namespace ptx_emulator
