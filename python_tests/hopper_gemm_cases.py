"""The multiplications where the library's sm_90a code runs: test_cuda_ops.py starts these tests on such a device."""

from __future__ import annotations

import itertools

import op_cases
import ptx_emulator
import pytest
import torch
from cuda_cases import (  # noqa: F401  fixtures
    DTYPES,
    EVERY_ORDER,
    HEAD_SIZES,
    check_launches,
    cuda,
    gated_linear_elements,
    linear_elements,
    project_kv_elements,
    qkv_project_elements,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import Draw, check_gated_linear, check_linear, check_project_kv, check_qkv_project, properties

TOKENS = [65, 128, 129, 257]  # beyond the skinny form, around the edges of tiles


@pytest.fixture
def launched():
    """How often the test has launched each form of the multiplication so far."""
    ptx_emulator.count()
    forms = dict(narrow="HopperTileILi128E", wide="HopperTileILi256E", tiles="tile_gemm", skinny="skinny_gemm")

    def count() -> dict[str, int]:
        names = [launch["kernel"] for launch in ptx_emulator.counts()]
        return {form: sum(part in name for name in names) for form, part in forms.items()}

    yield count
    ptx_emulator.count(False)


@pytest.fixture(autouse=True)
def ran(request, check_launches, launched):  # noqa: F811
    """Every test is of the form for sm_90a, and of no other, but for one."""
    yield
    counts = launched()
    assert counts["narrow"] + counts["wide"] > 0, counts
    assert (counts["tiles"] + counts["skinny"] > 0) == ("other_forms" in request.node.name), counts


@DTYPES
@pytest.mark.parametrize("width, depth", [(64, 64), (136, 72), (100, 40), (293, 8), (8, 1016), (1, 136)])
def test_linear(dtype, width, depth):
    for tokens, form in zip(TOKENS, [0, 1, 2, 7], strict=True):
        forms = dict(bias=form & 1 > 0, residual=form & 2 > 0, strided=form & 4 > 0)
        check_linear(tokens, width, depth, dtype, seed=tokens, **forms)
        check_linear(tokens, width, depth, dtype, out_dtype=torch.float32, seed=tokens, **forms)


@DTYPES
@EVERY_ORDER
def test_linear_elements(dtype, order):
    for tokens in (100, 300):
        linear_elements(dtype, tokens, depth=456)


@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width, depth", [(64, 64), (136, 72), (8, 1032)])
def test_gated_linear(dtype, activation, width, depth):
    for tokens in TOKENS:
        check_gated_linear(tokens, width, depth, dtype, activation, strided=tokens % 2 == 1, seed=tokens)


@DTYPES
@EVERY_ORDER
def test_gated_linear_elements(dtype, order):
    for tokens in (100, 300):
        gated_linear_elements(dtype, tokens, depth=456)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_qkv_project(dtype, head_size):
    heads, blocks = itertools.cycle([(1, 1), (5, 1), (4, 2)]), itertools.cycle([16, 3])
    for tokens, (query_heads, kv_heads), block_size, form in zip(TOKENS, heads, blocks, itertools.cycle(range(4))):
        form = dict(bias=form & 1 > 0, norms=form & 2 > 0, strided=tokens % 2 == 1, block_size=block_size, seed=tokens)
        check_qkv_project(tokens, 72, query_heads, kv_heads, head_size, dtype, **form)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@EVERY_ORDER
def test_qkv_project_elements(dtype, head_size, order):
    qkv_project_elements(dtype, 140, head_size, depth=200)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_project_kv(dtype, head_size):
    forms, blocks = itertools.cycle([(1, 1, 1), (2, 3, 2)]), itertools.cycle([16, 3, 64])
    for tokens, (kv_heads, layers, ropes), block_size, form in zip(TOKENS, forms, blocks, itertools.cycle(range(4))):
        form = dict(bias=form & 1 > 0, norm=form & 2 > 0, strided=tokens % 2 == 1, block_size=block_size, seed=tokens)
        check_project_kv(tokens, 72, layers, kv_heads, head_size, dtype, ropes=ropes, **form)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@EVERY_ORDER
def test_project_kv_elements(dtype, head_size, order):
    project_kv_elements(dtype, 140, head_size, depth=200)


@pytest.mark.parametrize("form", ["narrow", "wide"])
def test_more_tiles_than_blocks(form, launched):
    """The ring goes on through tiles. Unchecked: what checks remember of 132 blocks is gigabytes."""
    ptx_emulator.checks()
    tokens, width = (67 * 128 - 5, 300) if form == "narrow" else (25 * 128 - 5, 2000)
    check_linear(tokens, width, 72, torch.bfloat16)
    assert launched()[form] == 1


@DTYPES
def test_wide_tiles(dtype, launched):
    """As many tiles that wide ones finish first, of every epilogue."""
    ptx_emulator.checks()
    check_linear(1200, 1800, 328, dtype, bias=True)
    check_gated_linear(1200, 904, 328, dtype, "silu")
    check_qkv_project(1200, 72, 22, 3, 64, dtype, bias=True, norms=True)
    check_project_kv(1200, 72, 7, 2, 64, dtype, bias=True, norm=True)
    assert launched()["wide"] == 4


@DTYPES
def test_repeats_exactly(dtype):
    draw = Draw(0, dtype)
    x, weight = draw(200, 456), draw.weight(328, 456)
    first = op_cases.ops.linear(x, weight)
    assert all(torch.equal(first, op_cases.ops.linear(x, weight)) for _ in range(3))


@DTYPES
def test_other_forms(dtype, launched):
    """Few tokens, a split depth, and rows that lie in each other, which TMA does not take."""
    check_linear(70, 136, 72, dtype)
    check_linear(64, 136, 72, dtype)
    check_linear(70, 136, 4096, dtype)
    x, weight = Draw(0, dtype)(1, 72), Draw(1, dtype).weight(136, 72)
    y = op_cases.ops.linear(x.expand(70, -1), weight)
    assert torch.equal(y, op_cases.ops.linear(x.repeat(70, 1), weight))
    assert launched() == dict(narrow=2, wide=0, tiles=2, skinny=1)


@given(
    tokens=st.integers(65, 400), width=st.integers(1, 300), depth=st.integers(1, 60), bias=st.booleans(),
    residual=st.booleans(), strided=st.booleans(), out_fp32=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(properties, max_examples=20)
@DTYPES
def test_linear_properties(dtype, tokens, width, depth, bias, residual, strided, out_fp32, seed):
    form = dict(bias=bias, residual=residual, strided=strided, out_dtype=torch.float32 if out_fp32 else None)
    check_linear(tokens, width, 8 * depth, dtype, seed=seed, **form)
