"""Memory that kernels may use: CPU tensors and numpy arrays, as the device's memory is the host's."""

import contextlib
import ctypes
import numbers
import weakref

import numpy as np

from .library import message, runtime


def _extent(array) -> tuple[int, int]:
    """Address and bytes from the first to the last element of a numpy array or CPU tensor, gaps of its strides
    included."""
    if isinstance(array, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(array)
        return low, high - low
    if not hasattr(array, "data_ptr"):
        raise TypeError(f"expected a tensor or numpy array, got {type(array).__name__}")
    if array.device.type != "cpu":
        raise TypeError(f"the device's memory is the host's: a tensor on {array.device} is not in it")
    if array.numel() == 0:
        return array.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True))
    return array.data_ptr(), (last + 1) * array.element_size()


def register(tensor, name: str | None = None, written: bool = True) -> None:
    """Makes a CPU tensor or numpy array known memory, from its first to its last element, until `unregister`.

    With checks on, kernels may touch known memory only. `written=False`: its bytes count as never written (an output).
    Registrations that overlap are one stretch of memory; registering known memory as written marks it as such.
    """
    base, size = _extent(tensor)
    if runtime().ptx_emulator_register(base, size, int(written), (name or "").encode()):
        raise ValueError(message())


def unregister(tensor) -> None:
    """Undoes the last `register` of a tensor with this first element."""
    if runtime().ptx_emulator_unregister(_extent(tensor)[0]):
        raise ValueError(message())


def empty(shape, dtype=None, name: str | None = None):
    """A CPU tensor in the device's memory: an allocation of its own, with nothing written, freed with the tensor."""
    import torch

    dtype = dtype or torch.get_default_dtype()
    shape = torch.Size([shape] if isinstance(shape, numbers.Integral) else shape)
    size = shape.numel() * dtype.itemsize
    address = runtime().ptx_emulator_allocate(max(size, 1), (name or "").encode())
    if not address:
        raise MemoryError(f"the device has no {size} bytes left")
    buffer = (ctypes.c_uint8 * max(size, 1)).from_address(address)
    weakref.finalize(buffer, runtime().ptx_emulator_free, address)
    return torch.frombuffer(buffer, dtype=torch.uint8)[:size].view(dtype).view(shape)


@contextlib.contextmanager
def registered(*tensors):
    """Tensors and arrays as known memory within a `with` block."""
    for tensor in tensors:
        register(tensor)
    try:
        yield
    finally:
        for tensor in tensors:
            unregister(tensor)


def host_reads(tensor) -> bool:
    """Says that the host reads a tensor now: a finding, and False, where one of its bytes was never written."""
    base, size = _extent(tensor)
    return runtime().ptx_emulator_host_reads(base, size) == 0
