#include "cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pop/attention.h"
#include "pop/gated_linear.h"
#include "pop/linear.h"
#include "pop/project_kv.h"
#include "pop/qkv_project.h"
#include "pop/rms_norm.h"

namespace pop::cpu {

#define POP_FOR_EACH_OPERATION(X) \
  X(Attention, attention)         \
  X(GatedLinear, gated_linear)    \
  X(Linear, linear)               \
  X(ProjectKv, project_kv)        \
  X(QkvProject, qkv_project)      \
  X(RmsNorm, rms_norm)

#define POP_DECLARE(Arguments, name) void name(const Arguments&, const Threads&);
#define POP_FIELD(Arguments, name) void (*name)(const Arguments&, const Threads&);

namespace {
struct Kernels {
  const char* instruction_set;
  bool supported;
  POP_FOR_EACH_OPERATION(POP_FIELD)
};
}  // namespace

#define POP_DECLARE_SET(isa)          \
  namespace isa {                     \
  POP_FOR_EACH_OPERATION(POP_DECLARE) \
  }
#if defined(__x86_64__)
POP_DECLARE_SET(amx_bf16)
POP_DECLARE_SET(avx512_bf16)
POP_DECLARE_SET(avx2)
#endif
POP_DECLARE_SET(portable)
POP_DECLARE_SET(amx_bf16_emulated)

namespace {

#if defined(__x86_64__)

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}

/// Whether the processor multiplies bf16 on tiles and the system lets this process use them, which must be asked for.
bool has_amx_bf16() {
#if defined(__linux__)
  constexpr unsigned kOsxsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 1 ECX, leaf 7 EDX
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;                   // of XCR0
  constexpr int kRequestPermission = 0x1023, kTileDataFeature = 18;                  // ARCH_REQ_XCOMP_PERM
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & (kTileConfig | kTileData)) != (kTileConfig | kTileData)) return false;
  return has_avx512_bf16() && syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature) == 0;
#else
  return false;
#endif
}

#endif

// The operations in the order of POP_FOR_EACH_OPERATION.
#define POP_KERNELS(isa, supported) \
  {#isa, supported, isa::attention, isa::gated_linear, isa::linear, isa::project_kv, isa::qkv_project, isa::rms_norm}

// The fastest first; portable is always there, so what comes behind it is never chosen unasked.
const Kernels kKernels[] = {
#if defined(__x86_64__)
    POP_KERNELS(amx_bf16, has_amx_bf16()),
    POP_KERNELS(avx512_bf16, has_avx512_bf16()),
    POP_KERNELS(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")),
#endif
    POP_KERNELS(portable, true),
    POP_KERNELS(amx_bf16_emulated, true),
};

const Kernels* fastest() {
  return std::find_if(std::begin(kKernels), std::end(kKernels), [](const Kernels& k) { return k.supported; });
}
std::atomic<const Kernels*> current{fastest()};

}  // namespace

#define POP_DISPATCH(Arguments, name)                                  \
  void name(const Arguments& arguments, const Threads& threads) {      \
    current.load(std::memory_order_relaxed)->name(arguments, threads); \
  }
POP_FOR_EACH_OPERATION(POP_DISPATCH)

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels& k : kKernels)
    if (k.supported) names.push_back(k.instruction_set);
  return names;
}

std::string instruction_set() { return current.load()->instruction_set; }

void set_instruction_set(const std::string& name) {
  for (const Kernels& k : kKernels) {
    if (k.supported && name == k.instruction_set) {
      current = &k;
      return;
    }
  }
  throw std::invalid_argument("name: \"" + name + "\" is not an instruction set this processor and build have");
}

}  // namespace pop::cpu
