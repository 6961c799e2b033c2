"""What holds for each instruction set of the CPU operations: how exact their sums are, by torch's own errors against
float64, and that ragged shapes are exact; on tiles too, real or emulated."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference_ops
import torch
import torch.nn.functional as F
from helpers import ROOT, normwise, real_model, text_ids, transformers_model
from op_cases import EPS, Draw, attention_inputs

import pop_ext

ops = torch.ops.pop
WORSE = 1.3  # how many times torch's error ours may be
DEPTHS = [576, 640, 1536, 2048, 8192]


def assert_as_exact(ours, torchs, expected, what: str) -> None:
    """torchs: what torch computes in fp32, in one way or several; the most exact counts."""
    error, bound = normwise(ours, expected), WORSE * min(normwise(t, expected) for t in torchs)
    assert error <= bound, f"{what}: {error:.2e}, torch {bound / WORSE:.2e}"


# How exact sums are


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("tokens", [1, 3, 12, 13, 200])
def test_linear_is_as_exact_as_torch(isa, depth, tokens):
    draw = Draw(depth + tokens, torch.float32)
    x, weight = draw(tokens, depth), draw.weight(600, depth)
    expected = reference_ops.linear(x, weight)
    assert_as_exact(ops.linear(x, weight), [F.linear(x, weight)], expected, "fp32")
    x, weight = x.bfloat16(), weight.bfloat16()
    expected = reference_ops.linear(x, weight)
    ours = ops.linear(x, weight, out_dtype=torch.float32)
    assert_as_exact(ours, [F.linear(x.float(), weight.float())], expected, "bf16, summed in fp32")
    assert_as_exact(ops.linear(x, weight), [F.linear(x, weight)], expected, "bf16")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_gated_linear_is_as_exact_as_torch(isa, depth, activation):
    draw = Draw(depth, torch.float32)
    x, weight = draw(100, depth), draw.weight(2 * 300, depth)
    torchs = [reference_ops.gated_linear(x, weight, activation, dtype=torch.float32)]
    expected = reference_ops.gated_linear(x, weight, activation)
    assert_as_exact(ops.gated_linear(x, weight, activation), torchs, expected, activation)


@pytest.mark.parametrize("hidden", [576, 2048, 8192])
def test_rms_norm_is_as_exact_as_torch(isa, hidden):
    draw = Draw(hidden, torch.float32)
    x, weight = draw(64, hidden), draw.gain(hidden)
    torchs = [reference_ops.rms_norm(x, weight, EPS, dtype=torch.float32), F.rms_norm(x, (hidden,), weight, EPS)]
    assert_as_exact(ops.rms_norm(x, weight, EPS), torchs, reference_ops.rms_norm(x, weight, EPS), f"{hidden}")


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("tokens", [2, 90])
def test_projections_are_as_exact_as_torch(isa, tokens, norms):
    draw = Draw(tokens, torch.float32)
    x, weight, bias = draw(tokens, 1536), draw.weight(8 * 64, 1536), draw(8 * 64)
    gains = (draw.gain(64), draw.gain(64)) if norms else (None, None)
    cos, sin = draw.rope(tokens, 32)
    made = {}
    for name, dtype in [("expected", torch.float64), ("torch", torch.float32), ("ours", None)]:
        caches = [torch.zeros(7, 16, 2, 64, dtype=dtype or torch.float32) for _ in range(2)]
        arguments = (x, weight, bias, *gains, EPS, cos, sin, torch.arange(tokens), *caches)
        query = ops.qkv_project(*arguments) if dtype is None else reference_ops.qkv_project(*arguments, dtype=dtype)
        layers = [torch.zeros(3, 7, 16, 2, 64, dtype=dtype or torch.float32) for _ in range(2)]
        projection = (weight[: 2 * 2 * 64].expand(3, -1, -1).contiguous(), None, None, EPS, cos[None], sin[None])
        arguments = (x, *projection, torch.zeros(3, dtype=torch.int32), torch.arange(tokens), *layers)
        ops.project_kv(*arguments) if dtype is None else reference_ops.project_kv(*arguments, dtype=dtype)
        made[name] = [query, *caches, *layers]
    for ours, torchs, expected, what in zip(
        made["ours"], made["torch"], made["expected"], ["query", "key", "value", "keys", "values"], strict=True
    ):
        assert_as_exact(ours, [torchs], expected, what)


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("queries, context", [(1, 300), (1, 2048), (5, 700), (600, 600)])
@pytest.mark.parametrize("sharpness", [0.3, 2.0])
def test_attention_is_as_exact_as_torch(isa, head_size, queries, context, sharpness):
    draw = Draw(context, torch.float32)
    inputs = attention_inputs(draw, [(queries, context)], 6, 2, head_size, block_size=64, sharpness=sharpness)
    blocks = inputs["block_tables"][0, : -(-context // 64)].long()
    key, value = (inputs[n][blocks].flatten(0, 1)[:context].transpose(0, 1) for n in ("key_cache", "value_cache"))
    visible = torch.arange(context) <= torch.arange(context - queries, context)[:, None]
    sdpa = F.scaled_dot_product_attention(
        inputs["query"].transpose(0, 1)[None],
        key[None],
        value[None],
        visible,
        scale=inputs["softmax_scale"],
        enable_gqa=True,
    )
    torchs = [reference_ops.attention(**inputs, dtype=torch.float32), sdpa[0].transpose(0, 1)]
    assert_as_exact(ops.attention(*inputs.values()), torchs, reference_ops.attention(**inputs), f"{head_size}")


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m"])
@torch.no_grad()
def test_model_is_as_exact_as_transformers(name):
    """Logits of 20 prompts in fp32 against float64: at most twice the error of transformers in fp32."""
    folder = real_model(name)
    ids, length, last = text_ids(folder), 16, 4
    bos = [2] if name.startswith("gemma") else []
    prompts = [(bos + ids[i * 80 : i * 80 + length])[:length] for i in range(20)]
    ours = pop_ext.load(folder, dtype=torch.float32).logits([p[:-last] for p in prompts], [p[-last:] for p in prompts])
    peer = transformers_model(folder)
    tokens = torch.tensor(prompts)[:, :-1]
    theirs = peer(tokens, logits_to_keep=last).logits
    expected = peer.double()(tokens, logits_to_keep=last).logits
    errors = [(normwise(a, e), normwise(b, e)) for a, b, e in zip(ours, theirs, expected, strict=True)]
    our_error, their_error = (max(column) for column in zip(*errors, strict=True))
    assert our_error <= 2 * their_error, f"{our_error:.2e}, transformers {their_error:.2e}"
    our_error, their_error = (normwise(torch.stack(list(t)), expected) for t in (ours, theirs))
    assert our_error <= 2 * their_error, f"all prompts: {our_error:.2e}, transformers {their_error:.2e}"


# Ragged shapes


@pytest.mark.parametrize("depth", [1, 2, 31, 32, 33, 63, 96, 101, 1023, 1025, 1088])
def test_ragged_products_are_exact(isa, depth):
    """Small integers, whose sums fp32 holds exactly: every element is right to the bit, and NaN lies all around."""
    draw = Draw(depth, torch.bfloat16, strided=True)
    for tokens in [1, 12, *range(13, 20), *range(29, 36), 47, 48, 49, 65]:
        for width in (1, 15, 16, 17, 33, 64, 65, 100):
            x, weight = (draw.lay(draw.integers(-8, 9, n, depth).bfloat16()) for n in (tokens, width))
            y = ops.linear(x, weight, out_dtype=torch.float32)
            assert torch.equal(y.double(), reference_ops.linear(x, weight)), f"{tokens} x {width}"


@pytest.mark.parametrize("depth", [33, 1088])
@pytest.mark.parametrize("tokens", [193, 207, 1038])
def test_ragged_tasks_are_exact(isa, tokens, depth):
    """Tokens that threads share out, with few left in the last part; more blocks of the weight than a task takes."""
    draw = Draw(depth, torch.bfloat16, strided=True)
    for width in (321, 577):
        x, weight = (draw.lay(draw.integers(-8, 9, n, depth).bfloat16()) for n in (tokens, width))
        y = ops.linear(x, weight, out_dtype=torch.float32)
        assert torch.equal(y.double(), reference_ops.linear(x, weight)), f"{tokens} x {width}"


@pytest.mark.parametrize("tokens", [5, 13, 20, 40, 97])
def test_a_token_of_nan_spoils_no_other(isa, tokens):
    draw = Draw(tokens, torch.bfloat16)
    x, weight = draw(tokens, 70), draw.weight(90, 70)
    expected = ops.linear(x, weight)
    for spoiled in (0, tokens // 2, tokens - 1):
        y = ops.linear(x.index_fill(0, torch.tensor([spoiled]), float("nan")), weight)
        assert y[spoiled].isnan().all()
        others = torch.arange(tokens) != spoiled
        assert torch.equal(y[others], expected[others])


# Which instruction set


def test_emulation_is_never_chosen():
    assert pop_ext.cpu_isas()[-2:] == ["portable", "amx_bf16_emulated"]
    code = "import pop_ext; print(pop_ext.cpu_isa())"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert fresh.stdout.strip() == pop_ext.cpu_isas()[0] != "amx_bf16_emulated"


def test_tiles_are_used_where_there_are_any():
    flags = Path("/proc/cpuinfo").read_text().split()
    if not {"amx_tile", "amx_bf16", "avx512_bf16"} <= set(flags):
        assert "amx_bf16" not in pop_ext.cpu_isas()
        pytest.skip("this processor has no AMX: the code for tiles ran on emulated ones")
    assert pop_ext.cpu_isas()[0] == "amx_bf16"


def test_cores_are_counted_by_topology():
    siblings = set()
    for i in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(i))
    assert pop_ext.build_info()["cpu_cores"] == len(siblings)
