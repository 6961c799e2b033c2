"""What POP is compared with: layers taken out of prefill and decode alike, and prompts whose tokens the deep layers do
not see at all.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from ..runtime.forward_batch import ForwardBatch
from ..runtime.generation import Model
from ..runtime.kv_cache import BLOCK_SIZE, KVCache
from ..vision.spans import ImageSpan


def without_layers(model: Model, removed: range | list[int]) -> Model:
    """A model that shares `model`'s weights but lacks some layers for all tokens; positions are unchanged."""
    kept = [index for index in range(model.spec.num_layers) if index not in removed]
    spec, weights, variant = model.spec, model.weights, copy.copy(model)
    variant.spec = replace(
        spec,
        num_layers=len(kept),
        windows=tuple(spec.windows[index] for index in kept),
        rope_index=tuple(spec.rope_index[index] for index in kept),
    )
    bias, rows = weights.projection_bias, torch.tensor(kept, dtype=torch.int64, device=model.device)
    variant.weights = replace(
        weights,
        layers=[weights.layers[index] for index in kept],
        projection=weights.projections_from(0)[rows],
        projection_bias=None if bias is None else bias[rows],
    )
    variant.rope_index = model.rope_index[rows]
    variant.k_norms = None if model.k_norms is None else model.k_norms[rows]
    variant.calibration, variant.prefill_depth, variant.prefill_plan, variant.decode_buffers = None, 1.0, None, {}
    variant.cache = KVCache(
        len(kept), spec.num_kv_heads, spec.head_dim, model.max_cache_tokens, model.dtype, model.device
    )
    return variant


class SpeedBaseline(Model):
    """`model` with deep layers that see anchor, boundary and generated tokens only: nothing is projected (the inference
    of SPEED, arXiv 2605.06105, on a model that was not trained for it).
    """

    def __init__(self, model: Model):
        self.__dict__.update(vars(model), calibration=None, decode_buffers={}, prefix_cache=False)
        self._depth = model.spec.num_layers
        # of each slot of the cache: whether the layers from _depth up do not see its token
        self._hidden = torch.zeros(model.cache.num_blocks * BLOCK_SIZE, dtype=torch.bool, device=model.device)

    def project(self, depth: int, hidden: Tensor, before, batch: ForwardBatch, slot_mapping: Tensor, previous) -> None:
        self._depth = depth
        self._hidden[slot_mapping[slot_mapping >= 0]] = True

    def attention(self, index: int, query: Tensor, batch: ForwardBatch) -> Tensor:
        if index < self._depth:
            return super().attention(index, query, batch)
        self._hidden[batch.slot_mapping] = False  # a slot may have been another token's
        keys, values = (pool.flatten(0, 1) for pool in self.cache.layers[index])
        window, results = self.spec.windows[index], []
        for run, rows in enumerate(query.split(batch.cu_seqlens_q.diff().tolist())):
            end = int(batch.seqlens_k[run])
            tokens = torch.arange(end, device=query.device)
            slot_mapping = batch.block_tables[run, tokens // BLOCK_SIZE].long() * BLOCK_SIZE + tokens % BLOCK_SIZE
            seen = tokens[~self._hidden[slot_mapping]]
            distance = torch.arange(end - len(rows), end, device=query.device)[:, None] - seen
            mask = (distance >= 0) & (distance < (window or math.inf))
            result = scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (rows, keys[slot_mapping[seen]], values[slot_mapping[seen]])),
                attn_mask=mask,
                scale=self.spec.attention_scale,
                enable_gqa=True,
            )
            results.append(result[0].transpose(0, 1))
        return torch.cat(results)


def layer_similarity(
    model: Model, windows: list[list[int]], visuals: list[list[ImageSpan]] | None = None
) -> tuple[Tensor, Tensor]:
    """What the layer-removing methods choose by: the block influence [L] of every layer, `1 - E cos(h_l, h_l+1)`
    (ShortGPT, arXiv 2403.03853), and the angular distance [L + 1, L + 1] from h_i to h_j at the windows' last tokens,
    `arccos(cos(h_i, h_j)) / pi` (Gromov et al., arXiv 2403.17887), each the mean over `windows`.
    """
    influence = angles = torch.zeros(())
    for window, images in zip(windows, visuals or [[]] * len(windows), strict=True):
        hidden = torch.stack([h.float() for h in model.hidden_states([window], [images])])  # [L + 1, T, D]
        influence = influence + 1 - cosine_similarity(hidden[:-1], hidden[1:], dim=-1).mean(-1)
        last = hidden[:, -1]
        angles = angles + cosine_similarity(last[:, None], last, dim=-1).clamp(-1, 1).arccos() / math.pi
    return influence / len(windows), angles / len(windows)
