"""rms_norm, linear and gated_linear on the CPU against float64, and what holds for all operations.

With each instruction set that the machine has, errors are at most 1e-5 in float32 and 4e-3 in bfloat16.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import pydoc
import re
import subprocess
import sys

import op_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    BATCH,
    EPS,
    NAMES,
    Draw,
    assert_close,
    calls,
    check_attention,
    check_gated_linear,
    check_linear,
    check_project_kv,
    check_qkv_project,
    check_rms_norm,
    ops,
    properties,
)

import pop_ext.ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEAD_SIZES = [2, 6, 32, 40, 64, 80, 96, 128, 256]
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])


@DTYPES
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_rms_norm(isa, dtype, residual, strided):
    for tokens, hidden in [(0, 64), (1, 1), (1, 3), (1, 576), (2, 90), (7, 640), (37, 93), (300, 577), (3, 8193)]:
        check_rms_norm(tokens, hidden, dtype, residual=residual, strided=strided)


@DTYPES
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_scales(isa, dtype, scale):
    """eps matters for small inputs only, and nothing overflows for large ones."""
    for eps in (1e-5, 1e-6, 0.0):
        check_rms_norm(5, 130, dtype, scale=scale, eps=eps, residual=False)


@given(
    tokens=st.integers(0, 20),
    hidden=st.integers(1, 400),
    residual=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
@properties
@DTYPES
def test_rms_norm_properties(isa, dtype, tokens, hidden, residual, strided, seed):
    check_rms_norm(tokens, hidden, dtype, residual=residual, strided=strided, seed=seed)


@DTYPES
@pytest.mark.parametrize("width, depth", [(67, 45), (129, 131), (48, 64), (1, 17), (300, 1), (33, 514)])
def test_linear_every_small_batch(isa, dtype, width, depth):
    for tokens, form in zip(range(41), itertools.cycle(range(8))):
        check_linear(
            tokens, width, depth, dtype, bias=form & 1 > 0, residual=form & 2 > 0, strided=form & 4 > 0, seed=tokens
        )


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "out_fp32"])
def test_linear_forms(isa, dtype, bias, residual, out_dtype):
    for tokens, width, depth in [(1, 576, 576), (5, 131, 77), (64, 128, 96), (130, 257, 191)]:
        for strided in (False, True):
            form = dict(bias=bias, residual=residual, out_dtype=out_dtype, strided=strided)
            check_linear(tokens, width, depth, dtype, **form)


@DTYPES
@pytest.mark.parametrize(
    "tokens, width, depth", [(1000, 577, 1025), (513, 1536, 576), (2, 5003, 577), (1000, 31, 2000)]
)
def test_linear_large(isa, dtype, tokens, width, depth):
    check_linear(tokens, width, depth, dtype, bias=True, residual=True)


@given(
    tokens=st.integers(0, 70), width=st.integers(1, 200), depth=st.integers(1, 200), bias=st.booleans(),
    residual=st.booleans(), strided=st.booleans(), out_fp32=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@properties
@DTYPES
def test_linear_properties(isa, dtype, tokens, width, depth, bias, residual, strided, out_fp32, seed):
    out_dtype = torch.float32 if out_fp32 else None
    check_linear(
        tokens, width, depth, dtype, bias=bias, residual=residual, out_dtype=out_dtype, strided=strided, seed=seed
    )


@DTYPES
@ACTIVATIONS
def test_gated_linear_every_small_batch(isa, dtype, activation):
    for (width, depth), tokens in itertools.product([(67, 45), (33, 130), (1, 7), (64, 64)], range(41)):
        check_gated_linear(tokens, width, depth, dtype, activation, strided=tokens % 2 == 1, seed=tokens)


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("tokens, width, depth", [(1000, 191, 577), (300, 1536, 96)])
def test_gated_linear_large(isa, dtype, activation, tokens, width, depth):
    check_gated_linear(tokens, width, depth, dtype, activation)


@DTYPES
@ACTIVATIONS
@pytest.mark.parametrize("scale", [1e-3, 20.0, 1e4])
def test_gated_linear_scales(isa, dtype, activation, scale):
    """From the linear part of the activation to where exp and tanh saturate: finite, and right."""
    for tokens in (1, 5, 70):
        check_gated_linear(tokens, 130, 60, dtype, activation, scale=scale)


@given(
    tokens=st.integers(0, 70), width=st.integers(1, 150), depth=st.integers(1, 150), strided=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
@properties
@DTYPES
@ACTIVATIONS
def test_gated_linear_properties(isa, dtype, activation, tokens, width, depth, strided, seed):
    check_gated_linear(tokens, width, depth, dtype, activation, strided=strided, seed=seed)


@DTYPES
@NAMES
def test_public_functions(name, dtype):
    op_cases.public_function(name, dtype)


@NAMES
def test_public_functions_are_documented(name):
    """help() names every argument with what it is, and says what is returned and raised."""
    function = getattr(pop_ext.ops, name)
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    schema = getattr(torch.ops.pop, name).default._schema
    assert list(inspect.signature(function).parameters) == [argument.name for argument in schema.arguments]
    for argument in schema.arguments:
        line = re.search(rf"^ +{argument.name}: (.+)$", text.split("Args:")[1], re.MULTILINE)
        assert line and (str(argument.type) != "Tensor" or line[1].startswith("[")), argument.name
    assert "Raises:" in text and ("Returns:" in text) == bool(schema.returns)


def test_imports_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import pop_ext.ops, torch; torch.ops.pop.linear"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


@DTYPES
def test_int32_slots(isa, dtype):
    op_cases.int32_slots(dtype)


@DTYPES
@NAMES
def test_opcheck(name, dtype):
    args, kwargs = calls(dtype)[name]
    torch.library.opcheck(getattr(ops, name).default, args, kwargs)


@NAMES
def test_opcheck_empty(name):
    args, kwargs = calls(torch.float32, tokens=0)[name]
    torch.library.opcheck(getattr(ops, name).default, args, kwargs)


@DTYPES
@NAMES
def test_meta(name, dtype):
    """The fake kernel on meta tensors: the shape, dtype and strides of the real one, and no data."""
    args, kwargs = calls(dtype)[name]
    real = getattr(ops, name)(*args, **kwargs)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    fake = getattr(ops, name)(*meta, **kwargs)
    if real is None:
        assert fake is None
    else:
        assert (fake.device.type, fake.shape, fake.dtype, fake.stride()) == (
            "meta",
            real.shape,
            real.dtype,
            real.stride(),
        )


@DTYPES
def test_rows_are_apart(isa, dtype):
    """A token that is NaN or infinite spoils its own row and no other."""
    for tokens in (2, 7, 70):
        args = {name: call for name, call in calls(dtype, tokens).items() if name not in ("attention", "project_kv")}
        for name, (inputs, kwargs) in args.items():
            good = getattr(ops, name)(*inputs, **kwargs).clone()
            for value in (float("nan"), float("inf")):
                x = inputs[0].clone()
                x[1] = value
                bad = getattr(ops, name)(x, *inputs[1:], **kwargs)
                assert not bad[1].isfinite().all(), name
                keep = torch.arange(tokens) != 1
                assert_close(bad[keep], good[keep], dtype, name)


@DTYPES
@NAMES
def test_zero_sizes(isa, name, dtype):
    """No hidden size, no outputs, no layers: the empty sum, or an error, and nothing worse."""
    for op, args in [
        ("rms_norm", (torch.empty(3, 0, dtype=dtype), torch.empty(0), EPS)),
        ("linear", (torch.empty(3, 0, dtype=dtype), torch.empty(5, 0, dtype=dtype))),
        ("linear", (torch.ones(3, 4, dtype=dtype), torch.empty(0, 4, dtype=dtype))),
        ("gated_linear", (torch.empty(3, 0, dtype=dtype), torch.empty(4, 0, dtype=dtype), "silu")),
        ("gated_linear", (torch.ones(3, 4, dtype=dtype), torch.empty(0, 4, dtype=dtype), "gelu_tanh")),
    ]:
        if op == name:
            try:
                y = getattr(ops, op)(*args)
            except RuntimeError:
                continue
            assert y.shape[0] == 3 and not y.any()
    for kv_heads, head_size, hidden in [(0, 32, 8), (2, 0, 8), (2, 32, 0), (0, 0, 0)]:
        draw = Draw(1, dtype)
        cache = torch.zeros(2, 16, kv_heads, head_size, dtype=dtype)
        rope = torch.zeros(2, 3, head_size // 2)
        slots = torch.arange(3)
        with contextlib.suppress(RuntimeError):
            if name == "qkv_project":
                weight = draw((2 + 2 * kv_heads) * head_size, hidden)
                ops.qkv_project(draw(3, hidden), weight, None, None, None, EPS, *rope, slots, cache, cache.clone())
            if name == "attention":
                tables, index = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
                ops.attention(draw(3, 2, head_size), cache, cache, tables, index, index[1:], 3, 3, 1.0)
            if name == "project_kv":
                for layers in (0, 2):
                    weight = draw(layers, 2 * kv_heads * head_size, hidden)
                    index = torch.zeros(layers, dtype=torch.int32)
                    caches = [torch.zeros(layers, *cache.shape, dtype=dtype) for _ in range(2)]
                    ops.project_kv(draw(3, hidden), weight, None, None, EPS, *rope[:, None], index, slots, *caches)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(isa, dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_linear(130, 257, 191, dtype, bias=True)
        check_linear(1, 1001, 300, dtype, residual=True)
        check_gated_linear(70, 130, 96, dtype, "silu")
        check_qkv_project(70, 96, 9, 3, 64, dtype, norms=True)
        check_attention(BATCH, 9, 3, 64, dtype)
        check_project_kv(70, 96, 4, 3, 64, dtype, norm=True)
        check_rms_norm(70, 577, dtype)
    finally:
        torch.set_num_threads(before)


@DTYPES
@NAMES
def test_repeats_exactly(isa, name, dtype):
    op_cases.repeats_exactly(name, dtype)
