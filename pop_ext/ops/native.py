"""The compiled libraries: what they were built with, and what they run on here."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from .. import _C

cpu_isas, cpu_isa, set_cpu_isa = _C.cpu_isas, _C.cpu_isa, _C.set_cpu_isa
CUDA_LIBRARY = Path(_C.__file__).parent / "libpop_cuda.so"


def _load_cuda() -> str | None:
    """Loads the CUDA kernels; returns why not, and what to do about it, where they cannot be."""
    if not CUDA_LIBRARY.exists():
        return (
            "this build of pop_ext has no CUDA kernels (pop_ext.build_info()['cuda'] is False); build it where nvcc 13 "
            "and the package nvidia-cutlass are installed"
        )
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a build for CUDA 13"
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return (
            f"{CUDA_LIBRARY.name} cannot be loaded ({error}); it needs libcudart.so.13, which comes with a torch for "
            f"CUDA 13 (this one is for {torch.version.cuda})"
        )
    return None


why_no_cuda = _load_cuda()
# What CUDA tensors get where there are no kernels for them.
no_cuda = torch.library.Library("pop", "IMPL", "CUDA") if why_no_cuda else None


def make_way_for_cuda() -> None:
    """Takes back what CUDA tensors get without kernels: for a caller that loads CUDA_LIBRARY itself."""
    if no_cuda:
        no_cuda._destroy()


def _cuda_library() -> ctypes.CDLL:
    """The loaded CUDA library; RuntimeError says why there is none."""
    if why_no_cuda:
        raise RuntimeError(f"no CUDA kernels: {why_no_cuda}")
    return ctypes.CDLL(str(CUDA_LIBRARY))


def load_cuda_kernels(device: int | torch.device | None = None) -> int:
    """Loads every CUDA kernel onto a device (default: the current one); returns how many there are.

    The first operation on a device does the same. Call it before the first graph capture, during which nothing may be
    loaded. RuntimeError where the kernels cannot run on the device.
    """
    library = _cuda_library()
    message = ctypes.create_string_buffer(1024)
    with torch.cuda.device(device):
        count = library.pop_cuda_load_kernels(message, len(message))
    if count < 0:
        raise RuntimeError(message.value.decode())
    return count


def cuda_image(device: int | torch.device | None = None) -> dict:
    """What a GPU (default: the current one) runs of this library: {"sm": 90, "ptx": 80, "compiled_by_driver": False}.

    sm: the compute capability that the loaded machine code is for; ptx: of the PTX that it was made from;
    compiled_by_driver: whether the driver made it, as the library holds none for this GPU.
    """
    library = _cuda_library()
    message = ctypes.create_string_buffer(1024)
    sm, ptx = ctypes.c_int(), ctypes.c_int()
    with torch.cuda.device(device):
        failed = library.pop_cuda_image(ctypes.byref(sm), ctypes.byref(ptx), message, len(message))
    if failed:
        raise RuntimeError(message.value.decode())
    return {"sm": sm.value, "ptx": ptx.value, "compiled_by_driver": f"sm_{sm.value}" not in _C.cuda_architectures()}


def _processor() -> str:
    """The processor as Linux names it; the family and model tell apart those that share a name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.is_file() else []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = f"family {entries.get('cpu family', '?')}, model {entries.get('model', '?')}"
    return f"{entries.get('model name', 'unknown processor')} ({numbers})"


def build_info() -> dict:
    """What this library was built with, and what it runs on here.

    "cuda": CUDA kernels were built; "cuda_architectures": what they were compiled to, machine code ("sm_90") and PTX
    ("compute_80"); "cuda_loaded": this torch runs them; "cuda_image": `cuda_image()` of the present GPU, or why
    there is none.
    """
    built = CUDA_LIBRARY.exists()
    if why_no_cuda:
        image = why_no_cuda
    elif not torch.cuda.is_available():
        image = "no GPU"
    else:
        image = cuda_image()
    return _C.build_info() | {
        "processor": _processor(),
        "cpu_isas": cpu_isas(),
        "cpu_isa": cpu_isa(),
        "cuda": built,
        "cuda_architectures": _C.cuda_architectures() if built else [],
        "cuda_loaded": why_no_cuda is None,
        "cuda_image": image,
    }
