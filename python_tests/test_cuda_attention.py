"""attention on CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import op_cases
import pytest
import reference_ops
import torch
from cuda_cases import DTYPES, EVERY_ORDER, HEAD_SIZES, assert_elements, check_launches, cuda  # noqa: F401  fixtures
from hypothesis import given
from hypothesis import strategies as st
from op_cases import BATCH, Draw, attention_inputs, check_attention, properties

import pop_ext.ops


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("window_size", [0, 1, 9, 40])
def test_attention(dtype, head_size, window_size):
    for heads, kv_heads in [(1, 1), (9, 3), (5, 1)]:
        check_attention(BATCH, heads, kv_heads, head_size, dtype, window_size=window_size, strided=heads == 9)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 21])
def test_attention_spans(dtype, window_size):
    op_cases.attention_spans(dtype, window_size)


@DTYPES
@pytest.mark.parametrize("query", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33])
def test_attention_few_queries(dtype, query):
    op_cases.attention_few_queries(dtype, query)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 512])
def test_attention_large(dtype, window_size):
    check_attention([(300, 1100)], 3, 1, 64, dtype, window_size=window_size, block_size=64)
    check_attention([(1, 4000), (3, 2500), (200, 200)], 4, 1, 256, dtype, window_size=window_size, block_size=64)


@DTYPES
def test_attention_empty(dtype):
    op_cases.attention_empty(dtype)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 9])
def test_attention_padding(dtype, window_size):
    op_cases.attention_padding(dtype, window_size)


@DTYPES
@pytest.mark.parametrize("sharpness", [0.0, 0.1, 30.0])
def test_attention_sharpness(dtype, sharpness):
    op_cases.attention_sharpness(dtype, sharpness)


@DTYPES
def test_attention_extreme_scores(dtype):
    op_cases.attention_extreme_scores(dtype, 1e4)


@DTYPES
def test_attention_generous_bounds(dtype):
    op_cases.attention_generous_bounds(dtype)


@DTYPES
def test_attention_keeps_sequences_apart(dtype):
    op_cases.attention_keeps_sequences_apart(dtype)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)).map(lambda p: (p[0], p[0] + p[1])), max_size=4),
    kv_heads=st.integers(1, 3), group=st.integers(1, 5), head_size=st.sampled_from(HEAD_SIZES),
    block_size=st.sampled_from([1, 3, 16, 64]), window_size=st.sampled_from([0, 0, 1, 2, 7, 33, 1000]),
    images=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@properties
@DTYPES
def test_attention_properties(
    dtype, lengths, kv_heads, group, head_size, block_size, window_size, images, strided, seed
):
    form = dict(block_size=block_size, window_size=window_size, images=images, strided=strided, seed=seed)
    check_attention(lengths, kv_heads * group, kv_heads, head_size, dtype, **form)


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@EVERY_ORDER
def test_attention_elements(dtype, head_size, order):
    a = attention_inputs(Draw(1, dtype), [(70, 300), (1, 500), (4, 130)], 4, 2, head_size, block_size=16)
    y, expected = op_cases.ops.attention(*a.values()), reference_ops.attention(**a)
    # the sum of p |v|
    assert_elements(y, expected, reference_ops.attention(**{**a, "value_cache": a["value_cache"].abs()}), c=2)


@pytest.mark.parametrize(
    "part", ["elements or block_sizes", "groups or splits", "not (elements or block_sizes or groups or splits)"]
)
def test_on_sm_90a(part):
    """The kernel that has code for sm_90a alone, in a process whose device is one."""
    if torch.cuda.is_available() or os.environ.get("PTX_EMULATOR_SM"):
        pytest.skip("the device is another one already")
    if "compute_90a" not in pop_ext.ops.build_info()["cuda_architectures"]:
        pytest.skip("the library has no PTX for sm_90a")
    file = Path(__file__).with_name("hopper_attention_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", str(file), "-k", part]
    environment = {**os.environ, "PTX_EMULATOR_SM": "90"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:]
