// What executes: decoded instructions, frames of registers, warps, blocks and launches.
#pragma once

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "effects.h"
#include "mbarrier.h"
#include "ptx.h"

namespace ptx_emulator {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

// Generic addresses of shared and local memory: windows where no host address can be. Every other address is the host's
// own.
inline constexpr uint64_t kSharedWindow = 0x0800'0000'0000'0000;
inline constexpr uint64_t kLocalWindow = 0x0a00'0000'0000'0000;
inline constexpr uint64_t kWindowMask = 0xff00'0000'0000'0000;

struct Warp;
struct WarpShadow;
struct Block;
struct Instruction;
struct Code;
struct Kernel;
struct Module;
struct Work;

using Handler = void (*)(Warp&, const Instruction&);

// What the scheduler does with an instruction; everything but control flow and waiting is kPlain.
enum class Kind : uint8_t {
  kPlain,
  kBranch,
  kBranchIndirect,
  kReturn,
  kExit,
  kCall,
  kBarrier,
  kWarpSync,
  kSleep,
  kSignal,  // may end a phase of an mbarrier
  kWait,    // goes on where its predicate came out true, and waits for a phase otherwise
  kRegisters
};  // setmaxnreg

struct Instruction {
  Handler run = nullptr;
  const uint32_t* slots = nullptr;  // byte offsets into the frame: destinations, then sources
  int64_t immediate = 0;            // address offset, or what the instruction needs
  uint32_t guard = 0;               // byte offset of the guard predicate (a constant one for none)
  uint32_t guard_flip = 0;          // all ones for @!p
  uint32_t target = 0;      // branch target; call: index into Code::calls; indirect branch: index into Code::tables
  uint32_t reconverge = 0;  // immediate post-dominator of a branch
  uint32_t statement = 0;   // index into the function's statements
  uint16_t count = 0;       // elements of a vector access
  Kind kind = Kind::kPlain;
  bool pseudo = false;  // one of several steps of a statement, not its first
};

// Registers that hold a value from the start, by what they hold.
enum class Special : uint8_t {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneId,
  kWarpId,
  kNwarpId,
  kSmId,
  kNsmId,
  kGridId,
  kLanemaskEq,
  kLanemaskLe,
  kLanemaskLt,
  kLanemaskGe,
  kLanemaskGt,
  kDynamicShared,
  kTotalShared,
  kZero,
  kOne,
  kParameterBase,
  kLocalBase,
  kWorkspaceHigh,
  kWorkspaceLow,
  kReservedBegin,
  kReservedEnd,
};

struct Preset {
  uint32_t slot;
  Special special;
  uint8_t bytes;
};

struct Constant {
  uint32_t slot;
  uint64_t bits;
  uint8_t bytes;  // of a lane; 0: a predicate
};

// A call's arguments are copied between the local memories of the caller's and the callee's frames, lane by lane.
struct ArgumentCopy {
  uint32_t from, to, bytes;
};
enum class Builtin : uint8_t { kNone, kPrintf, kAssertFail, kMalloc, kFree };
struct Call {
  const Code* callee = nullptr;  // null: a builtin, or indirect
  Builtin builtin = Builtin::kNone;
  uint32_t pointer_slot = 0;  // indirect: the register with the function's address
  std::vector<ArgumentCopy> arguments,
      results;  // `to` of an argument and `from` of a result: offsets in the callee's frame
  std::vector<uint32_t> argument_bytes, result_bytes;
};

// A decoded function. Kernels decode the functions that they call for themselves, as shared memory is laid out per
// kernel.
struct Code {
  const Function* function = nullptr;
  std::vector<Instruction> instructions;  // and one past the end is the function's exit
  std::vector<uint32_t> slots;
  std::vector<Constant> constants;
  std::vector<Preset> presets;
  std::vector<Call> calls;
  std::vector<std::vector<uint32_t>> tables;  // of indirect branches
  std::unordered_map<const Variable*, uint32_t>
      local_offsets;  // .local and .param variables in the frame's local memory
  uint32_t frame_bytes = 0;
  uint32_t local_bytes = 0;
  bool entry = false;
  std::vector<InstructionEffects> effects;  // of each instruction; what a statement does is said at its last
  std::vector<LaneSlot> registers;          // of the function
  uint32_t first_id = 0;                    // of its instructions in the kernel
};

struct Parameter {
  uint32_t offset, bytes, alignment;
  Type type;
  bool array;
};

struct Kernel {
  std::string name;
  Module* module = nullptr;
  const Function* function = nullptr;
  const Code* entry = nullptr;
  std::unordered_map<const Function*, std::unique_ptr<Code>> codes;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t static_shared = 0;
  uint32_t local_bytes = 0;  // per thread, for everything it calls
  bool recursive = false;
  bool sets_registers = false;             // setmaxnreg
  bool asynchronous = false;               // uses mbarriers or the asynchronous proxy
  bool reserved_shared = false;            // uses the kilobyte of shared memory that the system keeps for itself
  uint32_t instructions = 0;               // of all codes
  std::vector<const Code*> ordered_codes;  // by first_id
  int registers = 32;
  int max_threads = 1024;
  int max_dynamic_shared = 48 * 1024;
};

struct Frame {
  const Code* code = nullptr;
  uint8_t* registers = nullptr;
  Frame* caller = nullptr;
  const Call* call = nullptr;
  uint32_t return_pc = 0;
  uint32_t local_base = 0;
  uint32_t lanes = 0;          // still inside
  uint32_t* shadow = nullptr;  // which values were never written (checks/initialization.cpp)
};

// Where lanes that diverged meet again. Lanes that wait here may be let go early, if the others spin: they then go on
// alone.
struct Join {
  Frame* frame;
  uint32_t pc;
  uint32_t expected, arrived;
  Join* parent;
};

// Lanes that run together.
struct ConvergenceGroup {
  uint32_t pc = 0;
  uint32_t mask = 0;
  Frame* frame = nullptr;
  Join* join = nullptr;
};

struct FreeBytes {
  void operator()(uint8_t* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], FreeBytes>;  // zeroed, on a 64-byte boundary
AlignedBytes aligned_bytes(size_t bytes);

// What the checks are told of operations on mbarriers as they happen.
struct MbarrierObserver {
  virtual ~MbarrierObserver() = default;
  // A lane is about to: false if it must not.
  virtual bool mbarrier(Warp& w, int lane, uint32_t at, MbarrierUse use, const MbarrierChange& change) = 0;
  virtual void phase_completed(Warp& w, uint32_t at) = 0;
};

struct Warp {
  // What handlers use.
  uint8_t* registers = nullptr;  // of the current frame
  uint32_t active = 0;           // lanes that execute the current instruction
  uint32_t polls = 0;            // loads and atomics that may be part of a spin
  const uint8_t* parameters = nullptr;
  uint8_t* shared = nullptr;
  uint32_t shared_bytes = 0;
  uint32_t local_stride = 0;  // bytes of local memory a lane has
  uint8_t* local = nullptr;
  uint64_t issued = 0;  // warp instructions so far: also its clock
  Block* block = nullptr;
  const Instruction* current = nullptr;
  Frame* frame = nullptr;                // current
  WarpShadow* shadow = nullptr;          // of a checked launch (checks/shadow.h)
  MbarrierObserver* observer = nullptr;  // of a checked launch
  uint32_t phases = 0;                   // of mbarriers that its instructions ended, since the scheduler last looked

