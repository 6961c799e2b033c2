"""The six operations of a decoder layer; `pop_ext.ops` says what they take."""

from __future__ import annotations

import torch
from torch import Tensor

_pop = torch.ops.pop


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Root-mean-square norm of each row: `x * rsqrt(mean(x^2) + eps) * weight (+ residual)`.

    Zhang and Sennrich, arXiv 1910.07467. The residual is added after the norm, as models with sandwich norms need it;
    `linear` adds one before it.

    Args:
        x: [T, D].
        weight: [D] float32, the gain (for Gemma 1 + w, where checkpoints store w).
        eps: 0 or more.
        residual: [T, D] or None.

    Returns:
        [T, D], x's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout.
    """
    return _pop.rms_norm(x, weight, eps, residual)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrix product `x @ weight.T (+ bias) (+ residual)`, summed in float32 and rounded once.

    Args:
        x: [T, K].
        weight: [N, K].
        bias: [N] or None.
        residual: [T, N] or None.
        out_dtype: torch.float32 keeps the sums as they are, for logits; None is x's dtype.

    Returns:
        [T, N], out_dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout.
    """
    return _pop.linear(x, weight, bias, residual, out_dtype=out_dtype)


def gated_linear(x: Tensor, gate_up_weight: Tensor, activation: str) -> Tensor:
    """Gated feed-forward projection `act(x @ gate.T) * (x @ up.T)` (Shazeer, arXiv 2002.05202).

    Args:
        x: [T, D].
        gate_up_weight: [2 F, D], the gate's F rows first.
        activation: "silu", or "gelu_tanh" (Hendrycks and Gimpel, arXiv 1606.08415, the tanh form).

    Returns:
        [T, F], x's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or the activation is another.
    """
    return _pop.gated_linear(x, gate_up_weight, activation)


def qkv_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Projects queries, keys and values, norms queries and keys per head, applies RoPE, writes keys and values.

    RoPE is the rotate-half form (Su et al., arXiv 2104.09864). Keys and values go to the paged cache in place: token t
    to offset slot_mapping[t] % block_size of block slot_mapping[t] // block_size.

    Args:
        x: [T, D], already normed.
        weight: [(Hq + 2 Hkv) E, D], contiguous: rows of all query, then key, then value heads.
        bias: [(Hq + 2 Hkv) E] or None.
        q_norm: [E] float32, gain of the queries' RMS norm, or None for no norm.
        k_norm: [E] float32, the same for keys.
        eps: of those norms, 0 or more.
        cos: [T, E / 2] float32, contiguous.
        sin: [T, E / 2] float32, contiguous.
        slot_mapping: [T] int64 or int32; -1 is not written.
        key_cache: [blocks, block_size, Hkv, E], written.
        value_cache: [blocks, block_size, Hkv, E], written.

    Returns:
        The queries, [T, Hq, E], x's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or (see the module) a wrong index.
    """
    return _pop.qkv_project(x, weight, bias, q_norm, k_norm, eps, cos, sin, slot_mapping, key_cache, value_cache)


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    window_size: int = 0,
    spans: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention over the paged cache, for prefill, a chunk of it, boundary tokens and decode.

    The queries of sequence s are rows cu_seqlens_q[s] to cu_seqlens_q[s + 1] and are the last of its seqlens_k[s]
    tokens. Query i of a sequence sees key j iff (j <= i or spans[s, i] == spans[s, j] >= 0) and (window_size == 0 or
    j > i - window_size). A sequence with seqlens_k[s] == 0 is padding: its rows of the output are zeros.

    Args:
        query: [T, Hq, E].
        key_cache: [blocks, block_size, Hkv, E].
        value_cache: [blocks, block_size, Hkv, E].
        block_tables: [S, blocks of a sequence] int32.
        cu_seqlens_q: [S + 1] int32, from 0 to T, not decreasing.
        seqlens_k: [S] int32, tokens of each sequence in the cache, its queries included; 0 is padding.
        max_seqlen_q: an upper bound of the queries of a sequence.
        max_seqlen_k: an upper bound of seqlens_k, at most block_tables' columns times block_size.
        softmax_scale: factor of the scores, above 0.
        window_size: keys that a query sees, itself included; 0 is all.
        spans: [S, >= max_seqlen_k] int32, a group id per token, below 0 for none, or None.

    Returns:
        [T, Hq, E], query's dtype.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or (see the module) a wrong index.
    """
    return _pop.attention(
        query, key_cache, value_cache, block_tables, cu_seqlens_q, seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, window_size, spans,
    )  # fmt: skip


def project_kv(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    rope_index: Tensor,
    slot_mapping: Tensor,
    key_caches: Tensor,
    value_caches: Tensor,
) -> None:
    """Keys and values of R skipped layers from one hidden state, in one multiplication, straight into their caches.

    Args:
        hidden: [T, D], not normed.
        weight: [R, 2 Hkv E, D], contiguous: each layer's key rows, then value rows, with the gain of the layer's input
            norm multiplied in.
        bias: [R, 2 Hkv E] or None.
        k_norm: [R, E] float32, gain of the keys' RMS norm, or None for no norm.
        eps: of both norms, 0 or more.
        cos: [ropes, T, E / 2] float32, contiguous.
        sin: [ropes, T, E / 2] float32, contiguous.
        rope_index: [R] int32, which of the ropes each layer uses.
        slot_mapping: [T] int64 or int32; -1 is not written.
        key_caches: [R, blocks, block_size, Hkv, E], written.
        value_caches: [R, blocks, block_size, Hkv, E], written.

    Raises:
        RuntimeError: an argument has the wrong shape, dtype, device or layout, or (see the module) a wrong index.
    """
    _pop.project_kv(hidden, weight, bias, k_norm, eps, cos, sin, rope_index, slot_mapping, key_caches, value_caches)
