"""qkv_project and project_kv on the CPU against float64, with each instruction set that the machine has."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Draw, check_project_kv, check_qkv_project, ops, properties, qkv_inputs

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEAD_SIZES = [2, 6, 32, 40, 64, 80, 96, 128, 256]


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("bias, norms", [(False, False), (True, False), (False, True), (True, True)])
def test_qkv_project(isa, dtype, head_size, bias, norms):
    for tokens, (heads, kv_heads) in itertools.product([0, 1, 2, 5, 19, 70], [(1, 1), (9, 3), (5, 1)]):
        form = dict(bias=bias, norms=norms, strided=tokens % 2 == 1, seed=tokens)
        check_qkv_project(tokens, 61, heads, kv_heads, head_size, dtype, **form)


@DTYPES
@pytest.mark.parametrize("norms", [False, True])
def test_qkv_project_large(isa, dtype, norms):
    check_qkv_project(1000, 577, 9, 3, 64, dtype, norms=norms, block_size=64)
    check_qkv_project(300, 640, 4, 1, 256, dtype, norms=norms, bias=True, block_size=64)


@DTYPES
def test_qkv_project_without_slots(isa, dtype):
    """All slots -1: a query and no write."""
    draw = Draw(3, dtype)
    inputs = qkv_inputs(draw, 6, 40, 3, 1, 32, 16, bias=False, norms=True)
    inputs["slot_mapping"] = torch.full((6,), -1)
    before = inputs["key_cache"].clone(), inputs["value_cache"].clone()
    ops.qkv_project(*inputs.values())
    assert torch.equal(before[0], inputs["key_cache"]) and torch.equal(before[1], inputs["value_cache"])


@given(
    tokens=st.integers(0, 40), hidden=st.integers(1, 100), kv_heads=st.integers(1, 4), group=st.integers(1, 4),
    head_size=st.sampled_from(HEAD_SIZES), bias=st.booleans(), norms=st.booleans(), strided=st.booleans(),
    block_size=st.sampled_from([1, 3, 16, 64]), seed=st.integers(0, 99),
)  # fmt: skip
@properties
@DTYPES
def test_qkv_project_properties(
    isa, dtype, tokens, hidden, kv_heads, group, head_size, bias, norms, strided, block_size, seed
):
    form = dict(bias=bias, norms=norms, strided=strided, block_size=block_size, seed=seed)
    check_qkv_project(tokens, hidden, kv_heads * group, kv_heads, head_size, dtype, **form)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("bias, norm", [(False, False), (True, False), (False, True), (True, True)])
def test_project_kv(isa, dtype, head_size, bias, norm):
    for tokens, (kv_heads, layers, ropes) in itertools.product([0, 1, 2, 5, 19, 70], [(1, 1, 1), (3, 4, 2)]):
        form = dict(bias=bias, norm=norm, ropes=ropes, strided=tokens % 2 == 1, seed=tokens)
        check_project_kv(tokens, 61, layers, kv_heads, head_size, dtype, **form)


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
def test_project_kv_large(isa, dtype, norm):
    check_project_kv(1000, 577, 4, 3, 64, dtype, norm=norm, block_size=64)
    check_project_kv(300, 640, 3, 1, 256, dtype, norm=norm, bias=True, ropes=2, block_size=64)


@given(
    tokens=st.integers(0, 40), hidden=st.integers(1, 100), layers=st.integers(1, 4), kv_heads=st.integers(1, 4),
    head_size=st.sampled_from(HEAD_SIZES), bias=st.booleans(), norm=st.booleans(), ropes=st.integers(1, 3),
    strided=st.booleans(), block_size=st.sampled_from([1, 3, 16, 64]), seed=st.integers(0, 99),
)  # fmt: skip
@properties
@DTYPES
def test_project_kv_properties(
    isa, dtype, tokens, hidden, layers, kv_heads, head_size, bias, norm, ropes, strided, block_size, seed
):
    form = dict(bias=bias, norm=norm, ropes=ropes, strided=strided, block_size=block_size, seed=seed)
    check_project_kv(tokens, hidden, layers, kv_heads, head_size, dtype, **form)
