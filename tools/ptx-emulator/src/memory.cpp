#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace ptx_emulator {

namespace {
constexpr size_t kAlignment = 512;
constexpr size_t kRedZone = 64 * 1024;            // beside each allocation while bytes are tracked
constexpr size_t kQuarantine = 64 * 1024 * 1024;  // bytes of freed memory that are kept from reuse meanwhile
constexpr size_t kFreedRemembered = 256;
bool owned(Allocation::Kind kind) { return kind != Allocation::Kind::kRegistered; }
// The host reads and writes these as it likes, unseen.
bool host_writes(Allocation::Kind kind) {
  return kind == Allocation::Kind::kManaged || kind == Allocation::Kind::kPinned ||
         kind == Allocation::Kind::kRegistered;
}
}  // namespace

Pages::~Pages() { drop(); }

void Pages::drop() {
  if (data_) munmap(data_, bytes_);
  data_ = nullptr, bytes_ = 0;
}

uint8_t* Pages::reserve(size_t bytes) {
  if (data_ && bytes <= bytes_) return data_;
  drop();
  bytes = std::max<size_t>(bytes, 1);
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(p), bytes_ = bytes;
  return data_;
}

Memory& Memory::instance() {
  static Memory* memory = new Memory;  // outlives static destructors that still free
  return *memory;
}

size_t Memory::capacity() const {
  static const size_t bytes = [] {
    const char* text = std::getenv("PTX_EMULATOR_MEMORY_GB");
    return static_cast<size_t>(text ? std::atof(text) * 1e9 : 40e9);
  }();
  return bytes;
}

uint8_t* Memory::allocate(size_t bytes, Allocation::Kind kind, std::string name) {
  const std::lock_guard lock(mutex_);
  if (bytes > capacity() - used_) return nullptr;
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  const size_t zone = tracking_ ? kRedZone : 0;
  auto* block = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, rounded + 2 * zone));
  if (!block) return nullptr;
  uint8_t* const base = block + zone;
  used_ += bytes;
  open(reinterpret_cast<uintptr_t>(base), bytes, host_writes(kind) || kind == Allocation::Kind::kVariable, name);
  allocations_[reinterpret_cast<uintptr_t>(base)] = {base, bytes, kind, std::move(name), block};
  return base;
}

bool Memory::release(const void* base, bool only_pinned) {
  const std::lock_guard lock(mutex_);
  const auto at = allocations_.find(reinterpret_cast<uintptr_t>(base));
  if (at == allocations_.end() || !owned(at->second.kind)) return false;
  const bool pinned = at->second.kind == Allocation::Kind::kPinned;
  if (pinned != only_pinned) return false;
  used_ -= at->second.bytes;
  close(at->first, at->second.block);
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
  enroll(base, bytes, true, name);
  allocations_[first] = {static_cast<uint8_t*>(base), bytes, kind, std::move(name)};
  return true;
}

