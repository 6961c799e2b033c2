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
import torch
from helpers import cuda_operations
from op_cases import UNIT, Draw

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
