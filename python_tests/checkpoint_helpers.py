"""What the tests of checkpoints share: loading, comparing, and spoiling a copy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import ModelSpec
from pop_ext.checkpoints.weights import load_weights


def load(folder: Path, dtype: torch.dtype = torch.float32):
    spec = ModelSpec.from_config(load_config(folder))
    return spec, load_weights(folder, spec, dtype)


def flat(weights) -> dict[str, torch.Tensor | None]:
    model = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    layers = model.pop("layers")
    assert model.pop("first_projection") == 0
    for index, layer in enumerate(layers):
        model |= {f"{index}.{key}": value for key, value in vars(layer).items()}
    return model


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor is None:
            assert ours[name] is None, name
        else:
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


# Copies of a checkpoint to spoil


def edit(path: Path, change) -> None:
    """`change` takes what the JSON file holds, and alters it."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_config(folder: Path, **values) -> None:
    edit(folder / "config.json", lambda config: config.update(values))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
