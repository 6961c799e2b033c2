"""What NVIDIA's assembler makes of the CUDA kernels for sm_80, sm_90 and sm_90a: none spills registers."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys

import op_cases
import ptx_emulator
import pytest
import torch
from helpers import cuda_operations

from pop_ext.ops import CUDA_LIBRARY, build_info

ON_SM_90A = os.environ.get("PTX_EMULATOR_SM") == "90"  # see test_on_sm_90a


@pytest.fixture(scope="module")
def modules() -> list[str]:
    """The library's PTX, a text for each source file, as the emulator has it of a launch from each."""
    operations = cuda_operations()
    if torch.cuda.is_available():
        pytest.skip("the CUDA runtime of this torch cannot be displaced by the PTX emulator's")
    ptx_emulator.count()
    ptx_emulator.clear()
    try:
        for name, (args, kwargs) in op_cases.calls(torch.bfloat16).items():
            getattr(operations, name)(*args, **kwargs)
        if ON_SM_90A:  # prefill's attention has a file of its own there
            prefill = op_cases.attention_inputs(op_cases.Draw(0, torch.bfloat16), [(70, 70)], 2, 1, 64)
            operations.attention(*prefill.values())
        operations.embedding(torch.tensor([1]), torch.zeros(4, 8).bfloat16())
        operations.sample(torch.zeros(1, 9), None, None, None, None, torch.zeros(1, dtype=torch.int64))
        numbers = sorted({launch["module"] for launch in ptx_emulator.counts()})
        texts = [ptx_emulator.module_text(number) for number in numbers]
    finally:
        ptx_emulator.count(False)
        ptx_emulator.clear()
    message = ctypes.create_string_buffer(1024)
    kernels = ctypes.CDLL(str(CUDA_LIBRARY)).pop_cuda_load_kernels(message, len(message))
    entries = [name for text in texts for name in re.findall(r"\.entry (\w+)", text)]
    empty = 0 if ON_SM_90A else sum("hopper" in name for name in entries)  # kernels for sm_90a alone
    assert len(entries) - empty == kernels > 64
    return texts


@pytest.mark.parametrize("sm", [80, 90])
def test_no_kernel_spills(modules, sm, tmp_path):
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not installed")
    for text in modules:
        sm_90a = ".target sm_90a" in text
        if sm_90a != ON_SM_90A:  # the others are the same on every device
            continue
        source = tmp_path / "module.ptx"
        source.write_text(text)
        command = ["ptxas", "-v", f"-arch=sm_{sm}{'a' * sm_90a}", str(source), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found = re.findall(
            r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said
        )
        assert "serialized" not in said  # wgmma, where the compiler sees its registers touched
        assert len(found) == len(re.findall(r"\.entry ", text))
        assert not [kernel for kernel, *numbers in found if any(map(int, numbers))]


def test_on_sm_90a():
    if torch.cuda.is_available() or os.environ.get("PTX_EMULATOR_SM"):
        pytest.skip("the device is another one already")
    if "compute_90a" not in build_info()["cuda_architectures"]:
        pytest.skip("the library has no PTX for sm_90a")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "no_kernel_spills and 90"]
    environment = {**os.environ, "PTX_EMULATOR_SM": "90"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and ("1 passed" in result.stdout or "ptxas is not" in result.stdout), result.stdout[
        -3000:
    ]
