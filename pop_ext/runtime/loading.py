"""`load`: a model from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoints.files import resolve_folder
from .generation import Model


def load(
    path: str | Path,
    prefill_depth: int | float = 1.0,
    boundary_tokens: int = 1,
    anchor_tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    max_cache_tokens: int | None = None,
    calibration: str | Path | None = None,
) -> Model:
    """Loads a checkpoint folder, or a Hugging Face hub id, for POP.

    prefill_depth: layers that prompt tokens run through; an int counts them, a float in (0, 1] is their share (so 1 is
    one layer, 1.0 all).
    boundary_tokens: how many of each turn's last prompt tokens go through all layers. anchor_tokens: how many of the
    sequence's first.
    dtype: torch.bfloat16 or torch.float32. max_cache_tokens: capacity of the key/value cache over all conversations, by
    default the model's context or 32,768, whichever is less.
    calibration: a file of `pop calibrate`, made for this model and every depth below L - 1 that is asked for.
    """
    return Model(
        resolve_folder(path), prefill_depth, boundary_tokens, anchor_tokens, dtype, max_cache_tokens, calibration
    )
