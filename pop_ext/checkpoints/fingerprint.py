"""What identifies a model's weights, from a loaded model or from the files of its checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .config import load_config
from .families import ModelSpec
from .files import resolve_folder
from .tensors import CheckpointTensors, TensorEntry
from .weights import tensor_names

SAMPLE = 4096  # values of a tensor


def fingerprint(spec: ModelSpec, tables: Iterable[Mapping[str, Tensor | None]]) -> str:
    """A SHA-256 over the spec and a sample of every tensor, in whatever dtype: the model's table first, then a table a
    layer.
    """
    digest = hashlib.sha256(repr(spec).encode())
    for table in tables:
        for name, tensor in sorted(table.items()):
            if tensor is not None:
                values = tensor.flatten()
                sample = values[:: max(1, len(values) // SAMPLE)].bfloat16()
                digest.update(name.encode() + sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def checkpoint_fingerprint(folder: str | Path) -> str:
    """`Model.fingerprint()` of a checkpoint folder, or hub id, without loading it: one layer is in memory at a time."""
    folder = resolve_folder(folder)
    spec = ModelSpec.from_config(load_config(folder))
    files = CheckpointTensors(folder, torch.bfloat16, torch.device("cpu"), spec.vision_type)
    return tensors_fingerprint(spec, files.weight, files.gain)


def tensors_fingerprint(
    spec: ModelSpec, weight: Callable[..., Tensor], gain: Callable[[TensorEntry, float], Tensor]
) -> str:
    """`Model.fingerprint()` of tensors by name. weight(*entries): theirs, stacked by rows; gain(entry, offset): offset
    + tensor in float32.
    """
    model, layers = tensor_names(spec)
    names = {"qkv": ("q", "k", "v"), "qkv_bias": ("q_bias", "k_bias", "v_bias"), "gate_up": ("gate", "up")}
    parts = {part for several in names.values() for part in several}

    def layer_table(entries) -> dict[str, Tensor]:
        table = {}
        for name, keys in (names | {key: (key,) for key in entries if key not in parts}).items():
            if keys[0] in entries:
                if "norm" in name:
                    table[name] = gain(entries[name], spec.norm_offset)
                else:
                    table[name] = weight(*(entries[key] for key in keys))
        return table

    def tables():
        embedding = weight(model["embedding"])
        head = embedding if spec.tie_word_embeddings else weight(model["lm_head"])
        yield {
            "embedding": embedding,
            "lm_head": head,
            "final_norm": gain(model["final_norm"], spec.norm_offset),
        }
        yield from map(layer_table, layers)

    return fingerprint(spec, tables())
