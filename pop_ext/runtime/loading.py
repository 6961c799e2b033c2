"""`load`: a model from a checkpoint."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from ..checkpoints.calibration import default_depth
from ..checkpoints.config import load_config
from ..checkpoints.families import ModelSpec
from ..checkpoints.files import resolve_folder
from ..versions import check_transformers
from .finite import check_weights as check_finite
from .generation import Model

logger = logging.getLogger("pop_ext")


def load(
    path: str | Path,
    *,
    prefill_depth: int | float | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    calibration: str | Path | None = None,
    boundary_tokens: int = 1,
    anchor_tokens: int = 1,
    max_cache_tokens: int | None = None,
    prefix_cache: bool = False,
    deep_tokens: float = 0.0,
    prefill_plan: str | Path | None = None,
    revision: str | None = None,
    check_weights: bool = False,
) -> Model:
    """Loads a checkpoint folder, or a Hugging Face hub id, for POP.

    prefill_depth: layers that prompt tokens run through: an int counts them, a float in (0, 1] is their share, so 1.0
        is all layers. An int 1 on a deeper model warns. By default the depth that the calibration recommends, or its
        only one; without a calibration all layers.
    device: "cpu", "cuda", "cuda:1" or a torch.device; "auto" is CUDA where this machine and this build have it, else
        the CPU.
    dtype: a torch.dtype or its name: bfloat16, on the CPU also float32, on a GPU also float16. "auto" is bfloat16.
    calibration: a file of `pop tune` or `pop calibrate`, made for this model and every depth below L - 1 that is asked
        for.
    boundary_tokens: how many of each turn's last prompt tokens run through all layers. 0 is the paper's ablation: the
        first token of an answer then comes from the last computed hidden state of the prompt's last token, through the
        final norm and the vocabulary projection; not together with deep_tokens.
    anchor_tokens: how many of a sequence's first tokens run through all layers (attention sinks); 0 is the paper's.
    max_cache_tokens: capacity of the key/value cache over all conversations. By default on the CPU the model's context
        or 32,768, whichever is less; on a GPU 85% of the memory that the weights leave free.
    prefix_cache: keep the prompts of `generate` in the cache until the room is needed, so that one that begins like an
        earlier one is computed from where they differ, to whole blocks of 64 tokens. Results are the same.
    deep_tokens: share, in [0, 1], of each prompt's truncated tokens that run through all layers after all: those that
        the prompt's end attends to most. 0 is none of them, 1 the full model. On the CPU, for conversations without
        images, without prefix_cache.
    prefill_plan: a file of `pop plan`, in place of prefill_depth: which attentions and MLPs truncated tokens run
        through. For models of text, without deep_tokens. A call's own prefill_depth takes its place.
    revision: branch, tag or commit of a hub repository.
    check_weights: read all weights now, and raise if NaN or infinity is among them.

    Raises CheckpointError, CalibrationError, DeviceMemoryError, TypeError or ValueError, which name what was wrong.
    """
    check_transformers()
    folder = resolve_folder(path, revision)
    number = resolve_dtype(dtype)
    if not isinstance(prefix_cache, bool):
        raise TypeError(f"prefix_cache is {prefix_cache!r:.80}, expected a bool")
    if prefill_plan is not None and prefill_depth is not None:
        raise ValueError(f"prefill_plan and prefill_depth ({prefill_depth!r:.40}) are given, expected one of them")
    if prefill_depth is None:
        prefill_depth = 1.0 if prefill_plan is not None or calibration is None else default_depth(calibration)
    check_ambiguous(prefill_depth, folder)
    settings = (
        prefill_depth,
        boundary_tokens,
        anchor_tokens,
        number,
        max_cache_tokens,
        calibration,
        device,
        prefix_cache,
        deep_tokens,
        prefill_plan,
    )
    model = Model(folder, *settings)
    if check_weights:
        check_finite(model.weights)
    return model


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a name. "auto" is bfloat16; the log says so. Kernels for AVX2 alone, which widen it, read prompts as
    fast as in float32 and decode faster, as it is half the bytes (docs/results.md).
    """
    if dtype == "auto":
        logger.info("weights and cache in bfloat16")
        return torch.bfloat16
    names = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    found = names.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in names.values():
        raise ValueError(f"dtype is {dtype!r}, expected 'auto', {', '.join(map(repr, names))} or their torch.dtype")
    return found


def check_ambiguous(depth: int | float, folder: Path) -> None:
    """An int counts layers and a float is a share: ValueError for a float that counts, a warning for an int of 1."""
    if isinstance(depth, float) and depth != 1 and depth.is_integer():
        raise ValueError(f"prefill_depth is {depth}, expected layers as an int ({int(depth)}) or a share in (0, 1]")
    if type(depth) is int and depth == 1:
        warn_of_one_layer(depth, ModelSpec.from_config(load_config(folder)).num_layers)


def warn_of_one_layer(depth: int | float, layers: int) -> None:
    """A warning where an int of 1 may have been meant to be all of a model's layers."""
    if type(depth) is int and depth == 1 and layers > 2:
        warnings.warn(f"prefill_depth=1 is one layer of {layers}; all layers are 1.0", stacklevel=4)
