"""Every operation of `torch.ops.pop` against float64, with each instruction set that the machine has.

Errors are `norm(a - b) / norm(b)` over whole outputs: at most 1e-5 in float32 and 4e-3 in bfloat16. What an operation
must not touch (cache slots it was not given, padding between rows) holds NaN or a pattern that is compared bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
import reference_ops
import torch
from helpers import normwise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pop_ext  # noqa: F401  registers torch.ops.pop

BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # unit roundoff
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=["fp32", "bf16"])
HEAD_SIZES = [2, 6, 32, 40, 64, 80, 96, 128, 256]
EPS = 1e-6
properties = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ops = torch.ops.pop


# Inputs


class Draw:
    """Random tensors from one seed. `strided`: rows lie in a wider buffer whose rest is NaN (only the last dimension is
    contiguous), except for what the operations want contiguous: gains, rotations, indices and the weights of
    projections into heads. `positive`: no cancellation, for outputs so few that one near zero would decide."""

    offset, padding = 3, 5  # of a strided row in its buffer, in elements

    def __init__(self, seed: int, dtype: torch.dtype, strided: bool = False, positive: bool = False):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.strided, self.positive = dtype, strided, positive

    def __call__(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return self.lay(self.packed(*shape, scale=scale))

    def packed(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator)
        return ((values.abs() + 0.1 if self.positive else values) * scale).to(self.dtype)

    def lay(self, values: torch.Tensor) -> torch.Tensor:
        if not self.strided or values.dim() < 2:
            return values
        wide = torch.full((*values.shape[:-1], values.shape[-1] + self.padding), float("nan"), dtype=values.dtype)
        view = wide[..., self.offset : self.offset + values.shape[-1]]
        return view.copy_(values)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator)

    def weight(self, *shape: int) -> torch.Tensor:
        return self.packed(*shape, scale=shape[-1] ** -0.5)

    def gain(self, *shape: int) -> torch.Tensor:
        return 1 + 0.3 * torch.randn(shape, generator=self.generator)

    def rope(self, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        angle = torch.rand(shape, generator=self.generator) * 6.3
        return angle.cos(), angle.sin()

    def cache(self, *shape: int, layers: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value cache [blocks, block_size, heads, head_size], or [layers, ...] of them: views of one buffer."""
        if layers is None:
            both = self(shape[0], 2, *shape[1:])
            return both[:, 0], both[:, 1]
        both = self(layers, 2, *shape)
        return both[:, 0], both[:, 1]

    def slots(self, tokens: int, capacity: int, skip: float = 0.25) -> torch.Tensor:
        """Distinct slots in any order, a share of them -1."""
        slots = self.permutation(capacity)[:tokens]
        return torch.where(torch.rand(tokens, generator=self.generator) < skip, -1, slots)


def assert_close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, what: str = "output") -> None:
    # The error of n values is uncertain by 1 / sqrt(2 n) of itself: a bound below the unit roundoff, by which one may
    # be off, leaves room for three times that.
    error, bound = normwise(a, b), BOUND[dtype]
    if bound < UNIT[dtype]:
        bound = min(bound * (1 + 3 / max(1, 2 * a.numel()) ** 0.5), UNIT[dtype])
    assert error <= bound, f"{what}: {error:.2e} > {bound:.1e}"


def assert_cache(
    cache: torch.Tensor, before: torch.Tensor, expected: torch.Tensor, slots: torch.Tensor, what: str
) -> None:
    """Slots written hold `expected` within the bound, the others the bits of `before`; all [blocks, size, ...]."""
    written = torch.zeros(cache.shape[:2], dtype=torch.bool).flatten()
    written[slots[slots >= 0]] = True
    written = written.view(cache.shape[:2])
    assert torch.equal(cache[~written], before[~written]), f"{what}: wrote outside its slots"
    assert_close(cache[written], expected[written], cache.dtype, what)


# rms_norm


def check_rms_norm(tokens, hidden, dtype, *, residual=True, strided=False, seed=0, scale=1.0, eps=EPS):
    draw = Draw(seed, dtype, strided)
    x, weight = draw(tokens, hidden, scale=scale), draw.gain(hidden)
    added = draw(tokens, hidden) if residual else None
    y = ops.rms_norm(x, weight, eps, added)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, reference_ops.rms_norm(x, weight, eps, added), dtype)


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


# linear


