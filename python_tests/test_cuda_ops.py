"""The CUDA implementation of every operation: on the GPU where there is one, else on the software CUDA device.

The test bodies are test_ops.py's, with its random inputs, in the shapes that CUDA takes; strided rows lie on 16-byte
boundaries and no better ones, and on the software device outputs are NaN until written. Beside the bound on whole
outputs, each element is held to |error| <= u |reference| + c u S, where S is the reference's sum over absolute values,
u the unit roundoff (2^-8 in bfloat16, 2^-11 in float16), and c how much of the last bit may be lost inside.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import subprocess
import sys
import zlib

import ptx_emulator as emulator
import pytest
import reference_ops
import test_ops
import torch
from helpers import cuda_operations
from hypothesis import given
from hypothesis import strategies as st
from test_ops import (
    BATCH,
    EPS,
    UNIT,
    Draw,
    attention_inputs,
    check_attention,
    check_gated_linear,
    check_linear,
    check_project_kv,
    check_qkv_project,
    check_rms_norm,
    project_inputs,
    properties,
    qkv_inputs,
)

import pop_ext.ops

BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
C = 0.05  # c for one multiplication
HEAD_SIZES = [32, 64, 128, 256]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# Every form of the multiplication: 8, 16, 32 and 64 tokens at most, small and large tiles
TOKENS = [0, 1, 7, 8, 9, 16, 17, 32, 33, 64, 65, 128, 130, 200]


ORDERS = ["roundrobin", "random", "adversarial"]  # of warps, blocks and landing copies on the software device
EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module", autouse=True)
def cuda():
    """The operations of test_ops.py are CUDA's, and so are its bounds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_ops, "ops", cuda_operations())
        patch.setattr(test_ops, "BOUND", BOUND)
        patch.setattr(Draw, "offset", 8)
        patch.setattr(Draw, "padding", 24)
        yield


@pytest.fixture(autouse=True)
def look(cuda, request):
    """The software device looks at every launch, and finds no broken rule. A test that asks for no order has one by its
    name.
    """
    if torch.cuda.is_available():
        return (yield)
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    emulator.schedule(parameters.get("order", ORDERS[zlib.crc32(request.node.name.encode()) % 3]), seed=1)
    emulator.checks("all")
    emulator.clear()
    yield
    emulator.checks()
    emulator.schedule()
    assert not (found := emulator.findings()), found[0]


def assert_elements(y: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor, c: float = C) -> None:
    unit = UNIT[y.dtype]
    excess = (y.double() - expected).abs() - unit * (expected.abs() + c * magnitude)
    assert not y.isnan().any() and excess.max() <= 0, f"by {(excess / (unit * magnitude)).max():.3f} u S"


# rms_norm


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
    y = test_ops.ops.rms_norm(x, weight, EPS, residual)
    expected = reference_ops.rms_norm(x, weight, EPS, residual)
    assert_elements(y, expected, reference_ops.rms_norm(x.abs(), weight.abs(), EPS, residual.abs()))


# linear


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
        y, expected = test_ops.ops.linear(*args), reference_ops.linear(*args)
        assert_elements(y, expected, reference_ops.linear(*(a.abs() for a in args)))


@DTYPES
def test_linear_repeats_exactly(dtype):
    """Splits of the depth meet in a fixed order."""
    draw = Draw(0, dtype)
    x, weight = draw(70, 4096), draw.weight(64, 4096)
    first = test_ops.ops.linear(x, weight)
    assert all(torch.equal(first, test_ops.ops.linear(x, weight)) for _ in range(3))


# gated_linear


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
            y, expected = (f.gated_linear(x, weight, activation) for f in (test_ops.ops, reference_ops))
            assert_elements(y, expected, gate * up)


# qkv_project and project_kv


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
        y = test_ops.ops.qkv_project(*a.values())
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
        test_ops.ops.project_kv(*a.values())
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


# attention


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("window_size", [0, 1, 9, 40])
def test_attention(dtype, head_size, window_size):
    for heads, kv_heads in [(1, 1), (9, 3), (5, 1)]:
        check_attention(BATCH, heads, kv_heads, head_size, dtype, window_size=window_size, strided=heads == 9)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 21])
def test_attention_spans(dtype, window_size):
    test_ops.test_attention_spans(None, dtype, window_size)


