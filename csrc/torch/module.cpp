// What is not an operation: pop_ext._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/topology.h"

#ifndef POP_CUDA_ARCH_LIST
#define POP_CUDA_ARCH_LIST ""  // a build without CUDA kernels
#endif

namespace {

/// CMake's architectures, such as 80-real,90-real,90-virtual, as names of machine code and of PTX.
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
  std::istringstream list(POP_CUDA_ARCH_LIST);
  for (std::string item; std::getline(list, item, ',');) {
    const std::string number = item.substr(0, item.find('-')), kind = item.substr(number.size());
    if (kind != "-virtual") names.push_back("sm_" + number);
    if (kind != "-real") names.push_back("compute_" + number);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isas", &pop::cpu::instruction_sets,
        "Instruction sets that this build has kernels for and this processor runs, the fastest first. The last, "
        "amx_bf16_emulated, is for tests: the code for AMX's tiles, on tiles in plain arithmetic.");
  m.def("cpu_isa", &pop::cpu::instruction_set, "The instruction set in use.");
  m.def("set_cpu_isa", &pop::cpu::set_instruction_set, pybind11::arg("name"),
        "Uses another of cpu_isas(), for tests and comparisons.");
  m.def("cuda_architectures", &cuda_architectures,
        "What the CUDA kernels were compiled to: machine code (sm_90) and PTX (compute_80).");
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["torch_headers"] = TORCH_VERSION;
    info["cpu_cores"] = pop::cpu::cores();
    return info;
  });
}
