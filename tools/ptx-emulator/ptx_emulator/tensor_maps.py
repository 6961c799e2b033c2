"""Tensor maps for kernels that copy boxes of tensors (TMA): what cuTensorMapEncodeTiled makes."""

import ctypes
from collections.abc import Sequence

from .library import EmulatorError, runtime

SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes: CUtensorMapSwizzle


def device(sm: int) -> None:
    """The GPU of what is loaded and launched from now on: 80, 86 or 90 (which runs sm_90a, too)."""
    if runtime().ptx_emulator_device(sm):
        raise ValueError(runtime().ptx_emulator_error().decode())


def tensor_map(
    address: int,
    data_type: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    *,
    steps: Sequence[int] | None = None,
    swizzle: int = 0,
    fill: int = 0,
) -> bytes:
    """A CUtensorMap as an argument's 128 bytes. All sequences begin with the innermost dimension.

    `data_type`: a CUtensorMapDataType; `sizes`, `box`: elements; `strides`: bytes, of all dimensions but the first;
    `steps`: of elements; `swizzle`: 0, 32, 64 or 128 bytes; `fill`: 1 for NaN outside of the tensor. Raises
    EmulatorError with the driver's error code for what it refuses.
    """
    function = ctypes.c_void_p()
    status = ctypes.c_int()
    runtime().cudaGetDriverEntryPointByVersion(
        b"cuTensorMapEncodeTiled", ctypes.byref(function), 12000, ctypes.c_ulonglong(0), ctypes.byref(status)
    )
    pointer, word, rank = ctypes.c_void_p, ctypes.c_uint32, len(sizes)
    encode = ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_int, word, *[pointer] * 5, *[ctypes.c_int] * 4)(
        function.value or 0
    )
    storage = ctypes.create_string_buffer(192)
    aligned = (ctypes.addressof(storage) + 63) // 64 * 64
    code = encode(
        aligned,
        data_type,
        rank,
        address,
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * max(rank - 1, 1))(*strides),
        (word * rank)(*box),
        (word * rank)(*(steps or [1] * rank)),
        0,
        SWIZZLES[swizzle],
        0,
        fill,
    )
    if code:
        raise EmulatorError("cuTensorMapEncodeTiled refuses the tensor map", code)
    return ctypes.string_at(aligned, 128)
