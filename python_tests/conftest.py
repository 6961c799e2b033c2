"""Fixtures: checkpoints, once a session, and the instruction sets of the CPU operations. No test skips silently."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import tomllib
import torch
from helpers import TINY, real_model, tiny_folder


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


# Skips: printed by reason at the end, and a failure where python_tests/skips.toml does not have them.

SKIPS = tomllib.loads(Path(__file__).with_name("skips.toml").read_text())
CONDITIONS = {
    "no nvcc": lambda: shutil.which("nvcc") is None,
    "GPU": torch.cuda.is_available,
    "no GPU": lambda: not torch.cuda.is_available(),
    "torch with CUDA": lambda: torch.version.cuda is not None,
}
_skipped: Counter[str] = Counter()
_cuda_tests: set[str] = set()


def allowed(reason: str) -> bool:
    return any(
        re.search(entry["reason"], reason) and ("when" not in entry or CONDITIONS[entry["when"]]())
        for entry in SKIPS["skip"]
    )


def complaints(config) -> list[str]:
    """What makes the run a failure; the number of CUDA tests counts only when everything was asked for."""
    found = [f"skipped, for a reason that skips.toml does not allow here: {r}" for r in _skipped if not allowed(r)]
    option = config.option
    whole = config.args_source == config.ArgsSource.TESTPATHS and not (option.keyword or option.markexpr)
    if whole and not option.collectonly and not option.maxfail and shutil.which("nvcc"):
        expected = SKIPS["cuda_tests_on_" + ("a_gpu" if torch.cuda.is_available() else "the_emulator")]
        if len(_cuda_tests) < expected:
            found.append(f"{len(_cuda_tests)} CUDA tests ran, expected at least {expected}")
    return found


def _note_skip(report) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and not hasattr(report, "wasxfail"):
        _skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_runtest_logreport(report):
    _note_skip(report)
    if report.when == "call" and not report.skipped and "test_cuda_" in report.nodeid.split("::")[0]:
        _cuda_tests.add(report.nodeid)


def pytest_collectreport(report):
    _note_skip(report)  # a whole module


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == 0 and not hasattr(session.config, "workerinput") and complaints(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for reason, count in _skipped.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
    for complaint in complaints(config):
        terminalreporter.write_line(f"error: {complaint}", red=True)
