"""CUDA operations in graphs, on other devices, with large caches, and what they refuse."""

from __future__ import annotations

import ctypes
import inspect
import os
import subprocess
import sys
from pathlib import Path

import op_cases
import ptx_emulator
import pytest
import reference_ops
import torch
from cuda_cases import DTYPES, check_launches, cuda  # noqa: F401  fixtures
from op_cases import EPS, NAMES, Draw, assert_close, calls

import pop_ext.ops


def captured(operation, args, kwargs):
    """The output, and a function that runs the captured operation again, which is all that ever runs it."""
    library, kernels = ptx_emulator.runtime(), ctypes.CDLL(str(pop_ext.ops.CUDA_LIBRARY))
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
@NAMES
@pytest.mark.parametrize("tokens", [6, 70])
def test_capture(name, dtype, tokens):
    """In a graph: nothing runs at capture, and each launch computes from what the tensors hold then."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU, torch.cuda.graph captures: test_capture_on_a_gpu")
    args, kwargs = calls(dtype, tokens)[name]
    if name == "linear":  # with its depth split, which takes a workspace
        args = [Draw(0, dtype).packed(tokens, 2048), Draw(1, dtype).weight(24, 2048), None, None]
    written = args[-2:] if name in ("qkv_project", "project_kv") else ()
    operation, start = getattr(op_cases.ops, name), [t.clone() for t in written]

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
            with ptx_emulator.registered(*known):
                replays.append(run(lambda: (replay(), output)[1]))
    finally:
        ctypes.CDLL(str(pop_ext.ops.CUDA_LIBRARY)).pop_cuda_set_emulated_stream(None)
    for x, results in zip(inputs, replays, strict=True):
        args[0].copy_(x)
        expected = run(lambda: operation(*args, **kwargs))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@NAMES
def test_capture_on_a_gpu(name):
    if not torch.cuda.is_available():
        pytest.skip("no GPU; test_capture captures on the PTX emulator")
    args, kwargs = calls(torch.bfloat16, tokens=70)[name]
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
    query = op_cases.ops.qkv_project(x, weight, None, None, None, EPS, cos, sin, slots, keys, values)
    small = [torch.zeros(4, block_size, heads, head_size, dtype=torch.float64) for _ in range(2)]
    expected = reference_ops.qkv_project(x, weight, None, None, None, EPS, cos, sin, positions, *small)
    assert_close(query, expected, dtype)
    for cache, reference in zip((keys, values), small, strict=True):
        assert_close(cache[used[0].long()], reference, dtype)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    for first in (0, tokens - 3):  # prefill and few queries
        index = starts.clone()
        index[1] -= first
        args = query[first:], index, lengths, tokens - first, tokens, head_size**-0.5
        y = op_cases.ops.attention(args[0], keys, values, used, *args[1:])
        near = torch.arange(4, dtype=torch.int32)[None]
        kept = [cache[used[0].long()] for cache in (keys, values)]
        assert_close(y, reference_ops.attention(args[0], *kept, near, *args[1:]), dtype)


@DTYPES
@NAMES
def test_repeats_exactly(name, dtype):
    op_cases.repeats_exactly(name, dtype)


def test_on_sm_86():
    """With the 99 KiB of shared memory that a block has there: other tiles and stages. In the adversarial order
    only: how blocks synchronise does not differ.
    """
    if torch.cuda.is_available() or os.environ.get("PTX_EMULATOR_SM"):
        pytest.skip("the device is another one already")
    environment = {**os.environ, "PTX_EMULATOR_SM": "86"}
    code = (  # cudaDevAttrComputeCapabilityMajor and Minor
        "import ctypes, ptx_emulator; runtime, value = ptx_emulator.runtime(), ctypes.c_int();"
        "print(*(runtime.cudaDeviceGetAttribute(ctypes.byref(value), a, 0) or value.value for a in (75, 76)))"
    )
    device = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert device.stdout.split() == ["8", "6"], device.stdout + device.stderr
    files = [str(Path(__file__).with_name(f"test_cuda_{name}.py")) for name in ("ops", "attention")]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", "(elements or large) and not (roundrobin or random)"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-3000:]


@NAMES
def test_public_functions(monkeypatch, name):
    monkeypatch.setattr("pop_ext.ops.layers._pop", op_cases.ops)
    op_cases.public_function(name, torch.bfloat16)


@DTYPES
def test_int32_slots(dtype):
    op_cases.int32_slots(dtype)


# Index tensors that POP_CHECK_INDICES=1 checks: what is wrong, and what is said of it.
WRONG_INDICES = [
    (
        "qkv_project",
        "slot_mapping",
        4,
        10**6,
        r"slot_mapping\[4\] is 1000000, expected -1 \(no write\) or a slot",
    ),
    ("project_kv", "slot_mapping", 5, -2, r"slot_mapping\[5\] is -2, expected -1 \(no write\) or a slot below"),
    ("project_kv", "rope_index", 1, 2, r"rope_index\[1\] is 2, expected 0 to cos' number of ropes less one, 1"),
    ("attention", "cu_seqlens_q", 1, 7, r"cu_seqlens_q give sequence 0 7 queries, expected 0 to max_seqlen_q = 3"),
    ("attention", "cu_seqlens_q", 2, 5, r"cu_seqlens_q\[2\] is 5, expected query's number of tokens 6"),
    ("attention", "seqlens_k", 1, 2, r"seqlens_k\[1\] is 2, expected 0 \(padding\), or at least its 3 queries"),
    ("attention", "seqlens_k", 0, 21, r"seqlens_k\[0\] is 21, expected .* at most max_seqlen_k = 20"),
    ("attention", "block_tables", (0, 1), -1, r"block_tables\[0, 1\] is -1, expected a block of key_cache, 0 to"),
]


@pytest.mark.parametrize("name, argument, index, value, message", WRONG_INDICES)
def test_wrong_indices(monkeypatch, name, argument, index, value, message):
    monkeypatch.setenv("POP_CHECK_INDICES", "1")
    args, kwargs = calls(torch.bfloat16)[name]
    named = dict(zip(inspect.signature(getattr(pop_ext.ops, name)).parameters, args, strict=False)) | kwargs
    getattr(op_cases.ops, name)(**named)
    named[argument][index] = value
    with pytest.raises(RuntimeError, match=f"pop::{name}: {message}"):
        getattr(op_cases.ops, name)(**named)
    if argument == "slot_mapping":
        with pytest.raises(RuntimeError, match=f"pop::{name}: {message}"):
            getattr(op_cases.ops, name)(**named | {argument: named[argument].int()})


def test_indices_are_not_checked_during_capture(monkeypatch):
    """The stream must not be waited for."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU, torch.cuda.graph captures: test_capture_on_a_gpu")
    monkeypatch.setenv("POP_CHECK_INDICES", "1")
    test_capture("attention", torch.bfloat16, 6)


