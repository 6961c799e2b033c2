"""Runs every operation of the compiled library in whatever torch this Python has, against the float64 reference."""

import importlib.util
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