@DTYPES
@pytest.mark.parametrize("query", [1, 2, 3, 5, 8, 15, 16, 17, 31, 33])
def test_attention_few_queries(dtype, query):
    test_ops.test_attention_few_queries(None, dtype, query)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 512])
def test_attention_large(dtype, window_size):
    check_attention([(300, 1100)], 3, 1, 64, dtype, window_size=window_size, block_size=64)
    check_attention([(1, 4000), (3, 2500), (200, 200)], 4, 1, 256, dtype, window_size=window_size, block_size=64)


@DTYPES
def test_attention_empty(dtype):
    test_ops.test_attention_empty(None, dtype)


@DTYPES
@pytest.mark.parametrize("sharpness", [0.0, 0.1, 30.0])
def test_attention_sharpness(dtype, sharpness):
    test_ops.test_attention_sharpness(None, dtype, sharpness)


@DTYPES
def test_attention_extreme_scores(dtype):
    test_ops.test_attention_extreme_scores(None, dtype, 1e4)


@DTYPES
def test_attention_generous_bounds(dtype):
    test_ops.test_attention_generous_bounds(None, dtype)


@DTYPES
def test_attention_keeps_sequences_apart(dtype):
    test_ops.test_attention_keeps_sequences_apart(None, dtype)


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
    y, expected = test_ops.ops.attention(*a.values()), reference_ops.attention(**a)
    # the sum of p |v|
    assert_elements(y, expected, reference_ops.attention(**{**a, "value_cache": a["value_cache"].abs()}), c=2)


# What holds for all operations


def captured(operation, args, kwargs):
    """The output, and a function that runs the captured operation again, which is all that ever runs it."""
    library, kernels = emulator._library(), emulator._cuda_operations()
    stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    assert library.cudaStreamCreate(ctypes.byref(stream)) == 0
    kernels.pop_cuda_set_emulated_stream(stream)
    assert library.cudaStreamBeginCapture(stream, 0) == 0
    output = operation(*args, **kwargs)
    assert library.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert library.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) == 0

    def replay():
        assert library.cudaGraphLaunch(executable, stream) == 0 and library.cudaStreamSynchronize(stream) == 0

    return output, replay


