"""Which truncated tokens of a prompt go on through all layers (`deep_tokens`): those that its end attends to most.

A turn's last tokens show, in the layers that all tokens run through, what the answer will look for. Their attention in
the last of those layers ranks the truncated tokens (after FastKV, arXiv 2502.01068, and CLAA, arXiv 2602.16054),
and the first share of them become deep: their keys and values above are the full model's own. The queries are always
those of the end of the turn, so that forward passes of any size choose the same tokens.

Attention there does not find what a repetition goes on with: the layers that do so lie above P. It is found in the
token ids instead. Where the end of the prompt stands in it once before, what followed then goes on first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .kv_cache import Sequence

FOLLOWING = 24  # tokens after an earlier match of the end that go on before all others
LEAST_MATCH, MOST_MATCH = 3, 8  # tokens of the end that match
QUERIES = 16  # last tokens of a turn that choose
LAYERS = 8  # last layers below P whose attention counts
# What counts of the scores around a token, from 3 before it to 3 after: most those before, as what follows a token that
# is looked at is looked at next.
NEIGHBOURS = (3, 3, 3, 4, 2, 1, 0)

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
            self.queries.setdefault(layer, []).append(rows.clone())  # a view would keep the whole pass

    def keep_hidden(self, hidden: Tensor, start: int) -> None:
        """hidden [T, D]: h[P] of the tokens from `start` on."""
        if (rows := hidden[max(0, self.start - start) :]).numel():
            self.hidden.append(rows)

    def choose(self, model) -> tuple[Tensor, Tensor]:
        """The positions [count + boundary tokens] int64, in order, that go on, and their h[P]."""
        size = self.boundary - self.start
        if self.count < size:
            scores = self.scores(model)
            if (follows := following(self.sequence.token_ids[: self.end])) is not None:
                first, last = (max(0, position - self.start) for position in (follows, follows + FOLLOWING))
                scores[first:last] += 1  # more than any has
            best = scores.argsort(descending=True, stable=True)[: self.count].sort().values
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


def following(token_ids: list[int]) -> int | None:
    """The index of the token that followed when the end of `token_ids` stood there before: after the longest match, and
    of equally long ones the latest; None where fewer than LEAST_MATCH tokens match.
    """
    ids = torch.tensor(token_ids)
    matches, length = torch.ones(len(ids) - 1, dtype=torch.bool), torch.zeros(len(ids) - 1, dtype=torch.int64)
    for back in range(1, min(MOST_MATCH, len(ids) - 1) + 1):  # matches[i]: so many tokens up to i are the last ones
        matches[: back - 1] = False
        matches[back - 1 :] &= ids[: len(ids) - back] == ids[-back]
        length += matches
    if not len(length) or (longest := int(length.max())) < LEAST_MATCH:
        return None
    return int((length == longest).nonzero()[-1]) + 1
