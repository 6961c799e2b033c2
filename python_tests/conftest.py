"""Fixtures: checkpoints, once a session, and the instruction sets of the CPU operations."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers import TINY, real_model, tiny_folder, transformers_model


@pytest.fixture(scope="session", params=list(TINY))
def tiny(request, tmp_path_factory) -> Path:
    """The folder of a tiny checkpoint; a test that takes it runs for every family."""
    return tiny_folder(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """One family only, for what does not depend on the architecture."""
    return tiny_folder("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_gemma(tmp_path_factory) -> Path:
    return tiny_folder("gemma3", tmp_path_factory)


@pytest.fixture(scope="session", params=["smollm2-135m", "gemma-3-270m"])
def real(request) -> Path:
    return real_model(request.param)


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_llama, tmp_path) -> Path:
    transformers_model(tiny_llama).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


# Ours and transformers' model of one checkpoint (pairs.Pair)


@pytest.fixture
def pair(tiny):
    from pairs import pair_of

    return pair_of(tiny)


@pytest.fixture
def llama(tiny_llama):
    from pairs import pair_of

    return pair_of(tiny_llama)


@pytest.fixture
def gemma(tiny_gemma):
    from pairs import pair_of

    return pair_of(tiny_gemma)


@pytest.fixture
def peer(tiny_llama):
    """transformers' model, to attach to."""
    from attach_cases import load_peer

    return load_peer(tiny_llama)


# Instruction sets of the CPU operations.


def pytest_configure(config):
    """POP_CPU_ISA: the instruction set of tests that do not name one, instead of this machine's best. POP_PACKAGE: the
    folder of another build of pop_ext to test.
    """
    if folder := os.environ.get("POP_PACKAGE"):
        sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
        sys.path.insert(0, folder)
        import pop_ext

        assert Path(pop_ext.__file__).is_relative_to(folder), f"{pop_ext.__file__} is imported, expected from {folder}"
    if name := os.environ.get("POP_CPU_ISA"):
        from pop_ext import ops

        ops.set_cpu_isa(name)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        from pop_ext import ops

        metafunc.parametrize("isa", ops.cpu_isas(), indirect=True, scope="module")


@pytest.fixture(scope="module")
def isa(request) -> str:
    """Runs the test's operations with one instruction set; every one that this machine has takes its turn."""
    from pop_ext import ops

    before = ops.cpu_isa()
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)
