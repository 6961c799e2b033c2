// An mbarrier: 64 bits of shared memory that count arrivals and bytes, phase after phase.
#pragma once

#include <cstdint>

namespace ptx_emulator {

// From the lowest bit: arrivals that the phase still waits for (20 bits), arrivals of every phase (20), bytes that the
// phase still waits for (21, biased), the phase's parity, and a mark that memory does not have by chance.
class Mbarrier {
 public:
  static constexpr uint32_t kMost = (1u << 20) - 1;  // arrivals, and bytes either way

  explicit Mbarrier(uint64_t bits) : bits_(bits) {}
  static Mbarrier initial(uint32_t count) {
    Mbarrier b(kMark);
    b.set(count, count, 0);
    return b;
  }

  uint64_t bits() const { return bits_; }
  bool valid() const { return (bits_ & kMarkMask) == kMark; }
  uint32_t pending() const { return static_cast<uint32_t>(bits_) & kMost; }
  uint32_t expected() const { return static_cast<uint32_t>(bits_ >> 20) & kMost; }
  int32_t bytes() const { return static_cast<int32_t>(bits_ >> 40 & 0x1fffff) - (1 << 20); }
  uint32_t parity() const { return bits_ >> 61 & 1; }

  enum class Outcome { kPending, kCompleted, kTooManyArrivals, kTooManyBytes };
  // `bytes` more are expected (fewer, where negative), `arrivals` arrive; `dropped` of later phases, too. An operation
  // that is too much changes nothing. `completes`: the phase may end here.
  Outcome apply(uint32_t arrivals, int64_t bytes, uint32_t dropped, bool completes) {
    const int64_t sum = this->bytes() + bytes;
    if (sum > int64_t{kMost} || sum < -int64_t{kMost}) return Outcome::kTooManyBytes;
    if (arrivals > pending() || dropped > expected()) return Outcome::kTooManyArrivals;
    const uint32_t left = pending() - arrivals, later = expected() - dropped;
    set(left, later, static_cast<int32_t>(sum));
    if (!completes || left || sum) return Outcome::kPending;
    set(later, later, 0);
    bits_ ^= uint64_t{1} << 61;
    return Outcome::kCompleted;
  }

 private:
  static constexpr uint64_t kMark = uint64_t{2} << 62, kMarkMask = uint64_t{3} << 62;
  void set(uint32_t pending, uint32_t expected, int32_t bytes) {
    bits_ = (bits_ & (kMarkMask | uint64_t{1} << 61)) | pending | uint64_t{expected} << 20 |
            static_cast<uint64_t>(bytes + (1 << 20)) << 40;
  }

  uint64_t bits_;
};

// A bulk copy's bytes have landed: whether that ends the phase. Faults where there is no mbarrier.
bool land_on_mbarrier(uint8_t* at, uint32_t bytes);

// What an instruction does to an mbarrier; in Instruction::count.
enum class MbarrierUse : uint16_t { kInit, kInvalidate, kArrive, kExpect, kComplete, kTest, kTry, kCopiesArrive };

// What it changes. Of a wait, `bytes` says whether the phase is over and `dropped` which parity it has.
struct MbarrierChange {
  uint32_t arrivals = 0;
  int64_t bytes = 0;
  uint32_t dropped = 0;
};

}  // namespace ptx_emulator
