"""`pop calibrate`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers import make_chat_folder, pop
from windows import random_windows

import pop_ext
from pop_ext.analysis import calibration, refinement
from pop_ext.analysis import text as texts
from pop_ext.checkpoints import calibration as calibration_files


@pytest.fixture(scope="module")
def chat_folder(tiny_llama, tmp_path_factory):
    return make_chat_folder(tiny_llama, tmp_path_factory)


def test_command(chat_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a text with {i * i} words, more or less. " for i in range(300)))
    output = tmp_path / "c.safetensors"
    options = ("--prefill-depth", 2, "--prefill-depth", "0.67", "--text", text, "--output", output, "--tokens", 4000)
    result = pop("calibrate", chat_folder, *options, "--json", "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    provenance = json.loads(result.stdout)
    assert provenance["depths"].keys() == {"2", "4"} and provenance["text"] == ["text.txt"]
    generate = ("generate", chat_folder, "--prompt", "A prompt that is long enough to be cut", "--json", "--no-chat",
                "--dtype", "float32", "--max-new-tokens", 12)  # fmt: skip
    runs = [
        json.loads(pop(*generate, "--prefill-depth", depth, *more).stdout)["tokens"]
        for depth, more in ((2, ()), (2, ("--calibration", output)), (6, ("--calibration", output)), (6, ()))
    ]
    assert runs[0] != runs[1] and runs[2] == runs[3]
    assert "made for 2, 4" in pop(*generate, "--prefill-depth", 3, "--calibration", output).stderr


def test_command_without_text(chat_folder, tmp_path, monkeypatch):
    """Python's help and the model's own samples, sampled once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    output = tmp_path / "c.safetensors"
    options = ("calibrate", chat_folder, "--prefill-depth", 3, "--tokens", 3000, "--output", output, "--json")
    first = pop(*options)
    assert first.exit_code == 0, first.stderr
    data, (cached,) = output.read_bytes(), (tmp_path / "cache" / "pop_ext").iterdir()
    written = cached.stat().st_mtime_ns
    time.sleep(0.01)
    second = pop(*options)
    assert second.exit_code == 0 and cached.stat().st_mtime_ns == written
    tensors = [
        calibration_files.Calibration.load(path, pop_ext.load(chat_folder).spec, torch.float32) for path in (output,)
    ]
    assert tensors[0].depths == [3] and len(output.read_bytes()) == pytest.approx(len(data), abs=64)


