#include "cpu/dispatch.h"

#include <atomic>
#include <stdexcept>

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
POP_DECLARE_SET(avx512_bf16)
POP_DECLARE_SET(avx2)
#endif
POP_DECLARE_SET(portable)

namespace {

// In the order of POP_FOR_EACH_OPERATION.
const Kernels kKernels[] = {
#if defined(__x86_64__)
    {"avx512_bf16",
     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
     avx512_bf16::attention, avx512_bf16::gated_linear, avx512_bf16::linear, avx512_bf16::project_kv,
     avx512_bf16::qkv_project, avx512_bf16::rms_norm},
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::attention, avx2::gated_linear,
     avx2::linear, avx2::project_kv, avx2::qkv_project, avx2::rms_norm},
#endif
    {"portable", true, portable::attention, portable::gated_linear, portable::linear, portable::project_kv,
     portable::qkv_project, portable::rms_norm},
};

const Kernels* fastest() {
  for (const Kernels& k : kKernels)
    if (k.supported) return &k;
  return nullptr;
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
