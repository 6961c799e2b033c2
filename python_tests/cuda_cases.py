"""What tests of the CUDA kernels share: on the GPU where there is one, else on the PTX emulator.

Inputs are op_cases', in the shapes that CUDA takes; strided rows lie on 16-byte boundaries and no better ones, and on
the emulator outputs are NaN until written. Beside the bound on whole outputs, each element is held to |error| <= u
|reference| + c u S, where S is the reference's sum over absolute values, u the unit roundoff (2^-8 in bfloat16, 2^-11
in float16), and c how much of the last bit may be lost inside.
"""

from __future__ import annotations

import zlib

import op_cases
import ptx_emulator
import pytest
import reference_ops
import torch
from helpers import cuda_operations
from op_cases import EPS, UNIT, Draw, project_inputs, qkv_inputs

BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
C = 0.05  # c for one multiplication
HEAD_SIZES = [32, 64, 128, 256]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

ORDERS = ["roundrobin", "random", "adversarial"]  # of warps, blocks and landing copies on the PTX emulator
EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module", autouse=True)
def cuda():
    """The operations of op_cases are CUDA's, and so are its bounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op_cases, "ops", cuda_operations())
        patch.setattr(op_cases, "BOUND", BOUND)
        patch.setattr(Draw, "offset", 8)
        patch.setattr(Draw, "padding", 24)
        yield


@pytest.fixture(autouse=True)
def check_launches(cuda, request):
    """The emulator checks every launch and finds no broken rule. A test that asks for no order has one by its name."""
    if torch.cuda.is_available():
        return (yield)
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    ptx_emulator.schedule(parameters.get("order", ORDERS[zlib.crc32(request.node.name.encode()) % 3]), seed=1)
    ptx_emulator.checks("all")
    ptx_emulator.clear()
    yield
    ptx_emulator.checks()
    ptx_emulator.schedule()
    assert not (found := ptx_emulator.findings()), found[0]


def assert_elements(y: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, c: float = C) -> None:
    unit = UNIT[y.dtype]
    excess = (y.double() - expected).abs() - unit * (expected.abs() + c * magnitude)
    assert not y.isnan().any() and excess.max() <= 0, f"by {(excess / (unit * magnitude)).max():.3f} u S"


def linear_elements(dtype, tokens, depth=1024):
    draw = Draw(tokens, dtype)
    args = draw(tokens, depth), draw.weight(264, depth), draw(264), draw(tokens, 264)
    y, expected = op_cases.ops.linear(*args), reference_ops.linear(*args)
    assert_elements(y, expected, reference_ops.linear(*(a.abs() for a in args)))


def gated_linear_elements(dtype, tokens, depth=1024):
    draw = Draw(tokens, dtype)
    x, weight = draw(tokens, depth), draw.weight(2 * 136, depth)
    gate, up = reference_ops.linear(x.abs(), weight.abs()).chunk(2, dim=1)
    for activation in ("silu", "gelu_tanh"):
        y, expected = (f.gated_linear(x, weight, activation) for f in (op_cases.ops, reference_ops))
        assert_elements(y, expected, gate * up)


def magnitudes(sums, size_of_sums, gains, cos, sin):
    """Through norm and RoPE, with absolute values: [T, H, E] of a projection and of its sum over absolute values."""
    if gains is not None:
        size_of_sums = size_of_sums * torch.rsqrt(sums.pow(2).mean(-1, keepdim=True) + EPS) * gains.abs()
    first, second = size_of_sums.chunk(2, dim=-1)
    cos, sin = cos.double().abs()[:, None], sin.double().abs()[:, None]
    return torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1)


def qkv_project_elements(dtype, tokens, head_size, depth=1024):
    a = qkv_inputs(Draw(tokens, dtype), tokens, depth, 4, 2, head_size, 16, bias=True, norms=True)
    caches = a["key_cache"].double(), a["value_cache"].double()
    query = reference_ops.qkv_project(**{**a, "key_cache": caches[0], "value_cache": caches[1]})
    y = op_cases.ops.qkv_project(*a.values())
    x, weight, bias = a["x"], a["weight"], a["bias"]
    sums = reference_ops.linear(x, weight, bias).unflatten(1, (-1, head_size))
    size = reference_ops.linear(x.abs(), weight.abs(), bias.abs()).unflatten(1, (-1, head_size))
    assert_elements(y, query, magnitudes(sums[:, :4], size[:, :4], a["q_norm"], a["cos"], a["sin"]))
    kept, slots = a["slot_mapping"] >= 0, a["slot_mapping"][a["slot_mapping"] >= 0]
    keys, values = (c.flatten(0, 1)[slots] for c in (a["key_cache"], a["value_cache"]))
    expected = [c.flatten(0, 1)[slots] for c in caches]
    size_of_keys = magnitudes(sums[:, 4:6], size[:, 4:6], a["k_norm"], a["cos"], a["sin"])
    assert_elements(keys, expected[0], size_of_keys[kept])
    assert_elements(values, expected[1], size[:, 6:][kept])


def project_kv_elements(dtype, tokens, head_size, depth=1024):
    draw = Draw(tokens, dtype)
    a = project_inputs(draw, tokens, depth, 3, 2, head_size, 16, bias=True, norm=True, ropes=2)
    caches = a["key_caches"].double(), a["value_caches"].double()
    reference_ops.project_kv(**{**a, "key_caches": caches[0], "value_caches": caches[1]})
    op_cases.ops.project_kv(*a.values())
    scale = torch.rsqrt(a["hidden"].double().pow(2).mean(1, keepdim=True) + EPS)
    kept, slots = a["slot_mapping"] >= 0, a["slot_mapping"][a["slot_mapping"] >= 0]
    for r in range(3):
        x, weight, bias, rope = a["hidden"].double() * scale, a["weight"][r], a["bias"][r], int(a["rope_index"][r])
        sums = reference_ops.linear(x, weight, bias).unflatten(1, (-1, head_size))
        size = reference_ops.linear(x.abs(), weight.abs(), bias.abs()).unflatten(1, (-1, head_size))
        size_of_keys = magnitudes(sums[:, :2], size[:, :2], a["k_norm"][r], a["cos"][rope], a["sin"][rope])
        for name, cache, magnitude in zip(
            ("key_caches", "value_caches"), caches, (size_of_keys, size[:, 2:]), strict=True
        ):
            y, expected = (c.flatten(0, 1)[slots] for c in (a[name][r], cache[r]))
            assert_elements(y, expected, magnitude[kept])
