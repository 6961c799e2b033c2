"""Every command and code block of the README and docs, run as printed, and the examples.

Each page's blocks run in order in a folder of its own that has what they name: MODEL, a tiny checkpoint of 30 layers
with a tokenizer; FILE, question.txt and wikitext2_valid.txt, text; plan.json; model.gguf; image samples. What is run
elsewhere is in ELSEWHERE, with where.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import ROOT, make_damped_llama

from pop_ext.checkpoints.fingerprint import checkpoint_fingerprint
from pop_ext.checkpoints.prefill_plan import PrefillPlan

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
VLLM = (
    ROOT / "docs" / "vllm.md"
)  # its blocks need vLLM: python_tests/vllm has the engine and the server, in that environment
# What a printed line begins with -> where it is run instead.
ELSEWHERE = {
    "make demo": "by people",
    "make test": "this run",
    "make bench": "test_bench.py runs the programs that it calls",
    "make vlm-synthetic": "test_vlm_synthetic.py",
    "make vllm": "its own environment, in CI",
    "make gpu": "by people: it wants a GPU",
    "pip install": "CI: make test-wheel",
    "python bench/": "test_bench.py, on tiny models, or by people",
    "vllm serve": "python_tests/vllm",
    "pop generate MODEL --image": "python_tests/vision: it needs a model with a vision tower",
    "pop generate MODEL --video": "python_tests/vision",
    "pop calibrate MODEL --samples": "python_tests/vision",
    "pop chat": "test_bench_and_chat.py, on a terminal",
    "pop convert": "test_gguf.py",
    "pop plan": "test_plans.py, and other blocks have a plan.json",
    "pop calibrate MODEL --prefill-depth 15 --text FILE --refine": "test_calibrate_command.py",
}
NO_CODE = ("@article", "{", "     ")  # a citation, a line of data, the diagram


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page.name}:{self.line}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            found.append(Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2]))
    return [block for block in found if block.page != VLLM and not block.text.startswith(NO_CODE)]


@pytest.fixture(scope="module")
def tiny_30(tmp_path_factory) -> Path:
    """Of 30 layers, as the pages' depths ask for."""
    return make_damped_llama(
        tmp_path_factory.mktemp("docs-model") / "tiny", 10, 0.02, hidden_size=32, intermediate_size=48,
        num_hidden_layers=30, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096,
    )  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_30):
    """A function from a page to the folder that its blocks run in."""
    folders, fingerprint = {}, checkpoint_fingerprint(tiny_30)

    def place(page: Path) -> Path:
        if page not in folders:
            folder = folders[page] = tmp_path_factory.mktemp(page.stem)
            (folder / "MODEL").symlink_to(tiny_30)
            text = "\n".join(f"Sentence {i} says that {i} and {i + 1} are {2 * i + 1}." for i in range(700))
            for name in ("FILE", "wikitext2_valid.txt"):
                (folder / name).write_text(text)
            (folder / "question.txt").write_text("What is prefill?\n")
            PrefillPlan.suffix(18, 30, fingerprint).switched(24, "attention", True).save(folder / "plan.json")
            (folder / "chats.jsonl").write_text(
                "".join(
                    json.dumps({"messages": [{"role": "user", "content": f"What is {i} and {i}? " * 8},
                                             {"role": "assistant", "content": f"It is {2 * i}. " * 8}]}) + "\n"
                    for i in range(120)
                )
            )  # fmt: skip
        return folders[page]

    return place


def run(command: list[str], folder: Path, stdin: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": "", "OMP_NUM_THREADS": "2"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_blocks_run_as_printed(block, places):
    folder = places(block.page)
    if block.language == "python":
        run([sys.executable, "-c", block.text], folder)
        return
    assert block.language in ("", "sh"), f"{block}: a block of {block.language!r} is run by no test"
    for line in block.text.replace("\\\n", " ").splitlines():
        command = line.split("  #")[0].strip()
        if not command or command.startswith("#") or command.startswith(tuple(ELSEWHERE)):
            continue
        assert command.startswith("pop "), f"{block}: {command!r} is neither run here nor in ELSEWHERE"
        assert run(shlex.split(command), folder).stdout


def test_elsewhere_names_what_exists():
    for where in ELSEWHERE.values():
        for name in re.findall(r"(?:test_\w+\.py|python_tests/\w+)", where):
            path = name if "/" in name else f"python_tests/{name}"
            assert (ROOT / path).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples(example, places, tmp_path):
    folder = places(ROOT / "README.md")
    done = run([sys.executable, str(example), str(folder / "MODEL"), str(folder / "FILE")], tmp_path)
    assert done.stdout.strip()
