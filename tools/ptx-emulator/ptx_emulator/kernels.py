"""PTX text in, kernels out."""

import ctypes
import numbers

import numpy as np

from .library import EmulatorError, message, runtime


def _three(size) -> ctypes.Array:
    sizes = (size,) if isinstance(size, numbers.Integral) else tuple(size)
    if not 1 <= len(sizes) <= 3 or any(s < 0 or s >= 1 << 32 for s in sizes):
        raise ValueError(f"a grid or block has one to three sizes, not {size!r}")
    return (ctypes.c_uint32 * 3)(*sizes, *[1] * (3 - len(sizes)))


def _argument(value, size: int, width: int, is_float: bool, is_array: bool) -> bytes:
    """The bytes of one argument for a parameter of `size` bytes, made of elements of `width`."""
    if isinstance(value, bytes):
        if len(value) != size:
            raise TypeError(f"a parameter of {size} bytes got {len(value)} bytes")
        return value
    if isinstance(value, np.ndarray):
        address = value.__array_interface__["data"][0]
    elif hasattr(value, "data_ptr"):
        if value.device.type != "cpu":
            raise TypeError(f"the device's memory is the host's: a tensor on {value.device} is not in it")
        address = value.data_ptr()
    elif isinstance(value, np.generic) and value.dtype.itemsize == size:
        return value.tobytes()
    elif isinstance(value, numbers.Number) and not is_array:
        if is_float:
            return np.array(value, {2: np.float16, 4: np.float32, 8: np.float64}[width]).tobytes()
        if isinstance(value, float):
            # Compilers often declare floating-point parameters as untyped bits.
            return np.array(value, {4: np.float32, 8: np.float64}[width]).tobytes()
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    else:
        raise TypeError(f"{type(value).__name__} is no argument for a parameter of {size} bytes")
    if size != 8:
        raise TypeError(f"an array needs a parameter of 8 bytes, not {size}")
    return address.to_bytes(8, "little")


class Kernel:
    """A kernel of a module. Calling it runs it to its end and returns how many warp instructions that took."""

    def __init__(self, module: "Module", name: str):
        self.module = module
        self.name = name
        count = runtime().ptx_emulator_parameters(module.handle, name.encode(), None, 0)
        if count < 0:
            raise KeyError(name)
        table = (ctypes.c_int * (5 * max(count, 1)))()
        runtime().ptx_emulator_parameters(module.handle, name.encode(), table, count)
        self.parameters = [tuple(table[5 * k : 5 * k + 5]) for k in range(count)]

    def __call__(self, grid, block, shared_bytes: int, *arguments) -> int:
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, not {len(arguments)}")
        values = [
            _argument(value, size, width, bool(is_float), bool(is_array))
            for value, (size, width, is_float, _, is_array) in zip(arguments, self.parameters, strict=True)
        ]
        buffers = [ctypes.create_string_buffer(value, max(len(value), 1)) for value in values]
        pointers = (ctypes.c_void_p * max(len(buffers), 1))(*[ctypes.addressof(buffer) for buffer in buffers])
        instructions = ctypes.c_uint64()
        code = runtime().ptx_emulator_launch(
            self.module.handle,
            self.name.encode(),
            _three(grid),
            _three(block),
            shared_bytes,
            pointers,
            ctypes.byref(instructions),
        )
        if code:
            raise EmulatorError(message(), code)
        return instructions.value


class Module:
    """Loaded PTX: a mapping from names to kernels."""

    def __init__(self, text: str | bytes):
        data = text.encode() if isinstance(text, str) else text
        self.handle = runtime().ptx_emulator_load(data, len(data))
        if not self.handle:
            raise EmulatorError(message())

    def __del__(self):
        if getattr(self, "handle", None):
            runtime().ptx_emulator_unload(self.handle)
            self.handle = None

    def __getitem__(self, name: str) -> Kernel:
        return Kernel(self, name)

    def keys(self) -> list[str]:
        return runtime().ptx_emulator_kernels(self.handle).decode().split()

    def __iter__(self):
        return iter(self.keys())


def load(text: str | bytes) -> Module:
    """Parses and decodes PTX text. What the emulator does not know is an error with its line and text."""
    return Module(text)
