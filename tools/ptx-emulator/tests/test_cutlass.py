"""Kernels that this project did not write compute right: CUTLASS's device GEMMs against float64.

One for sm_80 and one for sm_90a are built and run by default; PTX_EMULATOR_ALL_CUTLASS=1 builds the others, too (about
half a minute each).
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SOURCE = pathlib.Path(__file__).with_name("cutlass_gemm.cu")
HOPPER = pathlib.Path(__file__).with_name("cutlass_hopper.cu")
COLLECTIVE = pathlib.Path(__file__).with_name("cutlass_collective.cu")
# Stream-K's blocks take partial sums over with a relaxed compare-and-swap and a barrier: nothing acquires them. The
# finding is true, and gone with the fence.
SPIN = "while(atomicCAS(flag_ptr, val, 0) != val) {}"
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

# Of sm_90a only the PTX: its machine code takes nvcc a minute, and is not tested.
TARGETS = {"sm_80": ["-arch=sm_80"], "sm_90a": ["-gencode=arch=compute_90a,code=compute_90a"]}
# For sm_90a, without clusters: TMA and wgmma, a producer warp and warpgroups that take turns or go together.
COOPERATIVE = {"TILE": "128,128,64", "SCHEDULE": "Cooperative", "EPILOGUE": "Cooperative"}
HOPPER_KERNELS = {
    "hopper_pingpong": ({}, [(512, 512, 512), (200, 136, 72)]),
    "hopper_cooperative": (COOPERATIVE, [(512, 512, 512), (200, 136, 72)]),
    "hopper_cooperative_256": (COOPERATIVE | {"TILE": "128,256,64"}, [(256, 512, 256)]),
    "hopper_fp16_rows": ({"ELEMENT": "cutlass::half_t", "LAYOUT_B": "RowMajor"}, [(256, 256, 320)]),
    "hopper_e4m3": ({"ELEMENT": "cutlass::float_e4m3_t", "OUTPUT": "cutlass::bfloat16_t"}, [(256, 256, 256)]),
    "hopper_s8": ({"ELEMENT": "int8_t", "ACCUMULATOR": "int32_t", "OUTPUT": "int32_t"}, [(256, 256, 256)]),
}


@pytest.fixture
def build(nvcc, tmp_path):
    package = importlib.util.find_spec("cutlass_library")
    if package is None:
        pytest.skip("nvidia-cutlass is not installed")
    include = pathlib.Path(package.submodule_search_locations[0]) / "source" / "include"
    flags = ["-std=c++17", "-O1", "-cudart", "shared", "--expt-relaxed-constexpr"]

    def compile_program(source: pathlib.Path, fence: bool = False, target: str = "sm_80") -> pathlib.Path:
        if fence:  # a copy of one header, mended
            text = (include / "cutlass" / "barrier.h").read_text()
            assert text.count(SPIN) == 1
            (tmp_path / "mended" / "cutlass").mkdir(parents=True)
            (tmp_path / "mended" / "cutlass" / "barrier.h").write_text(text.replace(SPIN, SPIN + " __threadfence();"))
        folders = [f"-I{tmp_path / 'mended'}"] * fence + [f"-I{include}"]
        nvcc(*flags, *TARGETS[target], *folders, "-o", tmp_path / "program", source)
        return tmp_path / "program"

    return compile_program


def only_on_request(name: str) -> None:
    if name not in ("bf16_128x128x32_4", "hopper_pingpong") and not os.environ.get("PTX_EMULATOR_ALL_CUTLASS"):
        pytest.skip("PTX_EMULATOR_ALL_CUTLASS=1 builds this one")


@pytest.mark.parametrize("name", KERNELS)
def test_gemm(name, build, run_cuda, tmp_path):
    only_on_request(name)
    macros, problems = KERNELS[name]
    source = tmp_path / "gemm.cu"
    source.write_text("".join(f"#define GEMM_{k} {v}\n" for k, v in macros.items()) + f'#include "{SOURCE}"\n')
    program = build(source)
    for problem in problems:
        print(name, run_cuda.execute(program, *map(str, problem)).stdout.strip())
    if name == "stream_k":
        found = run_checked(run_cuda, program, problems[-1], tmp_path, "roundrobin", 0)["findings"]
        assert {f["rule"] for f in found} == {"race"} and all("ld.global" in f["text"] for f in found)
        program = build(source, fence=True)
    for schedule, seed in SCHEDULES:
        assert run_checked(run_cuda, program, problems[-1], tmp_path, schedule, seed)["findings"] == []
    if name == "bf16_128x128x32_4":
        check_totals(run_checked(run_cuda, program, (512, 512, 512), tmp_path, "roundrobin", 0)["launches"][0])
        check_static(program)


@pytest.mark.parametrize("name", HOPPER_KERNELS)
def test_hopper_gemm(name, build, run_cuda, tmp_path):
    only_on_request(name)
    macros, problems = HOPPER_KERNELS[name]
    source = tmp_path / "gemm.cu"
    source.write_text("".join(f"#define GEMM_{k} {v}\n" for k, v in macros.items()) + f'#include "{HOPPER}"\n')
    program = build(source, target="sm_90a")
    for problem in problems:
        ran = run_cuda.execute(program, *map(str, problem), environment={"PTX_EMULATOR_SM": "90"})
        print(name, ran.stdout.strip())
    for schedule, seed in SCHEDULES:
        assert run_checked(run_cuda, program, problems[-1], tmp_path, schedule, seed, sm=90)["findings"] == []
    if name == "hopper_pingpong":
        launch = run_checked(run_cuda, program, (512, 512, 512), tmp_path, "roundrobin", 0, sm=90)["launches"][0]
        assert launch["operations"] == 2 * 512**3
        # Tiles of 64 x 128, 8 steps of 64: a box of A and one of B each.
        loads = [i for i in launch["instructions"] if "shared::cluster.global" in i["text"]]
        assert sorted(i["bytes"] for i in loads) == [8 * 4 * 8 * 64 * 64 * 2, 8 * 4 * 8 * 128 * 64 * 2]


def test_collective(build, run_cuda, tmp_path):
    only_on_request("collective")
    program = build(COLLECTIVE)
    print("collective", run_cuda.execute(program).stdout.strip())
    for schedule, seed in SCHEDULES:
        assert run_checked(run_cuda, program, (), tmp_path, schedule, seed)["findings"] == []


SCHEDULES = [("roundrobin", 0), ("random", 1), ("random", 2), ("adversarial", 1), ("adversarial", 2)]


def run_checked(run_cuda, program, problem, folder, schedule, seed, sm=80) -> dict:
    """Runs with every check and all counts."""
    report = folder / "report.json"
    environment = {"PTX_EMULATOR_CHECK": "all", "PTX_EMULATOR_COUNT": "1", "PTX_EMULATOR_REPORT": str(report)}
    environment |= {"PTX_EMULATOR_SCHEDULE": schedule, "PTX_EMULATOR_SEED": str(seed), "PTX_EMULATOR_SM": str(sm)}
    run_cuda.execute(program, *map(str, problem), environment=environment)
    return json.loads(report.read_text())


def check_totals(launch) -> None:
    """M = N = K = 512, tiles of 128 x 128 x 32: 16 blocks take 16 steps each."""
    assert launch["operations"] == 2 * 512**3
    assert launch["classes"]["tensor"]["issued"] == 512**3 // (16 * 8 * 16)
    copies = [i for i in launch["instructions"] if i["class"] == "async_copy"]
    assert sum(i["bytes"] for i in copies) == 16 * 16 * (128 + 128) * 32 * 2  # rows of A and B, bf16
    assert sum(i["sectors"] for i in copies) == sum(i["bytes"] for i in copies) // 32
    sizes = {"distinct_read": [0, 512 * 512 * 2, 512 * 512 * 2], "distinct_written": [0, 0, 512 * 512 * 2]}
    for key, expected in sizes.items():
        assert sorted(a[key] for a in launch["allocations"]) == expected
    (main,) = [loop for loop in launch["loops"] if loop["main"]]
    assert main["trips"] == 16 * 4 * 16 and main["operations"] == launch["operations"]


def check_static(program) -> None:
    """The command's reports. A warp's tile of 64 x 64 x 32 takes 64 multiplications in PTX and in SASS."""

    def command(option: str) -> list[str]:
        run = [sys.executable, "-m", "ptx_emulator", option, str(program), "256", "256", "256"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()

    rows = [row.split() for row in command("--annotate") if "mma.sync.aligned.m16n8k16" in row]
    assert [row[0] for row in rows] == [str(4 * 4 * 8)] * 64  # 4 warps of 4 blocks in 8 steps
    try:
        rows = command("--static")
    except subprocess.CalledProcessError as error:
        assert "is not installed" in error.stderr
        return
    at = next(k for k, row in enumerate(rows) if row.startswith("  main loop 0x"))
    assert "HMMA 64" in rows[at] and "LDSM" in rows[at] and "LDGSTS" in rows[at]
    assert "128 warp trips" in rows[at + 1] and "tensor 64" in rows[at + 1]
    assert rows[at + 2].startswith("    1 of these trips each")
    facts = next(row for row in rows if row.startswith("static facts for sm_80"))
    assert "spills 0 bytes stored" in facts and "65536 dynamic" in facts
    assert any("2 blocks of 128 threads" in row and "shared memory 2" in row for row in rows)
