"""A double of a GPU: tensors of another device, "gpudouble:0", that run the real CUDA kernels on the PTX emulator.

It is torch's Python backend (PrivateUse1). A tensor's data lie in host memory, as the PTX emulator's memory does;
operations of torch run there by torch's own CPU kernels, those of `torch.ops.pop` by libpop_cuda.so. What it is for is
what it refuses and counts, with the file and line in pop_ext:

- an operation on tensors of two devices, an index on the host included, raises;
- `log` has every copy between host and device, and every wait of the host for the device;
- what a non-blocking copy brings to the host is garbage until an event that was recorded after it was waited for, and
  the source of one to the device must not change before that;
- in a capture, operations of torch raise: only the kernels of pop_ext can be replayed there, and they must be loaded.

Pinned memory and streams other than the current one are not modelled.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import traceback
from collections import Counter
from dataclasses import dataclass

import ptx_emulator
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pop_ext import ops
from pop_ext.runtime import device as devices

NAME = "gpudouble"
GARBAGE = -77
# What makes the host wait on a CUDA device: the shape of the result, or a number, depends on data.
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "is_nonzero", "bincount",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """kind: "to device", "to host" or "wait". Where: file and line of pop_ext, the innermost frame there."""

    kind: str
    what: str
    where: str


class Log(list):
    def count(self, kind: str) -> int:
        return sum(entry.kind == kind for entry in self)

    def add(self, kind: str, what: str) -> None:
        self.append(Entry(kind, what, _site()))

    def table(self) -> Counter:
        """How often each kind occurred where."""
        return Counter((entry.kind, entry.what, entry.where) for entry in self)


log = Log()


def _site() -> str:
    for frame in reversed(traceback.extract_stack(limit=60)):
        if "/pop_ext/" in frame.filename:
            return f"{frame.filename.rpartition('/pop_ext/')[2]}:{frame.lineno}"
    return "outside of pop_ext"


class DeviceTensor(torch.Tensor):
    """A tensor on the double; `inner` has its data."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=torch.device(NAME, 0),
            storage_offset=inner.storage_offset(),
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        log.add("to host", "tolist")
        log.add("wait", "tolist")
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    def data_ptr(self):
        return self.inner.data_ptr()

    def __repr__(self):
        return f"DeviceTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, dict(kwargs or {}))


def _is_view(operation) -> bool:
    returns = operation._schema.returns
    return bool(returns) and any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _run(operation, args, kwargs):
    name = operation._schema.name.partition("::")[2]
    target = kwargs.pop("device", None)
    target = None if target is None else torch.device(target).type
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in leaves if isinstance(x, DeviceTensor)]
    if name in ("_to_copy", "copy_"):
        return _copy(name, args, kwargs, target)
    foreign = [x for x in leaves if not isinstance(x, DeviceTensor) and x.dim() > 0]
    if ours and foreign:
        raise RuntimeError(
            f"{operation} at {_site()} mixes devices: "
            + ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in leaves)
        )
    a, k = tree_map(_inner, args), tree_map(_inner, kwargs)
    if operation.namespace == "pop":
        out = _launch(operation, a, k)
    else:
        if _Graph.capturing and not (_is_view(operation) or name in ("empty", "empty_strided", "new_empty", "detach")):
            raise RuntimeError(f"{operation} at {_site()} cannot be captured: no kernel of pop_ext")
        indices = [x for x in tree_leaves(a) if isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)]
        if name in WAITS or (name.startswith("index") and indices) or (name == "repeat_interleave" and len(ours) == 1):
            log.add("to host", name)
            log.add("wait", name)
        out = operation(*a, **k)
    if operation._schema.is_mutable and name.endswith("_"):
        return args[0]
    on_device = target == NAME if target is not None else bool(ours)
    wrapped = tree_map(lambda x: DeviceTensor(x) if isinstance(x, torch.Tensor) and on_device else x, out)
    if _Graph.capturing:
        _Graph.capturing.kept.append((a, k, out))
    return wrapped


def _inner(x):
    return x.inner if isinstance(x, DeviceTensor) else x


# Copies. Those that do not block land late: the host's at an event, and the device's source is looked at again there.

_landing: list[tuple[torch.Tensor, torch.Tensor]] = []  # to the host: where, what
_leaving: list[tuple[torch.Tensor, torch.Tensor, str]] = []  # to the device: from where, what was there, who


def _copy(name, args, kwargs, target):
    if name == "_to_copy":
        source, blocking = args[0], not kwargs.pop("non_blocking", False)
        target = target or (NAME if isinstance(source, DeviceTensor) else "cpu")
        out = torch.ops.aten._to_copy.default(_inner(source), **kwargs)
        out = DeviceTensor(out) if target == NAME else out
    else:
        out, source = args[0], args[1]
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        _inner(out).copy_(_inner(source))
    if _Graph.capturing:
        raise RuntimeError(f"a copy at {_site()} cannot be captured")
    to_device, to_host = isinstance(out, DeviceTensor), isinstance(source, DeviceTensor)
    if to_device == to_host or source.numel() == 0:
        return out
    log.add("to device" if to_device else "to host", "copy")
    if blocking:
        log.add("wait", "copy")
    elif to_device:
        _leaving.append((source, source.clone(), _site()))
    else:
        _landing.append((out, out.clone()))
        out.fill_(GARBAGE)
    return out


