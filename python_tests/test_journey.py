"""The way of a new user on a tiny model, in a terminal, by what the commands print for people."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers import make_chat_folder, run_in_terminal

POP = [sys.executable, "-m", "pop_ext.cli"]
SIZES = ["--prompts", "8", "--prompt-tokens", "100", "--continuation-tokens", "12"]


@pytest.fixture(scope="module")
def place(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("journey")
    (folder / "MODEL").symlink_to(make_chat_folder(tiny_llama, tmp_path_factory))
    (folder / "my text.txt").write_text(" ".join(f"Line {i} says {i * i}." for i in range(1200)))
    return folder


@pytest.fixture(scope="module")
def tuned(place) -> str:
    """What `pop tune` shows at 80 columns."""
    command = [*POP, "tune", f"{place}/MODEL", "--text", f"{place}/my text.txt", "--output", f"{place}/my file"]
    status, shown = run_in_terminal([*command, *SIZES, "--tokens", "3000", "--max-kl", "50"], 80)
    assert status == 0, shown
    return shown


def plain(shown: str) -> str:
    return " ".join(shown.split())


def test_tune_says_what_to_do(tuned):
    for part in ("tuning: calibrating depths 2, 3, 4", "evaluating depths", "timing depths", "verifying chat"):
        assert part in plain(tuned)
    result = tuned[tuned.index("MODEL: 8 held-out prompts of 100 tokens") :]
    assert max(len(line.rstrip()) for line in result.splitlines() if "pop generate" not in line) <= 80
    text = plain(result)
    assert re.search(
        r"Recommended: prefill depth 2 of 6 layers, with calibrated projections\. It reaches a KL of", text
    )
    assert re.search(r"prefill of 100 tokens is \d\.\d\d ± \d\.\d\d times as fast as at full depth", text)
    assert re.search(
        r"KL divergence from the full model is (\d\.\d{4}) nats a token \(95% interval \d\.\d{4} to \d\.\d{4}; "
        r"\d\.\d{4} with own weights\), and the likeliest next token is the full model's at \d+\.\d% of all tokens",
        text,
    )
    assert re.search(r"Uses, by 8 prompts of each.*: (Not safe|Safe)[ :].* depth 2 of 6", text)
    table = re.findall(r"^ ?(\d+)( \*)? +(\S+ ± \S+) +(\S+ ± \S+) +(\S+ ± \S+) +(\S+ ± \S+) *$", result, re.M)
    assert [(depth, mark.strip()) for depth, mark, *_ in table] == [("2", "*"), ("3", ""), ("4", "")]


def test_the_next_command_is_the_one(tuned, place):
    """As it is printed, whatever is in the paths; the times line says what is in use."""
    (line,) = [line for line in tuned.splitlines() if line.strip().startswith("pop generate")]
    command = shlex.split(line)
    assert command[:3] == ["pop", "generate", f"{place}/MODEL"] and f"{place}/my file" in command
    status, shown = run_in_terminal([*POP, *command[1:], "--max-new-tokens", "5"], 80)
    assert status == 0 and "prefill depth 2 of 6, calibrated projections" in plain(shown)


@pytest.mark.parametrize("columns", [60, 80, None])
def test_evaluate_is_whole(tuned, place, columns):
    """Of all the file's depths, in a terminal and in a pipe."""
    command = [
        *POP,
        "evaluate",
        f"{place}/MODEL",
        "--text",
        f"{place}/my text.txt",
        "--calibration",
        f"{place}/my file",
    ]
    command += SIZES
    if columns is None:
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        status, shown = run_in_terminal(command, columns)
        assert status == 0, shown
        shown = shown[shown.index("MODEL, 100 prompt tokens") :]
        assert max(len(line.rstrip()) for line in shown.splitlines()) <= columns
    assert "…" not in shown
    rows = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    names = {"full": "full model", "pop_uncalibrated": "own weights", "pop_calibrated": "calibrated"}
    assert [(row["prefill_depth"], row["method"]) for row in rows] == [
        (6, "full"), *((depth, f"pop_{kind}") for depth in (2, 3, 4) for kind in ("uncalibrated", "calibrated"))
    ]  # fmt: skip
    for row in rows:
        half = (row["kl_ci95"][1] - row["kl_ci95"][0]) / 2
        digits = 3 if row["kl"] >= 0.0995 else 4
        kl = "0" if row["method"] == "full" else f"{row['kl']:.{digits}f} ± {half:.{digits}f}"
        perplexity = f"{row['perplexity']:.{0 if row['perplexity'] >= 1000 else 2}f}"
        name = f"{row['prefill_depth']}, {names[row['method']]}"
        assert re.search(rf"^ ?{name} +{re.escape(kl)} .* {perplexity} ", shown, re.M), (name, kl, shown)
    for word in ("KL", "top-1", "ppl", "speed-up"):
        assert re.search(rf"^{word}: ", shown, re.M)


def test_interrupted(place):
    """Ctrl-C ends with 130 and no traceback, and says that the same command goes on."""
    command = [*POP, "tune", f"{place}/MODEL", "--text", f"{place}/my text.txt", "--output", f"{place}/other"]
    code = (
        "import sys; from pop_ext.analysis import evaluation; from pop_ext.cli import app\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        f"evaluation.score = interrupted; sys.argv = {['pop', *command[3:], *SIZES, '--tokens', '3000']!r}; app()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == "pop: interrupted; the same command goes on from here\n"
    assert (place / "other.tuning").exists() and not (place / "other").exists()
