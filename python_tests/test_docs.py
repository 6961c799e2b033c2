"""Every command and code block of the README and docs, run as printed.

The blocks run in a folder that has what they name: MODEL, a tiny checkpoint of 30 layers with a tokenizer; FILE,
question.txt and wikitext2_valid.txt, text; model.gguf; images. What is not run here is in NOT_RUN, with who runs it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Commands that are not run here, by how they begin, and where they are run instead.
NOT_RUN = {
    "make ": "by people and CI",
    "pip install": "test_packaging.py",
    "python bench/": "each program's own test, or by people: it takes minutes to hours",
}


def blocks() -> list:
    """(language, block) of all pages, one test each; commands of a page share its folder and run in order."""
    found = []
    for page in PAGES:
        for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            found.append((page, language, text))
    return found


def commands(page: Path) -> list[str]:
    """The shell commands that a page prints, without their comments."""
    lines = [
        line.split("  #")[0].strip()
        for where, language, text in blocks()
        if where == page and not language
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line.startswith("pop ") and not line.startswith(tuple(NOT_RUN))]


@pytest.fixture(scope="module")
def place(tmp_path_factory, docs_model) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "MODEL").symlink_to(docs_model)
    text = " ".join(f"Sentence {i} says that {i} and {i + 1} are {2 * i + 1}." for i in range(2000))
    for name in ("FILE", "wikitext2_valid.txt"):
        (folder / name).write_text(text)
    (folder / "question.txt").write_text("What is prefill?\n")
    return folder
