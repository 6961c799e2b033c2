"""rms_norm, the multiplications and the projections into heads on CUDA."""

from __future__ import annotations

import itertools

import op_cases
import pytest
import reference_ops
import torch
from cuda_cases import DTYPES, EVERY_ORDER, HEAD_SIZES, assert_elements, check_launches, cuda  # noqa: F401  fixtures
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
    project_inputs,
    properties,
    qkv_inputs,
)

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
        draw = Draw(tokens, dtype)
        args = draw(tokens, 1024), draw.weight(264, 1024), draw(264), draw(tokens, 264)
        y, expected = op_cases.ops.linear(*args), reference_ops.linear(*args)
        assert_elements(y, expected, reference_ops.linear(*(a.abs() for a in args)))


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
        draw = Draw(tokens, dtype)
        x, weight = draw(tokens, 1024), draw.weight(2 * 136, 1024)
        gate, up = reference_ops.linear(x.abs(), weight.abs()).chunk(2, dim=1)
        for activation in ("silu", "gelu_tanh"):
            y, expected = (f.gated_linear(x, weight, activation) for f in (op_cases.ops, reference_ops))
            assert_elements(y, expected, gate * up)


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


def magnitudes(sums, size_of_sums, gains, cos, sin):
    """Through norm and RoPE, with absolute values: [T, H, E] of a projection and of its sum over absolute values."""
    if gains is not None:
        size_of_sums = size_of_sums * torch.rsqrt(sums.pow(2).mean(-1, keepdim=True) + EPS) * gains.abs()
    first, second = size_of_sums.chunk(2, dim=-1)
    cos, sin = cos.double().abs()[:, None], sin.double().abs()[:, None]
    return torch.cat([first * cos + second * sin, second * cos + first * sin], dim=-1)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@EVERY_ORDER
def test_qkv_project_elements(dtype, head_size, order):
    for tokens in (5, 40, 100):
        a = qkv_inputs(Draw(tokens, dtype), tokens, 1024, 4, 2, head_size, 16, bias=True, norms=True)
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


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@EVERY_ORDER
def test_project_kv_elements(dtype, head_size, order):
    for tokens in (5, 40, 100):
        draw = Draw(tokens, dtype)
        a = project_inputs(draw, tokens, 1024, 3, 2, head_size, 16, bias=True, norm=True, ropes=2)
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
