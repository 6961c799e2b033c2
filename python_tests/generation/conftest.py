"""`model.generate` of a tiny chat model, and transformers' model of the same checkpoint."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import make_chat_folder, transformers_model

import pop_ext


@pytest.fixture(scope="session")
def folder(tiny_llama, tmp_path_factory):
    return make_chat_folder(tiny_llama, tmp_path_factory)


@pytest.fixture(scope="session")
def peer(folder):
    return transformers_model(folder)


@pytest.fixture
def model(loaded):
    """The shared model; a test may change its generation_config."""
    before = loaded.generation_config
    loaded.generation_config = transformers.GenerationConfig(**before.to_diff_dict())
    yield loaded
    loaded.generation_config = before


@pytest.fixture(scope="session")
def loaded(folder):
    return pop_ext.load(folder, dtype=torch.float32)


@pytest.fixture
def live(model, monkeypatch):
    """The conversations that are in the model's cache."""
    sequences = []
    new_sequence, free = model.new_sequence, model.free

    def tracked_new():
        sequences.append(new_sequence())
        return sequences[-1]

    def tracked_free(sequence):
        free(sequence)
        sequences[:] = [other for other in sequences if other is not sequence]

    monkeypatch.setattr(model, "new_sequence", tracked_new)
    monkeypatch.setattr(model, "free", tracked_free)
    return sequences
