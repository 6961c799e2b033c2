// What is not an operation: pop_ext._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include "cpu/dispatch.h"
#include "cpu/topology.h"

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isas", &pop::cpu::instruction_sets,
        "Instruction sets that this build has kernels for and this processor runs, the fastest first. The last, "
        "amx_bf16_emulated, is for tests: the code for AMX's tiles, on tiles in plain arithmetic.");
  m.def("cpu_isa", &pop::cpu::instruction_set, "The instruction set in use.");
  m.def("set_cpu_isa", &pop::cpu::set_instruction_set, pybind11::arg("name"),
        "Uses another of cpu_isas(), for tests and comparisons.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["torch_headers"] = TORCH_VERSION;
    info["cpu_cores"] = pop::cpu::cores();
    return info;
  });
}