  // What the scheduler uses.
  uint64_t writes = 0;   // stores, and atomics that changed something
  uint32_t index = 0;    // in the block
  uint32_t live = 0;     // lanes that have not exited
  uint32_t held = 0;     // registers of a thread, where setmaxnreg is used
  uint32_t present = 0;  // lanes that exist at all
  bool spinning = false;
  uint32_t spins = 0, stalls = 0;
  uint64_t slice = 0;       // instructions left of its turn, in checked launches
  uint64_t turns_spun = 0;  // in a row
  Frame* entry = nullptr;
  std::deque<ConvergenceGroup> ready;
  std::vector<ConvergenceGroup> parked;  // wait for other lanes of this warp
  std::vector<Join*> joins;              // in use
  std::vector<std::unique_ptr<Join>> join_storage;
  std::vector<Join*> free_joins;
  std::vector<std::unique_ptr<Frame>> frames;
  std::unordered_map<const Code*, std::vector<Frame*>> free_frames;
  std::vector<AlignedBytes> storage;
  AlignedBytes local_storage;

  template <class T>
  T* lanes(uint32_t slot) const {
    return reinterpret_cast<T*>(registers + slot);
  }
  uint32_t& predicate(uint32_t slot) const { return *reinterpret_cast<uint32_t*>(registers + slot); }
};

// A kernel that failed on the device: the runtime's error code, and what happened where.
struct KernelFault {
  int code;
  std::string message;
};
// cudaError_t values that faults have, so that the core needs none of CUDA's headers.
inline constexpr int kIllegalAddress = 700, kLaunchTimeout = 702, kAssertFailed = 710, kLaunchFailure = 719,
                     kMisalignedAddress = 716, kIllegalInstruction = 715, kInvalidPc = 718;

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct LaunchRequest {
  const Kernel* kernel = nullptr;
  Dim3 grid, block;
  uint32_t dynamic_shared = 0;
  bool cooperative = false;  // all blocks resident: they may synchronise
  std::vector<uint8_t> parameters;
  std::vector<std::shared_ptr<const Work>> concurrent;  // earlier launches and copies that nothing orders before this
};

struct LaunchResult {
  int code = 0;
  std::string message;
  uint64_t warp_instructions = 0;
  std::pair<uint32_t, uint32_t> warps{0, 0};  // by which the checks know it
};

struct DeviceLimits {
  int sm_count = 108;
  int capability_major = 8, capability_minor = 0;
  int shared_per_block = 48 * 1024;
  int shared_per_block_optin = 163 * 1024;
  int shared_per_sm = 164 * 1024;
  int threads_per_sm = 2048;
  int blocks_per_sm = 32;
  int registers_per_sm = 65536;
  const char* name = "PTX emulator (sm_80 model)";
};
const DeviceLimits& device_limits();

// Blocks of a kernel that fit on one multiprocessor at a time.
int occupancy(const Kernel& kernel, uint32_t threads, uint32_t dynamic_shared);

// Runs a grid to its end.
LaunchResult run_grid(const LaunchRequest& request);

// The name of a source file of -lineinfo; empty if unknown.
std::string source_file(const Kernel& kernel, int index);

// Where a statement stands, for messages.
std::string describe(const Code& code, const Instruction& instruction);

}  // namespace ptx_emulator
