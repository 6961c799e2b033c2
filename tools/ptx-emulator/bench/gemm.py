"""How fast the PTX emulator is: warp instructions a second in CUTLASS's 512 x 512 x 512 bf16 GEMM, plain, with
every check, and with every check and all counts.

Loading is reported beside them.

python bench/gemm.py [size] [repetitions]
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import ptx_emulator

SOURCE = pathlib.Path(__file__).resolve().parents[1] / "tests" / "cutlass_gemm.cu"


def main() -> None:
    size, repetitions = (sys.argv[1:] + ["512", "5"][len(sys.argv) - 1 :])[:2]
    package = importlib.util.find_spec("cutlass_library")
    include = pathlib.Path(package.submodule_search_locations[0]) / "source" / "include"
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "gemm"
        flags = ["-std=c++17", "-O1", "-arch=sm_80", "-cudart", "shared", "--expt-relaxed-constexpr", f"-I{include}"]
        subprocess.run(["nvcc", *flags, "-o", str(program), str(SOURCE)], check=True)
        environment = dict(os.environ, LD_LIBRARY_PATH=str(ptx_emulator.library_path()))
        began = time.perf_counter()
        subprocess.run([program, "16", "16", "16"], env=environment, check=True, stdout=subprocess.DEVNULL)
        print(f"loading and a 16x16x16 GEMM: {time.perf_counter() - began:.3f} s")
        for name, extra in {
            "plain": {},
            "checks": {"PTX_EMULATOR_CHECK": "all"},
            "checks and counts": {"PTX_EMULATOR_CHECK": "all", "PTX_EMULATOR_COUNT": "1"},
        }.items():
            print(f"{name}: ", end="", flush=True)
            subprocess.run([program, size, size, size, "1", repetitions], env=environment | extra, check=True)


if __name__ == "__main__":
    main()
