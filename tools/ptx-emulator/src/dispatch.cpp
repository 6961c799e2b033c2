// Chooses the semantics compiled for the best instruction set that the host has.
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "decode.h"

namespace ptx_emulator {

#define PTX_DECLARE(isa)         \
  namespace isa {                \
  InstructionTable make_table(); \
  }
PTX_DECLARE(avx512)
PTX_DECLARE(avx2)
PTX_DECLARE(portable)

const InstructionTable& instruction_table() {
  static const InstructionTable table = [] {
    const char* wanted = std::getenv("PTX_EMULATOR_ISA");
    const auto is = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
#ifdef PTX_HAS_avx512
    if (is("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return avx512::make_table();
#endif
#ifdef PTX_HAS_avx2
    if (is("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
      return avx2::make_table();
#endif
#ifdef PTX_HAS_portable
    (void)is;
    return portable::make_table();
#else
    throw std::runtime_error("the emulator was built for processors with other instructions");
#endif
  }();
  return table;
}

}  // namespace ptx_emulator