def check_linear(tokens, width, depth, dtype, *, bias=False, residual=False, out_dtype=None, strided=False, seed=0):
    draw = Draw(seed, dtype, strided, positive=tokens * width < 64)
    x, weight = draw(tokens, depth), draw.lay(draw.weight(width, depth))
    b, r = draw(width) if bias else None, draw(tokens, width) if residual else None
    y = ops.linear(x, weight, b, r, out_dtype=out_dtype)
    assert y.dtype == (out_dtype or dtype) and y.is_contiguous()
    assert_close(y, reference_ops.linear(x, weight, b, r), out_dtype or dtype, f"{tokens}x{width}x{depth}")


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


# gated_linear


def check_gated_linear(tokens, width, depth, dtype, activation, *, strided=False, seed=0, scale=2.0):
    draw = Draw(seed, dtype, strided, positive=tokens * width < 64)
    x, weight = draw(tokens, depth, scale=scale), draw.lay(draw.weight(2 * width, depth))
    y = ops.gated_linear(x, weight, activation)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, reference_ops.gated_linear(x, weight, activation), dtype, f"{tokens}x{width}x{depth}")


ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])


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


# qkv_project


def qkv_inputs(draw, tokens, hidden, heads, kv_heads, head_size, block_size, *, bias, norms):
    blocks = -(-2 * tokens // block_size) + 2
    key_cache, value_cache = draw.cache(blocks, block_size, kv_heads, head_size)
    cos, sin = draw.rope(tokens, head_size // 2)
    rows = (heads + 2 * kv_heads) * head_size
    return dict(
        x=draw(tokens, hidden), weight=draw.weight(rows, hidden), bias=draw(rows) if bias else None,
        q_norm=draw.gain(head_size) if norms else None, k_norm=draw.gain(head_size) if norms else None, eps=EPS,
        cos=cos, sin=sin, slot_mapping=draw.slots(tokens, blocks * block_size), key_cache=key_cache,
        value_cache=value_cache,
    )  # fmt: skip


def check_qkv_project(
    tokens, hidden, heads, kv_heads, head_size, dtype, *, bias=False, norms=False, strided=False, block_size=16, seed=0
):
    draw = Draw(seed, dtype, strided, positive=tokens * kv_heads * head_size < 64)
    inputs = qkv_inputs(draw, tokens, hidden, heads, kv_heads, head_size, block_size, bias=bias, norms=norms)
    before = inputs["key_cache"].clone(), inputs["value_cache"].clone()
    expected = before[0].double(), before[1].double()
    query = reference_ops.qkv_project(**{**inputs, "key_cache": expected[0], "value_cache": expected[1]})
    y = ops.qkv_project(*inputs.values())
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, query, dtype, "query")
    assert_cache(inputs["key_cache"], before[0], expected[0], inputs["slot_mapping"], "key_cache")
    assert_cache(inputs["value_cache"], before[1], expected[1], inputs["slot_mapping"], "value_cache")


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


# attention


def attention_inputs(
    draw, lengths, heads, kv_heads, head_size, *, block_size=16, window_size=0, images=False, sharpness=2.0
):
    """lengths: (queries, context) of each sequence. What none may see (other blocks, the rest of the last) is NaN."""
    needed = [-(-context // block_size) for _, context in lengths]
    blocks = sum(needed) + 3
    key_cache, value_cache = draw.cache(blocks, block_size, kv_heads, head_size)
    order = draw.permutation(blocks)
    tables = torch.full((len(lengths), max(needed, default=0) + 1), -1, dtype=torch.int32)  # -1: no block, never read
    free = torch.ones(blocks, block_size, dtype=torch.bool)
    start = 0
    for s, (count, (_, context)) in enumerate(zip(needed, lengths, strict=True)):
        tables[s, :count] = order[start : start + count]
        start += count
        position = torch.arange(context)
        free[tables[s].long()[position // block_size], position % block_size] = False
    key_cache[free], value_cache[free] = float("nan"), float("nan")
    queries, contexts = [q for q, _ in lengths], [c for _, c in lengths]
    query = draw(sum(queries), heads, head_size, scale=sharpness)
    if draw.strided and sum(
        queries
    ):  # as a slice of a fused q, k, v buffer: heads that are not queries lie between tokens
        fused = torch.full((sum(queries), heads + 2 * kv_heads, head_size), float("nan"), dtype=query.dtype)
        query = fused[:, :heads].copy_(query)
    if draw.strided:
        tables = torch.cat([tables, tables], 1)[:, : tables.shape[1]]
    spans = None
    if images:  # runs of text (-1) and of images (an id each)
        runs = draw.integers(0, 2, len(lengths), max(contexts, default=0) + 2).cumsum(1) // 5
        spans = torch.where(runs % 2 == 0, -1, runs).int()
    return dict(
        query=query, key_cache=key_cache, value_cache=value_cache, block_tables=tables,
        cu_seqlens_q=torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32),
        seqlens_k=torch.tensor(contexts, dtype=torch.int32), max_seqlen_q=max(queries, default=0),
        max_seqlen_k=max(contexts, default=0), softmax_scale=head_size**-0.5, window_size=window_size, spans=spans,
    )  # fmt: skip


def check_attention(lengths, heads, kv_heads, head_size, dtype, *, strided=False, seed=0, **form):
    inputs = attention_inputs(Draw(seed, dtype, strided), lengths, heads, kv_heads, head_size, **form)
    y = ops.attention(*inputs.values())
    assert y.dtype == dtype and y.is_contiguous()
    expected = reference_ops.attention(**inputs)
    assert_close(y, expected, dtype)
    for s, (start, stop) in enumerate(itertools.pairwise(inputs["cu_seqlens_q"].tolist())):
        assert_close(y[start:stop], expected[start:stop], dtype, f"sequence {s}")  # none hides behind another


BATCH = [(1, 1), (1, 50), (7, 7), (5, 33), (0, 20), (33, 90), (64, 64), (1, 129)]


@DTYPES
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("window_size", [0, 1, 9, 40])
def test_attention(isa, dtype, head_size, window_size):
    for heads, kv_heads in [(1, 1), (9, 3), (5, 1)]:
        check_attention(BATCH, heads, kv_heads, head_size, dtype, window_size=window_size, strided=heads == 9)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 21])
def test_attention_spans(isa, dtype, window_size):
    for lengths in [[(40, 40)], [(60, 90), (17, 17), (90, 90)]]:
        for strided in (False, True):
            check_attention(lengths, 6, 2, 64, dtype, window_size=window_size, images=True, strided=strided)


@DTYPES
@pytest.mark.parametrize("query", [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33])
def test_attention_few_queries(isa, dtype, query):
    """Decode and the boundary: few queries on contexts around the block edges."""
    for context in (query, 63, 64, 65, 127, 128, 200):
        check_attention([(query, context)], 9, 3, 64, dtype, block_size=64, seed=context)


@DTYPES
@pytest.mark.parametrize("window_size", [0, 512])
def test_attention_large(isa, dtype, window_size):
    check_attention([(1000, 2000)], 3, 1, 64, dtype, window_size=window_size, block_size=64)
    check_attention([(1, 4000), (3, 2500), (300, 300)], 4, 1, 256, dtype, window_size=window_size, block_size=64)


@DTYPES
def test_attention_empty(isa, dtype):
    check_attention([], 4, 2, 32, dtype)
    check_attention([(0, 5), (0, 0)], 4, 2, 32, dtype)


@DTYPES
@pytest.mark.parametrize("sharpness", [0.0, 0.1, 30.0])
def test_attention_sharpness(isa, dtype, sharpness):
    """From a plain mean of the values to one key taking nearly all."""
    check_attention([(9, 70), (1, 300)], 4, 2, 64, dtype, sharpness=sharpness)


@DTYPES
@pytest.mark.parametrize("sharpness", [1e4, 1e30])
def test_attention_extreme_scores(isa, dtype, sharpness):
    """Scores whose exponentials leave float32: no NaN, and still a weighted mean of the values."""
    inputs = attention_inputs(Draw(5, dtype), [(9, 70), (1, 300)], 4, 2, 64, sharpness=sharpness)
    y = ops.attention(*inputs.values())
    assert y.abs().max() <= inputs["value_cache"].nan_to_num(0).abs().max() * 1.01


@DTYPES
def test_attention_generous_bounds(isa, dtype):
    """max_seqlen_q and max_seqlen_k are upper bounds, and a window may be wider than any context."""
    for window_size, unbounded in [(0, False), (2**31, True), (2**62, True), (2**63 - 1, True)]:
        inputs = attention_inputs(Draw(6, dtype), [(3, 40), (9, 9)], 4, 2, 32, window_size=window_size)
        capacity = inputs["block_tables"].shape[1] * 16
        y = ops.attention(*{**inputs, "max_seqlen_q": 2**40, "max_seqlen_k": capacity}.values())
        expected = reference_ops.attention(**{**inputs, "window_size": 0 if unbounded else window_size})
        assert_close(y, expected, dtype)


@DTYPES
def test_attention_keeps_sequences_apart(isa, dtype):
    """NaN in one sequence's queries, keys and values shows in that sequence only."""
    inputs = attention_inputs(Draw(7, dtype), BATCH, 6, 2, 64)
    spoiled = BATCH.index((33, 90))
    blocks = inputs["block_tables"][spoiled, : -(-90 // 16)].long()
    expected = reference_ops.attention(**inputs)
    starts = inputs["cu_seqlens_q"].tolist()
    for name in ("key_cache", "value_cache"):
        inputs[name][blocks] = float("nan")
    inputs["query"][starts[spoiled] : starts[spoiled + 1]] = float("nan")
    y = ops.attention(*inputs.values())
    assert y[starts[spoiled] : starts[spoiled + 1]].isnan().all()
    clean = torch.cat([torch.arange(starts[spoiled]), torch.arange(starts[spoiled + 1], starts[-1])])
    assert_close(y[clean], expected[clean], dtype)


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


# project_kv


def project_inputs(draw, tokens, hidden, layers, kv_heads, head_size, block_size, *, bias, norm, ropes):
    blocks = -(-2 * tokens // block_size) + 2
    key_caches, value_caches = draw.cache(blocks, block_size, kv_heads, head_size, layers=layers)
    cos, sin = draw.rope(ropes, tokens, head_size // 2)
    rows = 2 * kv_heads * head_size
    return dict(
        hidden=draw(tokens, hidden, scale=3.0), weight=draw.weight(layers, rows, hidden),
        bias=draw.packed(layers, rows) if bias else None, k_norm=draw.gain(layers, head_size) if norm else None,
        eps=EPS, cos=cos, sin=sin, rope_index=draw.integers(0, ropes, layers).int(),
        slot_mapping=draw.slots(tokens, blocks * block_size),
        key_caches=key_caches, value_caches=value_caches,
    )  # fmt: skip


def check_project_kv(
    tokens,
    hidden,
    layers,
    kv_heads,
    head_size,
    dtype,
    *,
    bias=False,
    norm=False,
    ropes=1,
    strided=False,
    block_size=16,
    seed=0,
):
    draw = Draw(seed, dtype, strided, positive=tokens * kv_heads * head_size < 64)
    inputs = project_inputs(
        draw, tokens, hidden, layers, kv_heads, head_size, block_size, bias=bias, norm=norm, ropes=ropes
    )
    before = inputs["key_caches"].clone(), inputs["value_caches"].clone()
    expected = before[0].double(), before[1].double()
    reference_ops.project_kv(**{**inputs, "key_caches": expected[0], "value_caches": expected[1]})
    assert ops.project_kv(*inputs.values()) is None
    for layer in range(layers):
        for i, name in enumerate(["key_caches", "value_caches"]):
            what = f"{name}[{layer}]"
            assert_cache(inputs[name][layer], before[i][layer], expected[i][layer], inputs["slot_mapping"], what)


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


# What holds for all operations


def calls(dtype: torch.dtype, tokens: int = 6) -> dict[str, tuple[tuple, dict]]:
    """One ordinary call of each operation: (args, kwargs)."""
    draw = Draw(11, dtype)
    lengths = [(tokens - tokens // 2, tokens + 14), (tokens // 2, tokens // 2)]
    return {
        "rms_norm": ((draw(tokens, 40), draw.gain(40), EPS, draw(tokens, 40)), {}),
        "linear": ((draw(tokens, 40), draw(24, 40), draw(24), draw(tokens, 24)), {"out_dtype": torch.float32}),
        "gated_linear": ((draw(tokens, 40), draw(2 * 24, 40), "silu"), {}),
        "qkv_project": (tuple(qkv_inputs(draw, tokens, 40, 4, 2, 32, 16, bias=True, norms=True).values()), {}),
        "attention": (tuple(attention_inputs(draw, lengths, 4, 2, 32, window_size=3, images=True).values()), {}),
        "project_kv": (
            tuple(project_inputs(draw, tokens, 40, 3, 2, 32, 16, bias=True, norm=True, ropes=2).values()),
            {},
        ),
    }


NAMES = pytest.mark.parametrize("name", list(calls(torch.float32)))


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
    """The same call gives the same bits, whatever ran before it."""
    results = []
    for _ in range(3):
        args, kwargs = calls(dtype, tokens=33)[name]
        output = getattr(ops, name)(*args, **kwargs)
        caches = args[-2:] if output is None or name == "qkv_project" else ()
        results.append([t.clone() for t in (output, *caches) if t is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
