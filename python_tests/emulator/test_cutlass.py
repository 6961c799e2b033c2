"""Kernels that this project did not write compute right: CUTLASS's device GEMMs against float64.

One is built and run by default; POP_EMULATOR_ALL_CUTLASS=1 builds the others, too (about half a minute each).
"""

import importlib.util
import os
import pathlib
import subprocess

import pytest

SOURCE = pathlib.Path(__file__).with_name("cutlass_gemm.cu")
COLLECTIVE = pathlib.Path(__file__).with_name("cutlass_collective.cu")
STREAM_K = {"SWIZZLE": "cutlass::gemm::threadblock::ThreadblockSwizzleStreamK"}
TF32 = {"ELEMENT": "cutlass::tfloat32_t", "OUTPUT": "float", "MMA": "16,8,8", "TILE": "128,128,16", "WARP": "64,64,16"}
SIMT = {
    "ELEMENT": "float",
    "CLASS": "cutlass::arch::OpClassSimt",
    "MMA": "1,1,1",
    "TILE": "128,128,8",
    "WARP": "32,64,8",
}
# Macros of the source, and problems: m, n, k, split.
KERNELS = {
    "bf16_128x128x32_4": ({}, [(512, 512, 512), (200, 136, 72)]),
    "bf16_128x128x64_3": ({"TILE": "128,128,64", "WARP": "64,64,64", "STAGES": 3}, [(256, 384, 320)]),
    "bf16_128x256x32_3": ({"TILE": "128,256,32", "STAGES": 3}, [(256, 512, 256)]),
    "fp16_128x128x32_4": ({"ELEMENT": "cutlass::half_t"}, [(256, 256, 256)]),
    "bf16_align2": ({"ALIGN": 2}, [(130, 66, 34), (257, 130, 62)]),
    "tf32": (TF32 | {"ALIGN": 4}, [(256, 256, 128)]),
    "simt": (SIMT | {"ALIGN": 1, "STAGES": 2}, [(129, 130, 67)]),
    "serial_split_k": ({"OUTPUT": "float", "OUTPUT_ALIGN": 4}, [(256, 128, 512, 3)]),
    "parallel_split_k": ({"OUTPUT": "float", "OUTPUT_ALIGN": 4, "PARALLEL": 1}, [(256, 128, 512, 4)]),
    "stream_k": (STREAM_K, [(512, 512, 1024), (384, 640, 512)]),
}


@pytest.fixture
def build(nvcc, tmp_path):
    package = importlib.util.find_spec("cutlass_library")
    if package is None:
        pytest.skip("nvidia-cutlass is not installed")
    include = pathlib.Path(package.submodule_search_locations[0]) / "source" / "include"
    flags = ["-std=c++17", "-O1", "-arch=sm_80", "-cudart", "shared", "--expt-relaxed-constexpr", f"-I{include}"]

    def compile_program(source: pathlib.Path) -> pathlib.Path:
        subprocess.run([nvcc, *flags, "-o", str(tmp_path / "program"), str(source)], check=True)
        return tmp_path / "program"

    return compile_program


def only_on_request(name: str) -> None:
    if name != "bf16_128x128x32_4" and not os.environ.get("POP_EMULATOR_ALL_CUTLASS"):
        pytest.skip("POP_EMULATOR_ALL_CUTLASS=1 builds this one")


@pytest.mark.parametrize("name", KERNELS)
def test_gemm(name, build, run_cuda, tmp_path):
    only_on_request(name)
    macros, problems = KERNELS[name]
    source = tmp_path / "gemm.cu"
    source.write_text("".join(f"#define GEMM_{k} {v}\n" for k, v in macros.items()) + f'#include "{SOURCE}"\n')
    program = build(source)
    for problem in problems:
        print(name, run_cuda.execute(program, *map(str, problem)).stdout.strip())


def test_collective(build, run_cuda):
    only_on_request("collective")
    print("collective", run_cuda.execute(build(COLLECTIVE)).stdout.strip())