def test_errors_of_others():
    """An error that another library left behind is not an operation's, and stays for whoever caused it."""
    if torch.cuda.is_available():
        pytest.skip("torch reports errors of its own on a GPU")
    library, invalid_device = ptx_emulator.runtime(), 101
    assert library.cudaSetDevice(99) == invalid_device
    try:
        for name, (args, kwargs) in calls(torch.bfloat16).items():
            getattr(op_cases.ops, name)(*args, **kwargs)
        assert library.cudaPeekAtLastError() == invalid_device
    finally:
        library.cudaGetLastError()


def test_every_kernel_is_loaded():
    """Loading touches the 64 kernels of the multiplications and attention, and the small ones."""
    if torch.cuda.is_available():
        assert pop_ext.ops.load_cuda_kernels() > 64
        image = pop_ext.ops.cuda_image()
        assert image["sm"] >= image["ptx"] >= 80
        return
    kernels, message = ctypes.CDLL(str(pop_ext.ops.CUDA_LIBRARY)), ctypes.create_string_buffer(1024)
    assert kernels.pop_cuda_load_kernels(message, len(message)) > 64, message.value
    sm, ptx = ctypes.c_int(), ctypes.c_int()
    assert kernels.pop_cuda_image(ctypes.byref(sm), ctypes.byref(ptx), message, len(message)) == 0, message.value
    assert sm.value >= ptx.value >= 80


def test_float32_is_refused():
    for name, (args, kwargs) in calls(torch.float32).items():
        with pytest.raises(RuntimeError, match=rf"pop::{name}: \w+ is float32, expected bfloat16 or float16"):
            getattr(op_cases.ops, name)(*args, **kwargs)


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
    args, kwargs = calls(torch.bfloat16)[name]
    names = list(inspect.signature(getattr(pop_ext.ops, name)).parameters)
    named = dict(zip(names, args, strict=False)) | kwargs
    for argument, shape in change.items():
        named[argument] = torch.zeros(shape, dtype=named[argument].dtype)
    with pytest.raises(RuntimeError, match=f"pop::{name}: {message}"):
        getattr(op_cases.ops, name)(**named)


def test_alignment_that_is_refused():
    x, weight = torch.zeros(6 * 64 + 8, dtype=torch.bfloat16), torch.zeros(16, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"pop::linear: x is at an address of 16 n \+ 2, expected 16 n on CUDA"):
        op_cases.ops.linear(x[1:385].view(6, 64), weight)
    with pytest.raises(RuntimeError, match=r"pop::linear: x is laid out with strides \[65, 1\], expected rows that"):
        op_cases.ops.linear(torch.zeros(6, 65, dtype=torch.bfloat16)[:, :64], weight)