def test_default_text(chat_folder, tmp_path, monkeypatch):
    """A tenth Python's help, from all over it, then samples, every other one with its punctuation set apart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = pop_ext.load(chat_folder, dtype=torch.float32)
    model.fingerprint = lambda: "of this test"
    found = texts.default_text(model, 12_000)
    samples = texts.sampled_texts(model, 12_000 - 2 * texts.PIECE)
    assert sum(len(texts.encode(model.tokenizer, sample)[1]) for sample in samples) > 5000
    parts = "\n\n".join(texts.set_apart(sample) if i % 2 else sample for i, sample in enumerate(samples))
    assert found.endswith("\n\n" + parts)
    pieces = found.removesuffix(parts)
    assert len(texts.encode(model.tokenizer, pieces)[1]) == pytest.approx(2 * texts.PIECE, rel=0.1)
    assert texts.set_apart('Hm: "It isn\'t, is it?"  (No.)\nx') == 'Hm : " It isn \'t , is it ? " ( No . ) \nx'


def test_boundary_and_anchor_reach_calibration(chat_folder, tmp_path, monkeypatch):
    source, output = tmp_path / "text.txt", tmp_path / "c.safetensors"
    source.write_text("".join(f"Line {i} of a text with {i * i} words, more or less. " for i in range(300)))
    seen = []
    monkeypatch.setattr(refinement, "refine", lambda model, *_, **__: seen.append(model.boundary_tokens))
    options = (
        "calibrate",
        chat_folder,
        "--prefill-depth",
        3,
        "--text",
        source,
        "--output",
        output,
        "--json",
        "--rank",
        0,
    )
    files = []
    for anchors in (0, 1, 5):
        result = pop(*options, "--boundary-tokens", 3, "--anchor-tokens", anchors, "--refine", 1, "--dtype", "float32")
        assert result.exit_code == 0, result.stderr
        provenance = json.loads(result.stdout)
        assert provenance["anchor_tokens"] == anchors and provenance["boundary_tokens"] == 3
        files.append(calibration_files.Calibration.load(output, pop_ext.load(chat_folder).spec, torch.float32).at(3)[0])
    assert seen == [3, 3, 3]
    # anchors are left out of the fit
    assert not torch.equal(files[0], files[1]) and not torch.equal(files[1], files[2])
    failed = pop(*options, "--anchor-tokens", -1)
    assert failed.exit_code == 1 and "--anchor-tokens is -1" in failed.stderr


def test_progress_is_for_terminals(chat_folder, tmp_path):
    """A bar with the held-out KL where standard error is a terminal, nothing where it is a pipe."""
    source = tmp_path / "text.txt"
    source.write_text("".join(f"Line {i} of a text with {i * i} words, more or less. " for i in range(300)))
    command = [
        sys.executable, "-m", "pop_ext.cli", "calibrate", str(chat_folder), "--prefill-depth", "4", "--refine", "2",
        "--text", str(source), "--output", str(tmp_path / "c"), "--json",
    ]  # fmt: skip
    piped = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert piped.returncode == 0 and piped.stderr == "" and json.loads(piped.stdout)["depths"]["4"]["refined"]
    terminal, end = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, text=True, env=environment) as process:
        os.close(end)
        shown = b""
        while True:
            try:
                shown += (data := os.read(terminal, 65536))
            except OSError:  # what Linux says at the end of a terminal
                break
            if not data:
                break
        assert json.loads(process.stdout.read())["depths"]["4"]["refined"]
    os.close(terminal)
    assert process.returncode == 0
    for part in ("calibrating", "refining depth 4, held-out KL", "100%"):
        assert part in shown.decode()


def test_command_refuses(chat_folder, tiny_llama, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text("short")
    options = ("--text", text, "--output", output)
    for arguments, message in (
        ((chat_folder, "--prefill-depth", 3), "tokens, expected at least"),
        ((chat_folder, "--prefill-depth", 0), "--prefill-depth is 0"),
        ((tiny_llama, "--prefill-depth", 3), "no tokenizer"),
    ):
        failed = pop("calibrate", *arguments, *options)
        assert failed.exit_code == 1 and message in failed.stderr, failed.stderr
    text.write_text("A line of text, again and again. " * 200)
    failed = pop("calibrate", chat_folder, "--prefill-depth", 6, *options)
    assert failed.exit_code == 1 and "--prefill-depth is 6, expected 1 to 5" in failed.stderr
    text.write_bytes(b"\xff\xfe\xff" * 1000)
    assert "not UTF-8" in pop("calibrate", chat_folder, "--prefill-depth", 3, *options).stderr
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_a_failure_leaves_the_file_that_was_there(chat_folder, tmp_path, monkeypatch):
    text, output = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text("A line of text, again and again. " * 200)
    output.write_bytes(b"of before")

    def full_disk(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(calibration_files, "save_file", full_disk)
    failed = pop("calibrate", chat_folder, "--prefill-depth", 3, "--text", text, "--output", output)
    assert failed.exit_code == 1 and "No space left" in failed.stderr
    assert output.read_bytes() == b"of before"
    assert {file.name for file in tmp_path.iterdir()} == {"text.txt", "c.safetensors"}


def test_commands_refuse_a_file_that_is_cut_off(chat_folder, tmp_path):
    text, output = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text("A line of text, again and again. " * 200)
    calibration.calibrate(pop_ext.load(chat_folder), random_windows(4, 50), [3]).save(output)
    data = output.read_bytes()
    depth = ("--prefill-depth", 3, "--calibration", output)
    commands = (
        ("generate", chat_folder, "--prompt", "Hello", *depth),
        ("evaluate", chat_folder, "--text", text, "--prompts", 2, "--prompt-tokens", 40, *depth),
    )
    for size in (0, 100, len(data) - 1):
        output.write_bytes(data[:size])
        for command in commands:
            failed = pop(*command)
            assert failed.exit_code == 1 and failed.stdout == "" and failed.stderr.startswith("pop: ")
            assert str(output) in failed.stderr and failed.stderr.count("\n") == 1
