#include "memory.h"

#include <cstdlib>
#include <cstring>

namespace pop::emulator {

namespace {
constexpr size_t kAlignment = 512;
bool owned(Allocation::Kind kind) { return kind != Allocation::Kind::kRegistered; }
}  // namespace

Memory& Memory::instance() {
  static Memory* memory = new Memory;  // outlives static destructors that still free
  return *memory;
}

size_t Memory::capacity() const {
  static const size_t bytes = [] {
    const char* text = std::getenv("POP_EMULATOR_MEMORY_GB");
    return static_cast<size_t>(text ? std::atof(text) * 1e9 : 40e9);
  }();
  return bytes;
}

uint8_t* Memory::allocate(size_t bytes, Allocation::Kind kind, std::string name) {
  const std::lock_guard lock(mutex_);
  if (bytes > capacity() - used_) return nullptr;
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  auto* base = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded));
  if (!base) return nullptr;
  used_ += bytes;
  allocations_[reinterpret_cast<uintptr_t>(base)] = {base, bytes, kind, std::move(name)};
  return base;
}

bool Memory::release(const void* base, bool only_pinned) {
  const std::lock_guard lock(mutex_);
  const auto at = allocations_.find(reinterpret_cast<uintptr_t>(base));
  if (at == allocations_.end() || !owned(at->second.kind)) return false;
  const bool pinned = at->second.kind == Allocation::Kind::kPinned;
  if (pinned != only_pinned) return false;
  used_ -= at->second.bytes;
  std::free(at->second.base);
  allocations_.erase(at);
  return true;
}

bool Memory::add(void* base, size_t bytes, Allocation::Kind kind, std::string name) {
  const std::lock_guard lock(mutex_);
  const uintptr_t first = reinterpret_cast<uintptr_t>(base);
  auto after = allocations_.lower_bound(first);
  if (after != allocations_.end() && after->first < first + bytes) return false;
  if (after != allocations_.begin()) {
    const auto& [start, before] = *std::prev(after);
    if (start + before.bytes > first) return false;
  }
  allocations_[first] = {static_cast<uint8_t*>(base), bytes, kind, std::move(name)};
  return true;
}

bool Memory::remove(const void* base) {
  const std::lock_guard lock(mutex_);
  const auto at = allocations_.find(reinterpret_cast<uintptr_t>(base));
  if (at == allocations_.end() || owned(at->second.kind)) return false;
  allocations_.erase(at);
  return true;
}

std::optional<Allocation> Memory::find(const void* address) const {
  const std::lock_guard lock(mutex_);
  auto at = allocations_.upper_bound(reinterpret_cast<uintptr_t>(address));
  if (at == allocations_.begin()) return std::nullopt;
  --at;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(address) - at->first;
  if (offset >= std::max<size_t>(at->second.bytes, 1)) return std::nullopt;
  return at->second;
}

size_t Memory::used() const {
  const std::lock_guard lock(mutex_);
  return used_;
}

}  // namespace pop::emulator
