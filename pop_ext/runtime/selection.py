"""Which truncated tokens of a prompt go on through all layers (`deep_tokens`): those that its end attends to most.

A turn's last tokens show, in the layers that all tokens run through, what the answer will look for. Their attention in
the last of those layers ranks the truncated tokens (after FastKV, arXiv 2502.01068, and LazyLLM, arXiv 2407.14057),
and the first share of them become deep: their keys and values above are the full model's own. The queries are always
those of the end of the turn, so that forward passes of any size choose the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .kv_cache import Sequence

QUERIES = 16  # last tokens of a turn that choose
LAYERS = 8  # last layers below P whose attention counts
# What of its score a token lends to those before and after it, itself in the middle: what stands beside a token that is
# looked at is looked at next. The nearer the more, which leaves no ties.
NEIGHBOURS = (1, 2, 3, 4, 3, 2, 1)

pop = torch.ops.pop


def scoring_layers(depth: int) -> range:
    """The layers whose attention counts, at a prefill depth."""
    return range(max(0, depth - LAYERS), depth)


@dataclass(eq=False)
class Selection:
    """What a turn of one conversation keeps until its end: h[P] of the tokens [start, end), of which `count` before
    `boundary` go on, and of the prompt's last ones, [first_query, end), the hidden state before each layer that counts.
    """

    sequence: Sequence
    start: int
    boundary: int
    end: int
    first_query: int
    count: int
    hidden: list[Tensor] = field(default_factory=list)  # [rows, D] of each forward pass
    queries: dict[int, list[Tensor]] = field(default_factory=dict)  # layer -> the same, of the last tokens

    def keep_queries(self, layer: int, hidden: Tensor, start: int) -> None:
        """hidden [T, D]: before `layer`, of the tokens from `start` on."""
        if (rows := hidden[max(0, self.first_query - start) :]).numel():
            self.queries.setdefault(layer, []).append(rows)

    def keep_hidden(self, hidden: Tensor, start: int) -> None:
        """hidden [T, D]: h[P] of the tokens from `start` on."""
        if (rows := hidden[max(0, self.start - start) :]).numel():
            self.hidden.append(rows)

    def choose(self, model) -> tuple[Tensor, Tensor]:
        """The positions [count + boundary tokens] int64, in order, that go on, and their h[P]."""
        size = self.boundary - self.start
        if self.count < size:
            best = self.scores(model).argsort(descending=True, stable=True)[: self.count].sort().values
        else:
            best = torch.arange(size)
        rows = torch.cat([best, torch.arange(size, self.end - self.start)])
        return rows + self.start, torch.cat(self.hidden)[rows]

    def scores(self, model) -> Tensor:
        """Of each token in [start, boundary), float32: the attention that the queries pay it on average, of the head
        that pays most, as a mean over layers, then over its neighbours.
        """
        positions = torch.arange(self.first_query, self.end)
        angles = model.rope(positions)
        total = torch.zeros(self.boundary - self.start)
        for layer, rows in self.queries.items():
            paid = self._attention(model, layer, torch.cat(rows), positions, angles)
            total += paid[..., self.start : self.boundary].mean(1).amax(0)
        shares = torch.tensor(NEIGHBOURS, dtype=torch.float32)[None, None] / sum(NEIGHBOURS)
        return F.conv1d(total[None, None], shares, padding=len(NEIGHBOURS) // 2)[0, 0] / len(self.queries)

    def _attention(self, model, layer: int, hidden: Tensor, positions: Tensor, angles) -> Tensor:
        """The attention weights [Hq, Q, end] float32 of the queries of `hidden` [Q, D] at `layer`."""
        spec, w = model.spec, model.weights.layers[layer]
        cos, sin = (table[spec.rope_index[layer]] for table in angles)
        keys, values = model.cache.layers[layer]
        x = pop.rms_norm(hidden, w.input_norm, spec.rms_norm_eps)
        unwritten = torch.full_like(positions, -1)  # their keys and values are in the cache
        query = pop.qkv_project(
            x, w.qkv, w.qkv_bias, w.q_norm, w.k_norm, spec.rms_norm_eps, cos, sin, unwritten, keys, values
        )
        key = keys[self.sequence.blocks].flatten(0, 1)[: self.end].float()  # [end, Hkv, E]
        query = query.float().unflatten(1, (spec.num_kv_heads, -1))  # [Q, Hkv, Hq / Hkv, E]
        logits = torch.einsum("qhge,khe->hgqk", query, key).flatten(0, 1) * spec.attention_scale
        distance = positions[:, None] - torch.arange(self.end)
        unseen = distance < 0
        if spec.windows[layer]:
            unseen |= distance >= spec.windows[layer]
        return logits.masked_fill(unseen, float("-inf")).softmax(-1)
