"""attention where the library's sm_90a code runs: test_cuda_attention.py starts these tests on such a device."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import op_cases
import ptx_emulator
import pytest
import reference_ops
import torch
from cuda_cases import DTYPES, EVERY_ORDER, assert_elements, check_launches, cuda  # noqa: F401  fixtures
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import BATCH, Draw, attention_inputs, check_attention, properties
from test_cuda_runtime import captured

import pop_ext.ops

HEAD_SIZES = pytest.mark.parametrize("head_size", [64, 128])


@pytest.fixture
def kernels():
    """The names of the kernels that the test has launched so far."""
    ptx_emulator.count()
    yield lambda: {launch["kernel"] for launch in ptx_emulator.counts()}
    ptx_emulator.count(False)


@pytest.fixture(autouse=True)
def ran(request, check_launches, kernels):  # noqa: F811
    """Every test is of the kernel for sm_90a, but for one."""
    yield
    names = kernels()
    assert any("attention_hopper_kernel" in name for name in names) == ("other_kernels" not in request.node.name), names


@DTYPES
@HEAD_SIZES
@EVERY_ORDER
def test_elements(dtype, head_size, order):
    a = attention_inputs(Draw(1, dtype), [(70, 300), (1, 500), (4, 130), (200, 200)], 4, 2, head_size)
    y, expected = op_cases.ops.attention(*a.values()), reference_ops.attention(**a)
    # the sum of p |v|
    assert_elements(y, expected, reference_ops.attention(**{**a, "value_cache": a["value_cache"].abs()}), c=2)


@EVERY_ORDER
@pytest.mark.parametrize("block_size", [1, 3, 8, 16, 24, 64, 128, 192, 1024])
def test_block_sizes(order, block_size):
    """Boxes of 8 to 128 keys, and blocks that hold none."""
    head_size = 128 if block_size % 64 == 0 else 64
    check_attention([(40, 300), (130, 130)], 2, 1, head_size, torch.bfloat16, block_size=block_size, strided=True)


@DTYPES
@HEAD_SIZES
@pytest.mark.parametrize("window_size", [0, 1, 9, 200])
def test_groups_and_windows(dtype, head_size, window_size):
    form = dict(window_size=window_size, block_size=64)
    for heads, kv_heads in [(2, 2), (5, 1)]:
        check_attention([(33, 400), (129, 129)], heads, kv_heads, head_size, dtype, **form)
    check_attention(BATCH, 9, 3, head_size, dtype, strided=True, **form)


@DTYPES
@EVERY_ORDER
@pytest.mark.parametrize("window_size", [0, 21])
def test_spans(dtype, order, window_size):
    form = dict(window_size=window_size, images=True)
    check_attention([(60, 90), (17, 17), (130, 290)], 4, 2, 64, dtype, strided=True, **form)
    check_attention([(60, 90), (17, 17), (130, 290)], 2, 1, 128, dtype, block_size=64, **form)


@HEAD_SIZES
@pytest.mark.parametrize("context", [127, 128, 129, 255, 256, 257, 383, 385])
def test_ragged_ends(head_size, context):
    """Contexts around the edges of tiles, whose queries are all of them or the last."""
    check_attention([(context, context), (100, context)], 1, 1, head_size, torch.float16, block_size=128, seed=context)


@DTYPES
@EVERY_ORDER
def test_splits(dtype, order, kernels):
    """A chunk of a prompt on a long context, which blocks share out."""
    for head_size in (64, 128):
        check_attention([(40, 1500), (20, 700)], 4, 2, head_size, dtype, block_size=64)
    assert sum("combine_kernel" in name for name in kernels()) == 2


@DTYPES
@HEAD_SIZES
@pytest.mark.parametrize("window_size", [0, 9])
def test_padding(dtype, head_size, window_size):
    check_attention([(3, 0), (40, 70), (70, 0), (5, 5)], 4, 2, head_size, dtype, window_size=window_size)


@DTYPES
@HEAD_SIZES
@pytest.mark.parametrize("sharpness", [0.0, 0.1, 30.0])
def test_sharpness(dtype, head_size, sharpness):
    check_attention([(40, 300), (20, 700)], 4, 2, head_size, dtype, sharpness=sharpness)


@DTYPES
@HEAD_SIZES
def test_extreme_scores(dtype, head_size):
    """Scores whose exponentials leave float32: no NaN, and still a weighted mean of the values."""
    inputs = attention_inputs(Draw(5, dtype), [(40, 300), (20, 700)], 4, 2, head_size, sharpness=1e4)
    y = op_cases.ops.attention(*inputs.values())
    assert y.abs().max() <= inputs["value_cache"].nan_to_num(0).abs().max() * 1.01


@DTYPES
@HEAD_SIZES
def test_repeats_exactly(dtype, head_size):
    a = attention_inputs(Draw(2, dtype), [(40, 1100), (129, 129)], 4, 2, head_size)
    outputs = [op_cases.ops.attention(*a.values()) for _ in range(2)]
    assert torch.equal(*outputs)


def test_capture():
    """A captured call has its tensor maps with it, and computes from what the tensors hold when it is launched."""
    a = attention_inputs(Draw(3, torch.bfloat16), [(40, 300)], 4, 2, 64)
    output, replay = captured(op_cases.ops.attention, list(a.values()), {})
    try:
        a["query"].mul_(0.7)
        with ptx_emulator.registered(*(t for t in (*a.values(), output) if isinstance(t, torch.Tensor))):
            replay()
    finally:
        ctypes.CDLL(str(pop_ext.ops.CUDA_LIBRARY)).pop_cuda_set_emulated_stream(None)
    assert torch.equal(output, op_cases.ops.attention(*a.values()))


@DTYPES
def test_keeps_sequences_apart(dtype):
    op_cases.attention_keeps_sequences_apart(dtype)


@DTYPES
def test_few_rows_and_other_head_sizes_have_other_kernels(dtype):
    check_attention([(4, 200), (1, 90)], 4, 1, 64, dtype)
    for head_size in (32, 256):
        check_attention([(40, 200)], 4, 2, head_size, dtype)


@DTYPES
@HEAD_SIZES
def test_machine_code(dtype, head_size, tmp_path):
    """The assembler spills no register, and lets no wgmma wait for another."""
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas is not installed")
    check_attention([(40, 40)], 1, 1, head_size, dtype)
    (launch,) = ptx_emulator.counts()
    source = tmp_path / "module.ptx"
    source.write_text(ptx_emulator.module_text(launch["module"]))
    command = ["ptxas", "-v", "-arch=sm_90a", "-e", launch["kernel"], str(source), "-o", "/dev/null"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.search(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), said
    assert "serialized" not in said and "injected" not in said, said


@given(
    lengths=st.lists(st.tuples(st.integers(17, 150), st.integers(0, 200)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3), group=st.integers(1, 5), head_size=st.sampled_from([64, 128]),
    block_size=st.sampled_from([1, 3, 8, 16, 64, 128]), window_size=st.sampled_from([0, 0, 1, 7, 130, 1000]),
    images=st.booleans(), strided=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(properties, max_examples=15)
@DTYPES
def test_properties(dtype, lengths, kv_heads, group, head_size, block_size, window_size, images, strided, seed):
    lengths = [(queries, queries + before) for queries, before in lengths]
    form = dict(block_size=block_size, window_size=window_size, images=images, strided=strided, seed=seed)
    check_attention(lengths, kv_heads * group, kv_heads, head_size, dtype, **form)