bool Memory::remove(const void* base) {
  const std::lock_guard lock(mutex_);
  const auto at = allocations_.find(reinterpret_cast<uintptr_t>(base));
  if (at == allocations_.end() || owned(at->second.kind)) return false;
  dismiss(base);
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

// A region of its own; what it covers of others becomes part of it.
void Memory::open(uintptr_t base, size_t bytes, bool written, std::string name) {
  forget_freed(base, bytes);
  std::vector<std::shared_ptr<Region>> covered;
  uintptr_t first = base, end = base + bytes;
  for (auto at = regions_.begin(); at != regions_.end();) {
    Region& other = *at->second;
    if (other.base < base + bytes && base < other.base + other.bytes) {
      if (other.base <= base && other.base + other.bytes >= base + bytes) {  // nothing new but what is written
        if (written && other.unwritten.data()) std::memset(other.unwritten.data() + (base - other.base), 0, bytes);
        return;
      }
      first = std::min(first, other.base), end = std::max(end, other.base + other.bytes);
      covered.push_back(at->second);
      at = regions_.erase(at);
    } else {
      ++at;
    }
  }
  auto region = std::make_shared<Region>();
  region->base = first, region->bytes = end - first, region->id = next_id_++;
  region->name = std::move(name);
  if (tracking_) {
    const bool shadow = !written || std::any_of(covered.begin(), covered.end(),
                                                [](const auto& other) { return other->unwritten.data() != nullptr; });
    if (shadow) {
      uint8_t* const bits = region->unwritten.reserve(region->bytes);
      if (!written) std::memset(bits + (base - first), 0xff, bytes);
      for (const auto& other : covered) {
        uint8_t* const to = bits + (other->base - first);
        for (size_t k = 0; k < other->bytes; ++k) {
          const bool inside = other->base + k >= base && other->base + k < base + bytes;
          to[k] = (inside && written) || !other->unwritten.data() ? 0 : other->unwritten.data()[k];
        }
      }
    }
  }
  for (const auto& other : covered)
    if (region->name.empty()) region->name = other->name;
  regions_[first] = std::move(region);
  ++version_;
}

void Memory::close(uintptr_t base, uint8_t* block) {
  const auto at = regions_.find(base);
  Freed entry{base, at == regions_.end() ? 0 : at->second->bytes, at == regions_.end() ? "" : at->second->name, block};
  if (at != regions_.end()) regions_.erase(at);
  ++version_;
  if (!tracking_) entry.block = nullptr, std::free(block);
  if (entry.block) quarantined_ += entry.bytes;
  freed_.push_back(std::move(entry));
  while (freed_.size() > kFreedRemembered || quarantined_ > kQuarantine) {
    if (freed_.front().block) quarantined_ -= freed_.front().bytes, std::free(freed_.front().block);
    freed_.pop_front();
  }
}

void Memory::forget_freed(uintptr_t base, size_t bytes) {
  std::erase_if(freed_, [&](const Freed& f) { return !f.block && f.base < base + bytes && base < f.base + f.bytes; });
}

std::string Memory::freed(uintptr_t address) const {
  const std::lock_guard lock(mutex_);
  for (auto f = freed_.rbegin(); f != freed_.rend(); ++f)
    if (address >= f->base && address < f->base + f->bytes)
      return (f->name.empty() ? "an allocation of " + std::to_string(f->bytes) + " bytes" : "'" + f->name + "'");
  return {};
}

void Memory::enroll(const void* base, size_t bytes, bool written, std::string name) {
  const std::lock_guard lock(mutex_);
  const uintptr_t first = reinterpret_cast<uintptr_t>(base);
  registrations_.push_back({first, bytes, name});
  if (bytes) open(first, bytes, written, std::move(name));
}

// The union of the registrations that are left may fall apart: their regions are made anew, their shadows kept.
bool Memory::dismiss(const void* base) {
  const std::lock_guard lock(mutex_);
  const uintptr_t first = reinterpret_cast<uintptr_t>(base);
  const auto found = std::find_if(registrations_.rbegin(), registrations_.rend(),
                                  [&](const Registration& r) { return r.base == first; });
  if (found == registrations_.rend()) return false;
  registrations_.erase(std::next(found).base());
  const std::shared_ptr<Region> region = region_at(first);
  if (!region || allocations_.contains(region->base)) {
    const auto at = allocations_.find(first);
    if (!region || owned(at == allocations_.end() ? Allocation::Kind::kDevice : at->second.kind)) return true;
  }
  regions_.erase(region->base);
  for (const Registration& r : registrations_)
    if (r.bytes && r.base < region->base + region->bytes && region->base < r.base + r.bytes) {
      open(r.base, r.bytes, true, r.name);
    }
  // Written bytes as they were.
  if (region->unwritten.data())
    for (auto& [start, part] : regions_) {
      if (start < region->base || start >= region->base + region->bytes) continue;
      const uint8_t* from = region->unwritten.data() + (start - region->base);
      std::memcpy(part->unwritten.reserve(part->bytes), from, part->bytes);
    }
  ++version_;
  return true;
}

std::shared_ptr<Region> Memory::region_at(uintptr_t address) const {
  auto at = regions_.upper_bound(address);
  if (at == regions_.begin()) return nullptr;
  --at;
  return address < at->second->base + at->second->bytes ? at->second : nullptr;
}

void Memory::track(bool on) {
  const std::lock_guard lock(mutex_);
  if (on == tracking_) return;
  tracking_ = on;
  if (!on)
    for (auto& [base, region] : regions_) region->unwritten.drop();
  ++version_;
}

void Memory::mark_written(const void* base, size_t bytes) {
  if (!tracking_) return;
  const std::lock_guard lock(mutex_);
  const uintptr_t first = reinterpret_cast<uintptr_t>(base);
  const auto region = region_at(first);
  if (!region || !region->unwritten.data()) return;
  std::memset(region->unwritten.data() + (first - region->base), 0,
              std::min(bytes, region->base + region->bytes - first));
}

void Memory::copy_written(const void* to, const void* from, size_t bytes) {
  if (!tracking_) return;
  const std::lock_guard lock(mutex_);
  const auto target = region_at(reinterpret_cast<uintptr_t>(to));
  const auto source = region_at(reinterpret_cast<uintptr_t>(from));
  if (!target) return;
  if (!source || !source->unwritten.data()) return mark_written(to, bytes);
  const size_t at = reinterpret_cast<uintptr_t>(to) - target->base,
               read = reinterpret_cast<uintptr_t>(from) - source->base;
  bytes = std::min({bytes, target->bytes - at, source->bytes - read});
  std::memmove(target->unwritten.reserve(target->bytes) + at, source->unwritten.data() + read, bytes);
}

const void* Memory::first_unwritten(const void* base, size_t bytes) const {
  const std::lock_guard lock(mutex_);
  const uintptr_t first = reinterpret_cast<uintptr_t>(base);
  const auto region = region_at(first);
  if (!region || !region->unwritten.data()) return nullptr;
  const uint8_t* from = region->unwritten.data() + (first - region->base);
  const uint8_t* end = from + std::min(bytes, region->base + region->bytes - first);
  const uint8_t* found = std::find_if(from, end, [](uint8_t b) { return b != 0; });
  return found == end ? nullptr : static_cast<const uint8_t*>(base) + (found - from);
}

std::vector<std::shared_ptr<Region>> Memory::regions() const {
  const std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<Region>> all;
  for (const auto& [base, region] : regions_) all.push_back(region);
  return all;
}

}  // namespace ptx_emulator
