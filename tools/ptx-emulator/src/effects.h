// What a statement reads, writes and touches: what the checks and the counts know of it. Made from the statement alone,
// beside the instructions that carry it out.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ptx.h"

namespace ptx_emulator {

// How never-written bytes of the sources come out in the destinations.
enum class Flow : uint8_t {
  kNone,      // no destination in registers
  kFine,      // the destination is written, whatever the sources
  kUse,       // arithmetic: the result depends on every source
  kAcross,    // the same over all lanes (votes)
  kCopy,      // bytes of the sources, one after another, are the bytes of the destinations
  kBytewise,  // byte k depends on byte k of every source
  kAnd,       // the same, but a written zero byte decides
  kOr,        // the same, but a written byte of ones decides
  kSelect,    // d, a, b, p: one of two
  kCompare,   // setp with a boolean operation: a written third operand may decide
  kPermute,   // prmt with a constant selector
  kShift,     // shl and shr by a constant: bytes that are shifted out do not matter
  kShuffle,   // from another lane
  kExtend,    // integer conversion: low bytes copied, the rest zeros or the sign
  kMultiply,  // mma: rows of A, columns of B
  kMemory,    // from memory
};

enum class Touch : uint8_t {
  kNone,
  kLoad,
  kStore,
  kAtomic,
  kAsyncCopy,
  kAsyncCommit,
  kAsyncWait,
  kMatrixLoad,
  kMatrixStore,
  kFence,
  kMbarrier,
  kBulkCopy,
  kBulkCommit,
  kBulkWait,
  kProxyFence,     // between the generic and the asynchronous proxy
  kMultiplyAsync,  // wgmma.mma_async, and what orders it
  kMultiplyFence,
  kMultiplyCommit,
  kMultiplyWait,
};

// What an instruction is counted as.
enum class Class : uint8_t {
  kInteger,
  kFloat,
  kDouble,
  kHalf,
  kConversion,
  kMove,
  kPredicate,
  kControl,
  kGlobalLoad,
  kGlobalStore,
  kSharedLoad,
  kSharedStore,
  kLocal,
  kParameter,
  kAtomic,
  kAsyncCopy,
  kAsyncWait,
  kMatrix,
  kTensor,
  kBarrier,
  kFence,
  kWarp,
  kOther,
};
inline constexpr int kClasses = static_cast<int>(Class::kOther) + 1;
const char* class_name(Class c);

enum class Strength : uint8_t { kWeak, kBlock, kDevice };  // a strong access, and its scope

struct LaneSlot {
  uint32_t slot = ~0u;  // ~0: a constant
  uint8_t bytes = 0;    // of a lane; 0: a predicate
};

struct InstructionEffects {
  Flow flow = Flow::kNone;
  Touch touch = Touch::kNone;
  Class counted = Class::kOther;
  Strength strength = Strength::kWeak;
  bool acquire = false, release = false;
  bool aligned = false;       // every live lane of the warp must execute it together
  bool control = false;       // a branch, call, exit or barrier: its sources decide where to go
  bool sign = false;          // kExtend and loads: the sign fills the rest
  bool decides_zero = false;  // kCompare: .and (a false third operand decides); otherwise .or
  bool compare_negated = false;
  uint32_t compare_slot = ~0u;  // kCompare: the third operand
  bool reads = false;           // kAtomic: depends on what is there; kBulkWait: for reads only
  bool last = false;     // stands at the last instruction of its statement (the others have no effect of their own)
  uint8_t element = 0;   // memory: bytes of an element
  uint8_t elements = 0;  // of a vector, or matrices
  Space space = Space::kGeneric;
  bool narrow = false;     // the address is a 32-bit register
  uint32_t address = ~0u;  // slot
  int64_t offset = 0;
  bool address_constant = false;
  uint32_t second_address = ~0u;  // cp.async: the source, and the slot of its size
  int64_t second_offset = 0;
  int64_t groups = 0;       // cp.async.wait_group; -1: all. prmt: the selector. Shifts: bits to the left
  uint64_t operations = 0;  // of a tensor-core instruction: multiplications and additions of the warp
  int m = 0, k_registers_a = 0, registers_b = 0;  // mma: rows, registers of A and B
  bool half_in = false, half_out = false;         // mma: packed accumulators
  std::vector<LaneSlot> sources, destinations;    // not addresses
  uint32_t guard = ~0u;
  uint32_t id = 0;  // in the kernel
};

}  // namespace ptx_emulator
