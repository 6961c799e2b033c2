"""Every operation of `torch.ops.pop` in plain PyTorch, computed in `dtype` (float64 unless asked): what the kernels are
measured against.

Written for the reader: no blocking, no fusion, one loop per sequence. Caches passed in are written in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float64


def _norm(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, rotate-half convention: x [T, H, E]; cos, sin [T, E/2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _write(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """cache [blocks, block_size, H, E]; rows [T, H, E]; slots [T], -1 skips."""
    block_size = cache.shape[1]
    for slot, row in zip(slots.tolist(), rows, strict=True):
        if slot >= 0:
            cache[slot // block_size, slot % block_size] = row.to(cache.dtype)


def rms_norm(x, weight, eps, residual=None, *, dtype=DTYPE):
    y = _norm(x.to(dtype), eps) * weight.to(dtype)
    return y if residual is None else y + residual.to(dtype)


def linear(x, weight, bias=None, residual=None, *, out_dtype=None, dtype=DTYPE):
    y = x.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return y if residual is None else y + residual.to(dtype)


def gated_linear(x, gate_up_weight, activation, *, dtype=DTYPE):
    gate, up = (x.to(dtype) @ gate_up_weight.to(dtype).T).chunk(2, dim=-1)
    act = {"silu": torch.nn.functional.silu, "gelu_tanh": lambda t: torch.nn.functional.gelu(t, approximate="tanh")}
    return act[activation](gate) * up


def qkv_project(x, weight, bias, q_norm, k_norm, eps, cos, sin, slot_mapping, key_cache, value_cache, *, dtype=DTYPE):
    kv_heads, head_dim = key_cache.shape[2:]
    y = linear(x, weight, bias, dtype=dtype).unflatten(-1, (-1, head_dim))
    query, key, value = y.split([y.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        query = _norm(query, eps) * q_norm.to(dtype)
    if k_norm is not None:
        key = _norm(key, eps) * k_norm.to(dtype)
    _write(key_cache, slot_mapping, _rotate(key, cos, sin))
    _write(value_cache, slot_mapping, value)
    return _rotate(query, cos, sin)


def attention(
    query,
    key_cache,
    value_cache,
    block_tables,
    cu_seqlens_q,
    seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    window_size=0,
    spans=None,
    *,
    dtype=DTYPE,
):
    block_size = key_cache.shape[1]
    group = query.shape[1] // key_cache.shape[2]
    out = torch.zeros(query.shape, dtype=dtype)
    starts = cu_seqlens_q.tolist()
    for s, context in enumerate(seqlens_k.tolist()):
        rows = slice(starts[s], starts[s + 1])
        n = starts[s + 1] - starts[s]
        if n == 0 or context == 0:  # no queries, or padding
            continue
        positions = torch.arange(context)
        blocks = block_tables[s].long()[positions // block_size]
        key, value = (c[blocks, positions % block_size].to(dtype) for c in (key_cache, value_cache))
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        i, j = torch.arange(context - n, context)[:, None], positions[None, :]
        visible = j <= i
        if spans is not None:
            ids = spans[s, :context]
            visible |= (ids[i] == ids[j]) & (ids[i] >= 0)
        if window_size > 0:
            visible &= j > i - window_size
        scores = torch.einsum("qhe,khe->hqk", query[rows].to(dtype), key) * softmax_scale
        probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khe->qhe", probs, value)
    return out


def project_kv(
    hidden, weight, bias, k_norm, eps, cos, sin, rope_index, slot_mapping, key_caches, value_caches, *, dtype=DTYPE
):
    kv_heads, head_dim = key_caches.shape[3:]
    x = _norm(hidden.to(dtype), eps)
    for r in range(weight.shape[0]):
        y = linear(x, weight[r], None if bias is None else bias[r], dtype=dtype).unflatten(-1, (-1, head_dim))
        key, value = y.split(kv_heads, dim=1)
        if k_norm is not None:
            key = _norm(key, eps) * k_norm[r].to(dtype)
        rope = int(rope_index[r])
        _write(key_caches[r], slot_mapping, _rotate(key, cos[rope], sin[rope]))
        _write(value_caches[r], slot_mapping, value)


def distribution(logits, ids, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """What `sample` draws from: the probabilities [V] float64 of one row by transformers' processors."""
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = logits[None].double()
    for wanted, processor in (
        (repetition_penalty != 1, lambda: RepetitionPenaltyLogitsProcessor(repetition_penalty)),
        (temperature != 1, lambda: TemperatureLogitsWarper(temperature)),
        (top_k > 0, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1, lambda: TopPLogitsWarper(top_p)),
        (min_p > 0, lambda: MinPLogitsWarper(min_p)),
    ):
        if wanted:
            scores = processor()(ids[None], scores)
    return scores[0].softmax(-1)
