"""What the package says of itself."""

from __future__ import annotations

import ast
from importlib.metadata import files, metadata, version

import pytest
import tomllib
from helpers import ROOT

from pop_ext import _C, versions

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_metadata():
    assert version("pop-ext") == PROJECT["version"]
    assert metadata("pop-ext")["License-Expression"] == "Apache-2.0"
    assert any(path.name == "LICENSE" for path in files("pop-ext"))


def test_stub_has_what_the_library_has():
    stub = ast.parse((ROOT / "pop_ext" / "_C.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert declared == {name for name in dir(_C) if not name.startswith("_")}


def test_transformers_range():
    first, end = versions.TRANSFORMERS
    assert f"transformers>={first},<{end}" in PROJECT["dependencies"]
    versions.check_transformers()
    versions.check_transformers("5.99.1")
    for installed in ("5.18.9", "6.0.0", "4.57"):
        with pytest.raises(ImportError, match=f"transformers is {installed}, expected 5.19 or later and before 6"):
            versions.check_transformers(installed)
