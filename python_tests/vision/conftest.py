"""Fixtures: a tiny vision-language model beside transformers', once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from vision_models import TINY_VISION
from vision_pairs import Pair, pair_of


@pytest.fixture(params=list(TINY_VISION))
def pair(request, tmp_path_factory) -> Pair:
    return pair_of(request.param, tmp_path_factory)


@pytest.fixture(params=["qwen3_vl", "qwen3_vl_tied"])
def qwen(request, tmp_path_factory) -> Pair:
    return pair_of(request.param, tmp_path_factory)


@pytest.fixture(params=["gemma3", "gemma3_pan"])
def gemma(request, tmp_path_factory) -> Pair:
    return pair_of(request.param, tmp_path_factory)


@pytest.fixture
def folder(pair, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(pair.folder, tmp_path / "copy")
