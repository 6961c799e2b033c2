"""CUDA's runtime on the CPU, from Python: PTX text in, kernels out.

    kernel = ptx_emulator.load(ptx_text)["saxpy"]
    kernel((blocks, 1, 1), (256, 1, 1), 0, x, y, 2.0, n)

Arguments are numbers, numpy arrays and CPU tensors; the device's memory is the host's, so kernels write into those.

`python -m ptx_emulator PROGRAM` runs a compiled program on it, and reports.
"""

from .checks import Finding, Spot, checks, expect_stream, findings, schedule
from .counts import count, counts, module_text, report
from .kernels import Kernel, Module, load
from .library import EmulatorError, library_path, runtime
from .memory import empty, host_reads, register, registered, unregister
from .tensor_maps import device, tensor_map
from .torch_ops import TorchOps, torch_ops

__all__ = [
    "EmulatorError",
    "Finding",
    "Kernel",
    "Module",
    "Spot",
    "TorchOps",
    "checks",
    "clear",
    "count",
    "counts",
    "device",
    "empty",
    "expect_stream",
    "findings",
    "host_reads",
    "library_path",
    "load",
    "module_text",
    "register",
    "registered",
    "report",
    "runtime",
    "schedule",
    "tensor_map",
    "torch_ops",
    "unregister",
]


def clear() -> None:
    """Forgets findings and counted launches."""
    runtime().ptx_emulator_clear()
