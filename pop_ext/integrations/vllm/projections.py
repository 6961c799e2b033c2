"""Stage 2 inside another engine: keys and values of the skipped layers, for the heads of one tensor-parallel rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import pop_ext.ops  # noqa: F401  torch.ops.pop
from pop_ext.checkpoints.calibration import Calibration, CalibrationError
from pop_ext.checkpoints.fingerprint import checkpoint_fingerprint

pop = torch.ops.pop


class Shape(NamedTuple):
    """What a calibration must fit, of the whole model."""

    num_layers: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int


@dataclass
class Projections:
    """The weights of stage 2 for R skipped layers and the Hkv heads of one rank.

    weight [R, 2 Hkv E, D + rank], the input norm's gain folded in; bias [R, 2 Hkv E]; k_norm [R, E] float32, the gain;
    rope_index [R] int32, which of the rotary embeddings a layer uses; features [rank, D] of the token before.
    """

    weight: Tensor
    bias: Tensor | None
    k_norm: Tensor | None
    rope_index: Tensor
    eps: float
    head_dim: int
    features: Tensor | None = None

    def __post_init__(self):
        self.no_gain = torch.ones(self.weight.shape[2] - self.rank, device=self.weight.device)

    @property
    def rank(self) -> int:
        return 0 if self.features is None else len(self.features)

    def normed(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, D] -> x [T, D], normed, and what the token after takes of each token, [T, rank]."""
        x = pop.rms_norm(hidden, self.no_gain, self.eps)
        return x, pop.linear(x, self.features)

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, D] (with features: [T, D + rank], normed); cos, sin [ropes, T, E / 2] float32 -> keys and values
        [R, T, Hkv, E], normed and turned as they belong into the cache.
        """
        layers, rows, _ = self.weight.shape
        tokens = len(hidden)
        out = hidden.new_empty(2, layers, 1, tokens, rows // 2 // self.head_dim, self.head_dim)
        slots = torch.arange(tokens, device=hidden.device)
        pop.project_kv(
            hidden, self.weight, self.bias, self.k_norm, self.eps, cos, sin, self.rope_index, slots, out[0], out[1]
        )
        return out[0, :, 0], out[1, :, 0]


def calibrated(
    path: str, folder: str, depth: int, shape: Shape, heads: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The projections [L - depth, 2 h E, D + rank] of key/value heads `heads`, and the features [rank, D], of a
    calibration file. CalibrationError if it is damaged, without this depth, or made for other weights than `folder`'s.
    """
    calibration = Calibration.load(path, shape, dtype)
    weight, features = calibration.at(depth)
    if calibration.provenance["fingerprint"] != checkpoint_fingerprint(folder):
        raise CalibrationError(f"{path}: made for another model than {folder}: its fingerprint differs")
    weight = weight.unflatten(1, (2, shape.num_kv_heads, shape.head_dim))[:, :, heads].flatten(1, 3)
    return weight.contiguous(), features.contiguous() if len(features) else None


class Carry:
    """Features of the token before, where that token was of an earlier step.

    For each block of the cache those of the last token computed in it: of a full block, whose sequences may be many,
    its last token's; of one begun, that of the one sequence that fills it.
    """

    def __init__(self, blocks: int, rank: int, dtype: torch.dtype, device: torch.device):
        self.tails = torch.zeros(blocks, rank, dtype=dtype, device=device)

    def previous(self, features: Tensor, starts: Tensor, firsts: Tensor, tables: Tensor, slots: Tensor, size: int):
        """features [T, rank] of a step's tokens -> those of the token before each, [T, rank].

        starts [requests]: each request's first row; firsts [requests]: its position; tables [requests, blocks]: the
        request's blocks; slots [T]: where each token is in the cache, in blocks of `size`. What a sequence's first
        token gets means nothing: it is an anchor.
        """
        before = (firsts - 1).clamp_min(0)
        block = tables.gather(1, (before // size)[:, None])[:, 0].long()
        begun = self.tails[block]
        blocks = slots // size
        last = torch.ones_like(blocks, dtype=torch.bool)
        last[:-1] = blocks[1:] != blocks[:-1]
        self.tails[blocks[last]] = features[last]
        previous = features.roll(1, 0)
        # A full block may be another request's of this very step, so it is read after the step's own are written.
        previous[starts] = torch.where((firsts % size == 0)[:, None], self.tails[block], begun)
        return previous
