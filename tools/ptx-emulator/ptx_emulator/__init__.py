"""The software CUDA device from Python: PTX text in, kernels out.

    kernel = emulator.load(ptx_text)["saxpy"]
    kernel((blocks, 1, 1), (256, 1, 1), 0, x, y, 2.0, n)

Arguments are numbers, numpy arrays and CPU tensors; the device's memory is the host's, so kernels write into those.

`python -m ptx_emulator PROGRAM` runs a compiled program on it, and reports.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import numbers
import os
import pathlib
import subprocess
import tempfile
import weakref
from typing import Annotated

import numpy as np
import typer

from . import sass


class EmulatorError(RuntimeError):
    """PTX that cannot be loaded, or a kernel that failed; `code` is CUDA's error code (0 at load)."""

    def __init__(self, message: str, code: int = 0):
        super().__init__(message)
        self.code = code


def library_path() -> pathlib.Path:
    """The folder with the device's libcudart.so.13: for LD_LIBRARY_PATH, to run any program on it."""
    if folder := os.environ.get("POP_EMULATOR_PATH"):
        return pathlib.Path(folder)
    folder = pathlib.Path(__file__).resolve().parents[3] / "build" / "emulator" / "lib"
    if (folder / "libcudart.so.13").exists():
        return folder
    raise FileNotFoundError(f"no libcudart.so.13 of the software device in {folder}")


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path() / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
    library.pop_emulator_load.restype = ctypes.c_void_p
    library.pop_emulator_load.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    library.pop_emulator_unload.argtypes = [ctypes.c_void_p]
    library.pop_emulator_error.restype = ctypes.c_char_p
    library.pop_emulator_kernels.restype = ctypes.c_char_p
    library.pop_emulator_kernels.argtypes = [ctypes.c_void_p]
    library.pop_emulator_parameters.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    library.pop_emulator_launch.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    library.pop_emulator_register.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
    library.pop_emulator_unregister.argtypes = [ctypes.c_void_p]
    library.pop_emulator_allocate.restype = ctypes.c_void_p
    library.pop_emulator_allocate.argtypes = [ctypes.c_size_t, ctypes.c_char_p]
    library.pop_emulator_free.argtypes = [ctypes.c_void_p]
    library.pop_emulator_checks.argtypes = [ctypes.c_char_p]
    library.pop_emulator_schedule.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.pop_emulator_host_reads.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.pop_emulator_expect_stream.argtypes = [ctypes.c_int, ctypes.c_void_p]
    library.pop_emulator_counted_module.restype = ctypes.c_char_p
    library.pop_emulator_counted_module.argtypes = [ctypes.c_size_t]
    library.pop_emulator_findings.restype = library.pop_emulator_counts.restype = ctypes.c_char_p
    return library


def _message() -> str:
    return _library().pop_emulator_error().decode(errors="replace")


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
        count = _library().pop_emulator_parameters(module.handle, name.encode(), None, 0)
        if count < 0:
            raise KeyError(name)
        table = (ctypes.c_int * (5 * max(count, 1)))()
        _library().pop_emulator_parameters(module.handle, name.encode(), table, count)
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
        code = _library().pop_emulator_launch(
            self.module.handle,
            self.name.encode(),
            _three(grid),
            _three(block),
            shared_bytes,
            pointers,
            ctypes.byref(instructions),
        )
        if code:
            raise EmulatorError(_message(), code)
        return instructions.value


class Module:
    """Loaded PTX: a mapping from names to kernels."""

    def __init__(self, text: str | bytes):
        data = text.encode() if isinstance(text, str) else text
        self.handle = _library().pop_emulator_load(data, len(data))
        if not self.handle:
            raise EmulatorError(_message())

    def __del__(self):
        if getattr(self, "handle", None):
            _library().pop_emulator_unload(self.handle)
            self.handle = None

    def __getitem__(self, name: str) -> Kernel:
        return Kernel(self, name)

    def keys(self) -> list[str]:
        return _library().pop_emulator_kernels(self.handle).decode().split()

    def __iter__(self):
        return iter(self.keys())


@functools.cache
def _cuda_operations() -> ctypes.CDLL:
    """Loads the CUDA kernels of torch.ops.pop onto the device."""
    import torch

    from pop_ext import ops

    if torch.version.cuda is not None:
        raise RuntimeError("this torch is built with CUDA, whose own runtime cannot be displaced; use a CPU build")
    if not ops.CUDA_LIBRARY.exists():
        raise FileNotFoundError(f"no {ops.CUDA_LIBRARY}: this build of pop_ext has no CUDA kernels")
    _library()
    ops.make_way_for_cuda()
    torch.ops.load_library(ops.CUDA_LIBRARY)
    return ctypes.CDLL(str(ops.CUDA_LIBRARY))


class _Operations:
    """`torch.ops.pop` with its CUDA kernels on this device: takes CPU tensors, as the device's memory is the host's,
    which are known memory for the time of the call, as is the output.
    """

    def __getattr__(self, name: str):
        import torch

        _cuda_operations()
        operation = getattr(torch.ops.pop, name).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

        @functools.wraps(operation)
        def call(*args, **kwargs):
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.numel()]
            with registered(*tensors):
                output = operation.redispatch(keys, *args, **kwargs)
                if output is not None and output.numel():
                    unregister(output)
            return output

        return call


ops = _Operations()


def load(text: str | bytes) -> Module:
    """Parses and decodes PTX text. What the device does not know is an error with its line and text."""
    return Module(text)


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
    if _library().pop_emulator_register(base, size, int(written), (name or "").encode()):
        raise ValueError(_message())


