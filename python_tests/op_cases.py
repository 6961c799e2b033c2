"""Random inputs of the operations, and the checks that tests of the CPU's and of CUDA's kernels share.

Errors are `norm(a - b) / norm(b)` over whole outputs, against float64. What an operation must not touch (cache slots it
was not given, padding between rows) holds NaN or a pattern that is compared bit for bit. Tests of another device
replace `ops` and `BOUND`.
"""

from __future__ import annotations

import itertools

import pytest
import reference_ops
import torch
from helpers import normwise
from hypothesis import HealthCheck, settings

import pop_ext.ops

BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # unit roundoff
EPS = 1e-6
properties = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ops = torch.ops.pop
BATCH = [(1, 1), (1, 50), (7, 7), (5, 33), (0, 20), (33, 90), (64, 64), (1, 129)]


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


def check_rms_norm(tokens, hidden, dtype, *, residual=True, strided=False, seed=0, scale=1.0, eps=EPS):
    draw = Draw(seed, dtype, strided)
    x, weight = draw(tokens, hidden, scale=scale), draw.gain(hidden)
    added = draw(tokens, hidden) if residual else None
    y = ops.rms_norm(x, weight, eps, added)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, reference_ops.rms_norm(x, weight, eps, added), dtype)


def check_linear(tokens, width, depth, dtype, *, bias=False, residual=False, out_dtype=None, strided=False, seed=0):
    draw = Draw(seed, dtype, strided, positive=tokens * width < 64)
    x, weight = draw(tokens, depth), draw.lay(draw.weight(width, depth))
    b, r = draw(width) if bias else None, draw(tokens, width) if residual else None
    y = ops.linear(x, weight, b, r, out_dtype=out_dtype)
    assert y.dtype == (out_dtype or dtype) and y.is_contiguous()
    assert_close(y, reference_ops.linear(x, weight, b, r), out_dtype or dtype, f"{tokens}x{width}x{depth}")


def check_gated_linear(tokens, width, depth, dtype, activation, *, strided=False, seed=0, scale=2.0):
    draw = Draw(seed, dtype, strided, positive=tokens * width < 64)
    x, weight = draw(tokens, depth, scale=scale), draw.lay(draw.weight(2 * width, depth))
    y = ops.gated_linear(x, weight, activation)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, reference_ops.gated_linear(x, weight, activation), dtype, f"{tokens}x{width}x{depth}")


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


# Bodies of tests that both devices run.


def attention_spans(dtype, window_size):
    for lengths in [[(40, 40)], [(60, 90), (17, 17), (90, 90)]]:
        for strided in (False, True):
            check_attention(lengths, 6, 2, 64, dtype, window_size=window_size, images=True, strided=strided)


def attention_few_queries(dtype, query):
    """Decode and the boundary: few queries on contexts around the block edges."""
    for context in (query, 63, 64, 65, 127, 128, 200):
        check_attention([(query, context)], 9, 3, 64, dtype, block_size=64, seed=context)


def attention_empty(dtype):
    check_attention([], 4, 2, 32, dtype)
    check_attention([(0, 5), (0, 0)], 4, 2, 32, dtype)


def attention_padding(dtype, window_size):
    """A sequence of no keys is padding: zeros, beside others, alone, and where the keys of others are split."""
    for lengths in [[(1, 0), (1, 50)], [(1, 0)], [(3, 0), (40, 70), (70, 0), (5, 5)], [(1, 0), (1, 4000), (1, 0)]]:
        for images in (False, True):
            check_attention(lengths, 4, 2, 32, dtype, window_size=window_size, images=images)


def attention_sharpness(dtype, sharpness):
    """From a plain mean of the values to one key taking nearly all."""
    check_attention([(9, 70), (1, 300)], 4, 2, 64, dtype, sharpness=sharpness)


def attention_extreme_scores(dtype, sharpness):
    """Scores whose exponentials leave float32: no NaN, and still a weighted mean of the values."""
    inputs = attention_inputs(Draw(5, dtype), [(9, 70), (1, 300)], 4, 2, 64, sharpness=sharpness)
    y = ops.attention(*inputs.values())
    assert y.abs().max() <= inputs["value_cache"].nan_to_num(0).abs().max() * 1.01


def attention_generous_bounds(dtype):
    """max_seqlen_q and max_seqlen_k are upper bounds, and a window may be wider than any context."""
    for window_size, unbounded in [(0, False), (2**31, True), (2**62, True), (2**63 - 1, True)]:
        inputs = attention_inputs(Draw(6, dtype), [(3, 40), (9, 9)], 4, 2, 32, window_size=window_size)
        capacity = inputs["block_tables"].shape[1] * 16
        y = ops.attention(*{**inputs, "max_seqlen_q": 2**40, "max_seqlen_k": capacity}.values())
        expected = reference_ops.attention(**{**inputs, "window_size": 0 if unbounded else window_size})
        assert_close(y, expected, dtype)


def attention_keeps_sequences_apart(dtype):
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


def repeats_exactly(name, dtype):
    """The same call gives the same bits, whatever ran before it."""
    results = []
    for _ in range(3):
        args, kwargs = calls(dtype, tokens=33)[name]
        output = getattr(ops, name)(*args, **kwargs)
        caches = args[-2:] if output is None or name == "qkv_project" else ()
        results.append([t.clone() for t in (output, *caches) if t is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def public_function(name, dtype):
    """The function of pop_ext.ops gives what the operation gives, caches included."""
    results = []
    for operation in (getattr(pop_ext.ops, name), getattr(ops, name)):
        args, kwargs = calls(dtype)[name]
        output = operation(*args, **kwargs)
        results.append([t for t in (output, *args[-2:]) if isinstance(t, torch.Tensor)])
    assert results[0] and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def int32_slots(dtype):
    """slot_mapping is int64 or int32, with the same result."""
    for name in ("qkv_project", "project_kv"):
        results = []
        for kind in (torch.int64, torch.int32):
            args, kwargs = calls(dtype)[name]
            args = [a.to(kind) if isinstance(a, torch.Tensor) and a.dtype == torch.int64 else a for a in args]
            assert sum(isinstance(a, torch.Tensor) and a.dtype == kind and a.shape == (6,) for a in args) == 1
            output = getattr(ops, name)(*args, **kwargs)
            results.append([t for t in (output, *args[-2:]) if t is not None])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
