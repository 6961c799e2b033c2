"""What NVIDIA's assembler makes of the CUDA kernels for sm_80 and sm_90: none has more in hand than registers hold."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import op_cases
import ptx_emulator
import pytest
import torch
from helpers import cuda_operations

from pop_ext.ops import CUDA_LIBRARY


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
        operations.embedding(torch.tensor([1]), torch.zeros(4, 8).bfloat16())
        operations.sample(torch.zeros(1, 9), None, None, None, None, torch.zeros(1, dtype=torch.int64))
        numbers = sorted({launch["module"] for launch in ptx_emulator.counts()})
        texts = [ptx_emulator.module_text(number) for number in numbers]
    finally:
        ptx_emulator.count(False)
        ptx_emulator.clear()
    message = ctypes.create_string_buffer(1024)
    kernels = ctypes.CDLL(str(CUDA_LIBRARY)).pop_cuda_load_kernels(message, len(message))
    assert sum(len(re.findall(r"\.entry ", text)) for text in texts) == kernels > 64
    return texts


@pytest.mark.parametrize("sm", [80, 90])
def test_no_kernel_spills(modules, sm, tmp_path):
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not installed")
    for text in modules:
        source = tmp_path / "module.ptx"
        source.write_text(text)
        command = ["ptxas", "-v", f"-arch=sm_{sm}", str(source), "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found = re.findall(
            r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", said
        )
        assert len(found) == len(re.findall(r"\.entry ", text))
        assert not [kernel for kernel, *numbers in found if any(map(int, numbers))]