@DTYPES
@test_ops.NAMES
@pytest.mark.parametrize("tokens", [6, 70])
def test_capture(name, dtype, tokens):
    """In a graph: nothing runs at capture, and each launch computes from what the tensors hold then."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU, torch.cuda.graph captures: test_capture_on_a_gpu")
    args, kwargs = test_ops.calls(dtype, tokens)[name]
    if name == "linear":  # with its depth split, which takes a workspace
        args = [Draw(0, dtype).packed(tokens, 2048), Draw(1, dtype).weight(24, 2048), None, None]
    written = args[-2:] if name in ("qkv_project", "project_kv") else ()
    operation, start = getattr(test_ops.ops, name), [t.clone() for t in written]

    def run(call) -> list[torch.Tensor]:
        """The output and the caches after a call, from the caches as they were."""
        for cache, values in zip(written, start, strict=True):
            cache.copy_(values)
        output = call()
        return [t.clone() for t in (output, *written) if t is not None]

    inputs = [args[0] * factor for factor in (0.7, 1.3)]
    output, replay = captured(operation, args, kwargs)
    try:
        assert output is None or output.isnan().all(), "ran at capture"
        assert all(torch.equal(a, b) for a, b in zip(written, start, strict=True)), "ran at capture"
        replays, known = [], [t for t in (*args, *kwargs.values(), output) if isinstance(t, torch.Tensor)]
        for x in inputs:
            args[0].copy_(x)
            with emulator.registered(*known):
                replays.append(run(lambda: (replay(), output)[1]))
    finally:
        emulator._cuda_operations().pop_cuda_set_emulated_stream(None)
    for x, results in zip(inputs, replays, strict=True):
        args[0].copy_(x)
        expected = run(lambda: operation(*args, **kwargs))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@test_ops.NAMES
def test_capture_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU; test_capture captures on the software device")
    args, kwargs = test_ops.calls(torch.bfloat16, tokens=70)[name]
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
    operation = getattr(torch.ops.pop, name)
    operation(*args, **kwargs)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operation(*args, **kwargs)
    args[0].mul_(0.7)
    graph.replay()
    if output is not None:
        assert torch.equal(output, operation(*args, **kwargs))


def test_cache_beyond_32_bits():
    """Blocks on both sides of 2^31 elements: sparsely mapped memory, of which a few pages are touched."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of the GPU's memory are free")
    dtype, block_size, heads, head_size = torch.bfloat16, 64, 8, 128
    blocks = 2**31 // (block_size * heads * head_size) + 16
    keys, values = (torch.empty(blocks, block_size, heads, head_size, dtype=dtype) for _ in range(2))
    assert keys.numel() > 2**31
    draw, used = Draw(0, dtype), torch.tensor([[1, blocks - 1, 2, blocks - 2]], dtype=torch.int32)
    for cache in (keys, values):
        cache[used.long()] = 0
    tokens = 4 * block_size - 10
    positions = torch.arange(tokens)
    slots = used[0].long()[positions // block_size] * block_size + positions % block_size
    x, weight = draw(tokens, 64), draw.weight(3 * heads * head_size, 64)
    cos, sin = draw.rope(tokens, head_size // 2)
    query = test_ops.ops.qkv_project(x, weight, None, None, None, EPS, cos, sin, slots, keys, values)
    small = [torch.zeros(4, block_size, heads, head_size, dtype=torch.float64) for _ in range(2)]
    expected = reference_ops.qkv_project(x, weight, None, None, None, EPS, cos, sin, positions, *small)
    test_ops.assert_close(query, expected, dtype)
    for cache, reference in zip((keys, values), small, strict=True):
        test_ops.assert_close(cache[used[0].long()], reference, dtype)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    for first in (0, tokens - 3):  # prefill and few queries
        index = starts.clone()
        index[1] -= first
        args = query[first:], index, lengths, tokens - first, tokens, head_size**-0.5
        y = test_ops.ops.attention(args[0], keys, values, used, *args[1:])
        near = torch.arange(4, dtype=torch.int32)[None]
        kept = [cache[used[0].long()] for cache in (keys, values)]
        test_ops.assert_close(y, reference_ops.attention(args[0], *kept, near, *args[1:]), dtype)


@DTYPES
@test_ops.NAMES
def test_repeats_exactly(name, dtype):
    test_ops.test_repeats_exactly(None, name, dtype)


def test_on_sm_86():
    """With the 99 KiB of shared memory that a block has there: other tiles and stages."""
    if torch.cuda.is_available() or os.environ.get("POP_EMULATOR_SM"):
        pytest.skip("the device is another one already")
    environment = {**os.environ, "POP_EMULATOR_SM": "86"}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "elements or large"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:]


def test_float32_is_refused():
    for name, (args, kwargs) in test_ops.calls(torch.float32).items():
        with pytest.raises(RuntimeError, match=rf"pop::{name}: \w+ is float32, expected bfloat16 or float16"):
            getattr(test_ops.ops, name)(*args, **kwargs)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("rms_norm", {"x": (6, 44), "weight": (44,), "residual": (6, 44)}, "x's hidden size D is 44, expected a mult"),
        ("linear", {"x": (6, 44), "weight": (24, 44)}, "x's size K is 44, expected a multiple of 8 on CUDA"),
        ("gated_linear", {"gate_up_weight": (24, 40)}, "gate_up_weight's F is 12, expected a multiple of 8 on CUDA"),
        ("attention", {"query": (6, 4, 48), "key_cache": (9, 16, 2, 48), "value_cache": (9, 16, 2, 48)},
         "query's head size E is 48, expected 32, 64, 128 or 256 on CUDA"),
    ],
)  # fmt: skip
def test_sizes_that_are_refused(name, change, message):
    args, kwargs = test_ops.calls(torch.bfloat16)[name]
    names = list(inspect.signature(getattr(pop_ext.ops, name)).parameters)
    named = dict(zip(names, args, strict=False)) | kwargs
    for argument, shape in change.items():
        named[argument] = torch.zeros(shape, dtype=named[argument].dtype)
    with pytest.raises(RuntimeError, match=f"pop::{name}: {message}"):
        getattr(test_ops.ops, name)(**named)


def test_alignment_that_is_refused():
    x, weight = torch.zeros(6 * 64 + 8, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"pop::linear: x is at an address of 16 n \+ 2, expected 16 n on CUDA"):
        test_ops.ops.linear(x[1:385].view(6, 64), weight)
    with pytest.raises(RuntimeError, match=r"pop::linear: x is laid out with strides \[65, 1\], expected rows that"):
        test_ops.ops.linear(torch.zeros(6, 65, dtype=torch.bfloat16)[:, :64], weight)
