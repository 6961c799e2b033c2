"""attention on the CPU against float64, with each instruction set that the machine has."""

from __future__ import annotations

import op_cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import BATCH, check_attention, properties

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HEAD_SIZES = [2, 6, 32, 40, 64, 80, 96, 128, 256]


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("window_size", [0, 1, 9, 40])
def test_attention(isa, dtype, head_size, window_size):
    for heads, kv_heads in [(1, 1), (9, 3), (5, 1)]:
        check_attention(BATCH, heads, kv_heads, head_size, dtype, window_size=window_size, strided=heads == 9)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 21])
def test_attention_spans(isa, dtype, window_size):
    op_cases.attention_spans(dtype, window_size)


@DTYPES
@pytest.mark.parametrize("query", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33])
def test_attention_few_queries(isa, dtype, query):
    op_cases.attention_few_queries(dtype, query)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 512])
def test_attention_large(isa, dtype, window_size):
    check_attention([(1000, 2000)], 3, 1, 64, dtype, window_size=window_size, block_size=64)
    check_attention([(1, 4000), (3, 2500), (300, 300)], 4, 1, 256, dtype, window_size=window_size, block_size=64)


@DTYPES
def test_attention_of_one_thread(isa, dtype):
    """Which does not share a context out: more keys than are packed at once, of one head and of two together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check_attention([(20, 1700)], 6, 2, 128, dtype, block_size=64)
        check_attention([(130, 2100), (45, 500)], 6, 2, 128, dtype, window_size=1900, block_size=64)
    finally:
        torch.set_num_threads(threads)


@DTYPES
def test_attention_empty(isa, dtype):
    op_cases.attention_empty(dtype)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 9])
def test_attention_padding(isa, dtype, window_size):
    op_cases.attention_padding(dtype, window_size)


@DTYPES
@pytest.mark.parametrize("sharpness", [0.0, 0.1, 30.0])
def test_attention_sharpness(isa, dtype, sharpness):
    op_cases.attention_sharpness(dtype, sharpness)


@DTYPES
@pytest.mark.parametrize("sharpness", [1e4, 1e30])
def test_attention_extreme_scores(isa, dtype, sharpness):
    op_cases.attention_extreme_scores(dtype, sharpness)


@DTYPES
def test_attention_generous_bounds(isa, dtype):
    op_cases.attention_generous_bounds(dtype)


@DTYPES
def test_attention_keeps_sequences_apart(isa, dtype):
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
    isa, dtype, lengths, kv_heads, group, head_size, block_size, window_size, images, strided, seed
):
    form = dict(block_size=block_size, window_size=window_size, images=images, strided=strided, seed=seed)
    check_attention(lengths, kv_heads * group, kv_heads, head_size, dtype, **form)
