"""A pytest plugin: skips are printed by reason at the end, and one that skips.toml does not have is a failure."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tomllib
import torch

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