def unregister(tensor) -> None:
    """Undoes the last `register` of a tensor with this first element."""
    if _library().pop_emulator_unregister(_extent(tensor)[0]):
        raise ValueError(_message())


def empty(shape, dtype=None, name: str | None = None):
    """A CPU tensor in the device's memory: an allocation of its own, with nothing written, freed with the tensor."""
    import torch

    dtype = dtype or torch.get_default_dtype()
    shape = torch.Size([shape] if isinstance(shape, numbers.Integral) else shape)
    size = shape.numel() * dtype.itemsize
    address = _library().pop_emulator_allocate(max(size, 1), (name or "").encode())
    if not address:
        raise MemoryError(f"the device has no {size} bytes left")
    buffer = (ctypes.c_uint8 * max(size, 1)).from_address(address)
    weakref.finalize(buffer, _library().pop_emulator_free, address)
    return torch.frombuffer(buffer, dtype=torch.uint8)[:size].view(dtype).view(shape)


@dataclasses.dataclass(frozen=True)
class Spot:
    """A place in a running kernel: PTX line and text, source line where -lineinfo gave it (0: not), block, thread."""

    kernel: str
    line: int
    text: str
    source: str
    source_line: int
    block: tuple[int, int, int]
    thread: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Finding(Spot):
    """A broken rule (csrc/emulator/README.md lists them), where, and in which allocation; `second` is the other party,
    `second_role` what it did; `count`: how often it was found at these lines."""

    rule: str
    message: str
    address: int
    space: str
    allocation: str
    count: int
    second: Spot | None
    second_role: str


def checks(*names: str) -> None:
    """What later launches are checked for: any of "memory", "init", "race", "barrier", or "all"; nothing: no checks.

    Memory that is known when checks are switched on counts as written.
    """
    if _library().pop_emulator_checks(",".join(names).encode()):
        raise ValueError(_message())


def schedule(name: str = "roundrobin", seed: int = 0) -> None:
    """The order of warps, blocks and landing copies in later launches: "roundrobin", "random" or "adversarial"."""
    if _library().pop_emulator_schedule(name.encode(), seed):
        raise ValueError(_message())


def count(on: bool = True) -> None:
    """Whether later launches are counted."""
    _library().pop_emulator_count(int(on))


def findings() -> list[Finding]:
    """What was found since `clear`."""
    result = []
    for row in json.loads(_library().pop_emulator_findings()):
        second = row.pop("second")
        role = second.pop("role") if second else ""
        for spot in (row, second or {}):
            spot.update({key: tuple(spot[key]) for key in ("block", "thread") if key in spot})
        result.append(Finding(**row, second=Spot(**second) if second else None, second_role=role))
    return result


def counts() -> list[dict]:
    """The launches counted since `clear`, each with totals and lists of `allocations`, `loops` and `instructions`."""
    return json.loads(_library().pop_emulator_counts(0))


def module_text(number: int) -> str:
    """The PTX of a counted launch's module (its "module")."""
    text = _library().pop_emulator_counted_module(number)
    if text is None:
        raise ValueError(f"no counted launch has module {number}")
    return text.decode()


def report(annotate: bool = False) -> str:
    """The counted launches as text; `annotate` adds the PTX with counts beside each line."""
    return _library().pop_emulator_counts(2 if annotate else 1).decode()


def clear() -> None:
    """Forgets findings and counted launches."""
    _library().pop_emulator_clear()


def host_reads(tensor) -> bool:
    """Says that the host reads a tensor now: a finding, and False, where one of its bytes was never written."""
    base, size = _extent(tensor)
    return _library().pop_emulator_host_reads(base, size) == 0


def expect_stream(stream: int | None) -> None:
    """Launches through the runtime on another stream than this (a cudaStream_t) become findings; None ends that."""
    _library().pop_emulator_expect_stream(int(stream is not None), stream)


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


def main(
    program: Annotated[list[str], typer.Argument(help="A program that nvcc compiled, and its arguments.")],
    annotate: Annotated[bool, typer.Option("--annotate", help="The PTX with counts beside each line.")] = False,
    static: Annotated[bool, typer.Option("--static", help="Facts from ptxas and nvdisasm beside the counts.")] = False,
    check: Annotated[str, typer.Option(help="Look for memory, init, race, barrier (by commas) or all.")] = "",
) -> None:
    """Runs a program on the software CUDA device; prints what was found and counted after its own output."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"POP_EMULATOR_COUNT": "1", "POP_EMULATOR_REPORT": folder}
        environment |= {"LD_LIBRARY_PATH": str(library_path()), "POP_EMULATOR_CHECK": check}
        status = subprocess.run(program, env=os.environ | environment).returncode
        files = pathlib.Path(folder)
        if not (files / "report.json").exists():
            raise RuntimeError(f"{program[0]} left no report (exit status {status}): does it use libcudart.so.13?")
        print((files / ("annotated.txt" if annotate else "report.txt")).read_text(), end="")
        seen: dict[tuple, list[dict]] = {}
        for launch in json.loads((files / "report.json").read_text())["launches"] if static else []:
            key = (launch["kernel"], launch["module"], *launch["grid"], *launch["block"], launch["dynamic_shared"])
            seen.setdefault(key, []).append(launch)
        for first, *others in seen.values():
            ptx = (files / f"module{first['module']}.ptx").read_text()
            alike = f" and {len(others)} alike" if others else ""
            print(f"launch {first['launch']}{alike}, {first['kernel']}:")
            print(sass.text(first, ptx, int(os.environ.get("POP_EMULATOR_SM", "80"))), end="")
        raise typer.Exit(status)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(context_settings={"allow_interspersed_args": False})(main)
    try:
        app()
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"ptx_emulator: {error}") from None
