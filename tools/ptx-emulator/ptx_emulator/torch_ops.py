"""A library of torch operations whose CUDA kernels run on the emulator."""

import functools
import os

from .library import runtime
from .memory import registered, unregister


class TorchOps:
    """`torch.ops.<namespace>` with its CUDA kernels on the emulator: each operation takes CPU tensors, which are known
    memory for the time of the call, as is its output, where the library made that known.
    """

    def __init__(self, namespace: str):
        self._namespace = namespace

    def __getattr__(self, name: str):
        import torch

        operation = getattr(getattr(torch.ops, self._namespace), name).default
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


@functools.cache
def torch_ops(library: str | os.PathLike, namespace: str) -> TorchOps:
    """Loads a library that registers CUDA kernels in `torch.ops.<namespace>`, and returns them, for CPU tensors.

    The library makes its outputs known with `ptx_emulator_register` (a weak symbol, which is null without the
    emulator). Nothing else may have registered kernels for CUDA there. Raises RuntimeError with a torch that is built
    with CUDA, FileNotFoundError without the library.
    """
    import torch

    if torch.version.cuda is not None:
        raise RuntimeError("this torch is built with CUDA, whose own runtime cannot be displaced; use a CPU build")
    if not os.path.exists(library):
        raise FileNotFoundError(f"library {library} does not exist")
    runtime()
    torch.ops.load_library(library)
    return TorchOps(namespace)