def _land(count: int | None) -> None:
    for out, value in _landing[:count]:
        out.copy_(value)
    del _landing[:count]
    for source, value, where in _leaving:
        if not torch.equal(source, value):
            raise RuntimeError(f"the source of a copy at {where} was changed before the copy was known to be done")
    _leaving.clear()


# Kernels and graphs


class _Keep(TorchDispatchMode):
    """Keeps alive what a captured kernel was given of memory: its output and its workspace."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.kept.append(out)
        return out


kernels_loaded = 0


def load_cuda_kernels(device=None) -> int:
    """`ops.load_cuda_kernels` here."""
    global kernels_loaded
    _kernels()
    message = ctypes.create_string_buffer(1024)
    kernels_loaded = ctypes.CDLL(str(ops.CUDA_LIBRARY)).pop_cuda_load_kernels(message, len(message))
    assert kernels_loaded > 0, message.value
    return kernels_loaded


@contextlib.contextmanager
def installed():
    """The double is among the devices that models run on."""
    load = ops.load_cuda_kernels
    devices.ACCELERATORS.add(NAME)
    ops.load_cuda_kernels = load_cuda_kernels
    try:
        yield
    finally:
        devices.ACCELERATORS.discard(NAME)
        ops.load_cuda_kernels = load


@functools.cache
def _kernels():
    ops.make_way_for_cuda()
    return ptx_emulator.torch_ops(ops.CUDA_LIBRARY, "pop")


def _launch(operation, args, kwargs):
    launch = getattr(_kernels(), operation._schema.name.partition("::")[2])
    with _Keep(_Graph.capturing.kept) if _Graph.capturing else contextlib.nullcontext():
        return launch(*args, **kwargs)


class _Graph:
    """torch.cuda.CUDAGraph's interface, on the PTX emulator's graphs."""

    capturing: _Graph | None = None
    stream = None

    def __init__(self):
        self.kept, self.replays = [], 0

    @staticmethod
    def _runtime():
        return ptx_emulator.runtime(), ctypes.CDLL(str(ops.CUDA_LIBRARY))

    def _capture(self):
        if not kernels_loaded:
            raise RuntimeError(f"a capture at {_site()} before ops.load_cuda_kernels: it would load them, and fail")
        library, kernels = self._runtime()
        if _Graph.stream is None:
            _Graph.stream = ctypes.c_void_p()
            assert library.cudaStreamCreate(ctypes.byref(_Graph.stream)) == 0
        kernels.pop_cuda_set_emulated_stream(_Graph.stream)
        assert library.cudaStreamBeginCapture(_Graph.stream, 0) == 0
        _Graph.capturing = self

    def _end(self):
        library, kernels = self._runtime()
        _Graph.capturing = None
        graph, self.executable = ctypes.c_void_p(), ctypes.c_void_p()
        ended = library.cudaStreamEndCapture(_Graph.stream, ctypes.byref(graph))
        kernels.pop_cuda_set_emulated_stream(None)
        assert ended == 0, ended
        assert library.cudaGraphInstantiate(ctypes.byref(self.executable), graph, ctypes.c_ulonglong(0)) == 0

    def replay(self):
        library, _ = self._runtime()
        self.replays += 1
        assert library.cudaGraphLaunch(self.executable, _Graph.stream) == 0
        assert library.cudaStreamSynchronize(_Graph.stream) == 0


class _Event:
    def __init__(self, enable_timing=False, blocking=False):
        self.landing = None

    def record(self, stream=None):
        self.landing = list(_landing)

    def synchronize(self):
        log.add("wait", "event")
        before = {id(out) for out, _ in self.landing}
        _land(sum(id(out) in before for out, _ in _landing))

    def elapsed_time(self, other) -> float:
        assert self.landing is not None and other.landing is not None, "an event that was never recorded"
        return 1.0


class _Module:
    """What torch.cuda has, as far as pop_ext asks for it."""

    Event, CUDAGraph = _Event, _Graph
    free_memory = 40 << 30
    capability = (8, 0)

    @staticmethod
    @contextlib.contextmanager
    def graph(graph):
        graph._capture()
        try:
            yield
        finally:
            graph._end()

    def mem_get_info(self, device=None):
        return self.free_memory, 80 << 30

    def get_device_capability(self, device=None):
        return self.capability

    def get_device_name(self, device=None):
        return "PTX emulator"

    def synchronize(self, device=None):
        log.add("wait", "synchronize")
        _land(None)

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass


module = _Module()
_setup_privateuseone_for_python_backend(NAME, backend_module=module)
_library = torch.library.Library("aten", "IMPL")


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return DeviceTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))


def _to_copy(x, **kwargs):
    return _run(torch.ops.aten._to_copy.default, (x,), kwargs)


def _copy_from(source, out, non_blocking=False):
    return _run(torch.ops.aten.copy_.default, (out, source, non_blocking), {})


_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
