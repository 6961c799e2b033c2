"""What a decode step needs beside the layers, so that it is one graph. Arguments marked "in place" are written."""

from __future__ import annotations

import torch
from torch import Tensor

_pop = torch.ops.pop


def embedding(token_ids: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * weight[token_ids]`, rounded once. token_ids [T] int64; weight [V, D]; returns [T, D].

    Rows of ids outside of the vocabulary are zeros.
    """
    return _pop.embedding(token_ids, weight, scale)


def rope_gather(cos_table: Tensor, sin_table: Tensor, positions: Tensor, axes: Tensor | None = None) -> Tensor:
    """The cos and sin of each token from tables, [2, ropes, T, E / 2] float32.

    cos_table, sin_table [ropes, positions, E / 2] float32; positions [T] int64, or [A, T] with axes [E / 2] int64, the
    one that each frequency turns with (multimodal RoPE). A position outside of the tables gives zeros.
    """
    return _pop.rope_gather(cos_table, sin_table, positions, axes)


def decode_advance(
    block_tables: Tensor,
    block_size: int,
    shifts: Tensor,
    seqlens_k: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    step: Tensor | None = None,
) -> None:
    """Room for one more token of every sequence: what `qkv_project` and `attention` of a decode step take.

    block_tables [S, blocks of a sequence] int32; seqlens_k [S] int32, in place: the number of tokens, which grows by
    one; 0 marks a padded row and stays. The new token, number n of its sequence from 0, gives positions[s] = n +
    shifts[s] and its slot by the block table, -1 for a padded row or where the table ends; shifts, positions and
    slot_mapping [S] int64, the last two in place. step [1] int32, in place, grows by one.
    """
    _pop.decode_advance(block_tables, block_size, shifts, seqlens_k, positions, slot_mapping, step)


def sample(
    logits: Tensor,
    settings: Tensor | None,
    seen: Tensor | None,
    uniforms: Tensor | None,
    step: Tensor | None,
    tokens: Tensor,
) -> None:
    """The next token of every row, in place in tokens [B] int64, the same on every device; -1 where none can be chosen.

    logits [B, V] float32, V at most 2^23. settings [B, 5] float32: temperature (0: greedy, the first of the largest),
    top_k (0: all), top_p (1: all), min_p (0: all), repetition penalty (1: none), applied as transformers' processors
    do: penalty, temperature, top-k, top-p, min-p; None is greedy for all. seen [B, V] uint8, in place: the tokens that
    the penalty is for; the chosen one is added. uniforms [N, B] float64 in [0, 1): the token is where the running sum
    of probabilities over the vocabulary exceeds uniforms[step, b] of their total; step [1] int32, None is 0.
    """
    _pop.sample(logits, settings, seen, uniforms, step, tokens)
