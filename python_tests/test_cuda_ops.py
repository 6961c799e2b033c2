"""rms_norm, the multiplications and the projections into heads on CUDA."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import reference_ops
import torch
from cuda_cases import (  # noqa: F401  fixtures
    DTYPES,
    EVERY_ORDER,
    HEAD_SIZES,
    assert_elements,
    check_launches,
    cuda,
    gated_linear_elements,
    linear_elements,
    project_kv_elements,
    qkv_project_elements,
)
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    EPS,
    Draw,
    check_gated_linear,
    check_linear,
    check_project_kv,
    check_qkv_project,
    check_rms_norm,
    properties,
)

import pop_ext.ops

# Every form of the multiplication: 8, 16, 32 and 64 tokens at most, small and large tiles
TOKENS = [0, 1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 130, 200]


@DTYPES
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_rms_norm(dtype, residual, strided):
    for tokens, hidden in [(0, 64), (1, 8), (5, 248), (3, 256), (9, 520), (2, 1032), (300, 576), (3, 8192), (2, 16392)]:
        check_rms_norm(tokens, hidden, dtype, residual=residual, strided=strided)


@DTYPES
@EVERY_ORDER
def test_rms_norm_elements(dtype, order):
    draw = Draw(0, dtype)
    x, weight, residual = draw(50, 2048), draw.gain(2048), draw(50, 2048)
    y = op_cases.ops.rms_norm(x, weight, EPS, residual)
    expected = reference_ops.rms_norm(x, weight, EPS, residual)
    assert_elements(y, expected, reference_ops.rms_norm(x.abs(), weight.abs(), EPS, residual.abs()))


@DTYPES
@pytest.mark.parametrize("width, depth", [(64, 64), (136, 72), (100, 40), (293, 8), (8, 1032)])
def test_linear(dtype, width, depth):
    for tokens, form in zip(TOKENS, itertools.cycle(range(8))):
        forms = dict(bias=form & 1 > 0, residual=form & 2 > 0, strided=form & 4 > 0)
        check_linear(tokens, width, depth, dtype, seed=tokens, **forms)
        check_linear(tokens, width, depth, dtype, out_dtype=torch.float32, seed=tokens, **forms)


@DTYPES
@pytest.mark.parametrize("tokens, width, depth", [(513, 576, 1536), (70, 264, 4096), (129, 136, 8192), (2, 5000, 584)])
def test_linear_large(dtype, tokens, width, depth):
    """Large tiles, and the depth split over blocks."""
    check_linear(tokens, width, depth, dtype, bias=True, residual=True)


@given(
    tokens=st.integers(0, 200), width=st.integers(1, 300), depth=st.integers(1, 40), bias=st.booleans(),
    residual=st.booleans(), strided=st.booleans(), out_fp32=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@properties
@DTYPES
def test_linear_properties(dtype, tokens, width, depth, bias, residual, strided, out_fp32, seed):
    form = dict(bias=bias, residual=residual, strided=strided, out_dtype=torch.float32 if out_fp32 else None)
    check_linear(tokens, width, 8 * depth, dtype, seed=seed, **form)


@DTYPES
@EVERY_ORDER
def test_linear_elements(dtype, order):
    for tokens in (5, 40, 100, 300):
        linear_elements(dtype, tokens)


@DTYPES
def test_linear_repeats_exactly(dtype):
    """Splits of the depth meet in a fixed order."""
    draw = Draw(0, dtype)
    x, weight = draw(70, 4096), draw.weight(64, 4096)
    first = op_cases.ops.linear(x, weight)
    assert all(torch.equal(first, op_cases.ops.linear(x, weight)) for _ in range(3))


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width, depth", [(64, 64), (136, 72), (8, 200)])
def test_gated_linear(dtype, activation, width, depth):
    for tokens in TOKENS:
        check_gated_linear(tokens, width, depth, dtype, activation, strided=tokens % 2 == 1, seed=tokens)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_linear_scales(dtype, activation):
    for tokens, scale in itertools.product((5, 70), (0.3, 3.0, 30.0)):
        check_gated_linear(tokens, 136, 64, dtype, activation, scale=scale)


@DTYPES
@EVERY_ORDER
def test_gated_linear_elements(dtype, order):
    for tokens in (5, 40, 100, 300):
        gated_linear_elements(dtype, tokens)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("bias, norms", [(False, False), (True, False), (False, True), (True, True)])
def test_qkv_project(dtype, head_size, bias, norms):
    for tokens, (heads, kv_heads), block_size in zip(
        TOKENS, itertools.cycle([(1, 1), (9, 3), (5, 1)]), itertools.cycle([16, 3])
    ):
        form = dict(bias=bias, norms=norms, strided=tokens % 2 == 1, block_size=block_size, seed=tokens)
        check_qkv_project(tokens, 72, heads, kv_heads, head_size, dtype, **form)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("bias, norm", [(False, False), (True, False), (False, True), (True, True)])
def test_project_kv(dtype, head_size, bias, norm):
    for tokens, (kv_heads, layers, ropes), block_size in zip(
        TOKENS, itertools.cycle([(1, 1, 1), (3, 4, 2)]), itertools.cycle([16, 3, 64])
    ):
        form = dict(bias=bias, norm=norm, ropes=ropes, strided=tokens % 2 == 1, block_size=block_size, seed=tokens)
        check_project_kv(tokens, 72, layers, kv_heads, head_size, dtype, **form)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@EVERY_ORDER
def test_qkv_project_elements(dtype, head_size, order):
    for tokens in (5, 40, 100):
        qkv_project_elements(dtype, tokens, head_size)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@EVERY_ORDER
def test_project_kv_elements(dtype, head_size, order):
    for tokens in (5, 40, 100):
        project_kv_elements(dtype, tokens, head_size)


@pytest.mark.parametrize("part", ["linear and not gated", "gated", "qkv or kv", "not (linear or qkv or kv)"])
def test_on_sm_90a(part):
    """The multiplications that have code for sm_90a alone, in a process whose device is one."""
    if torch.cuda.is_available() or os.environ.get("PTX_EMULATOR_SM"):
        pytest.skip("the device is another one already")
    if "compute_90a" not in pop_ext.ops.build_info()["cuda_architectures"]:
        pytest.skip("the library has no PTX for sm_90a")
    file = Path(__file__).with_name("hopper_gemm_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", str(file), "-k", part]
    environment = {**os.environ, "PTX_EMULATOR_SM": "90"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:]
