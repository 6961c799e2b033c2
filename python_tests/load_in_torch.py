"""Runs every operation of the compiled library in whatever torch this Python has, against the float64 reference; in a
torch with CUDA, loads the CUDA library as well.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

root = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(root / "python_tests"))
import reference_ops  # noqa: E402

library = next((root / "pop_ext").glob("_C*.so"))
spec = importlib.util.spec_from_file_location("_C", library)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(f"torch {torch.__version__} loads {library.name}, built against torch {module.build_info()['torch_headers']}")

torch.manual_seed(0)
tokens, hidden, heads, kv_heads, head_size = 70, 96, 6, 2, 32
x = torch.randn(tokens, hidden)
cos, sin = torch.randn(2, 2, tokens, head_size // 2).unbind()
slots = torch.randperm(128)[:tokens]
cache = torch.randn(2, 3, 8, 16, kv_heads, head_size)
weight = torch.randn((heads + 2 * kv_heads) * head_size, hidden) / hidden**0.5
projection = torch.randn(3, 2 * kv_heads * head_size, hidden) / hidden**0.5
query = torch.randn(tokens, heads, head_size)
tables = torch.arange(8, dtype=torch.int32)[None]
starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([100], dtype=torch.int32)
gain = torch.rand(hidden)
cases = {
    "rms_norm": (x, gain, 1e-6),
    "linear": (x, weight),
    "gated_linear": (x, weight, "silu"),
    "qkv_project": (x, weight, None, None, None, 1e-6, cos[0], sin[0], slots, cache[0, 0], cache[1, 0]),
    "attention": (query, cache[0, 0], cache[1, 0], tables, starts, lengths, tokens, 100, head_size**-0.5),
    "project_kv": (
        x,
        projection,
        None,
        None,
        1e-6,
        cos,
        sin,
        torch.tensor([0, 1, 0], dtype=torch.int32),
        slots,
        cache[0],
        cache[1],
    ),
}
for name, arguments in cases.items():
    copies = [[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments] for _ in range(2)]
    result = getattr(torch.ops.pop, name)(*copies[0])
    expected = getattr(reference_ops, name)(*copies[1])
    pairs = [(a, b) for a, b in zip(*copies, strict=True) if isinstance(a, torch.Tensor)]
    pairs += [] if result is None else [(result, expected)]
    error = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    print(f"  {name}: error {error:.1e}")
    assert error < 1e-5, name

# The CUDA library beside it: in a torch with CUDA everything it asks for must be found, GPU or not.
cuda = root / "pop_ext" / "libpop_cuda.so"
if torch.version.cuda and cuda.exists():
    torch.ops.load_library(cuda)
    handle = ctypes.CDLL(str(cuda), mode=os.RTLD_NOW)  # every symbol that is not weak, now
    assert handle.aoti_torch_get_current_cuda_stream, "the weak one, by which kernels find their stream"
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", cuda], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1].split("@")[0] for line in undefined.splitlines()}
    software = {name for name in names if name.startswith("ptx_emulator_")}  # the PTX emulator's, not to be here
    weak = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    missing = {name for name in names - software - weak if not hasattr(handle, name)}
    assert not missing and not any(hasattr(handle, name) for name in software), missing
    for name in cases:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pop::{name}", "CUDA"), name
    print(f"torch {torch.__version__} (CUDA {torch.version.cuda}) loads {cuda.name}: {len(names)} symbols found")
    if torch.cuda.is_available():
        x, weight = torch.randn(70, 96).half().cuda(), torch.randn(64, 96).half().cuda()
        error = (torch.ops.pop.linear(x, weight) - x @ weight.T).abs().max()
        print(f"  linear on {torch.cuda.get_device_name()}: largest difference from torch {error:.1e}")
        assert error < 0.1
else:
    print(f"the CUDA library is not tried: {'not built' if torch.version.cuda else 'this torch has no CUDA'}")
