"""The `pop` command: what it prints where, and how it fails."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from test_generation import make_chat_folder
from typer.testing import CliRunner

import pop_ext
from pop_ext import cli
from pop_ext.runtime.prefill_depth import parse_depth


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return str(make_chat_folder(tiny_llama, tmp_path_factory))


def pop(*arguments, stdin: bytes | None = None):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)


FLOAT32 = ("--dtype", "float32")  # no ties between tokens


def expected(folder: str, prompt, **settings):
    return pop_ext.load(folder, dtype=torch.float32).generate(prompt, **settings)


def test_generate_streams_the_text(folder):
    result = pop("generate", folder, "--prompt", "Hello", "--max-new-tokens", 12, *FLOAT32)
    assert result.exit_code == 0, result.stderr
    chat = [{"role": "user", "content": "Hello"}]
    assert result.stdout == expected(folder, chat, max_new_tokens=12).text[0] + "\n"
    for part in ("prompt tokens", "truncated prefill", "projection", "boundary", "11 tokens decoded at"):
        assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_generate_json(folder):
    result = pop("generate", folder, "--prompt", "Hello", "--max-new-tokens", 12, "--no-chat", "--json", *FLOAT32)
    assert result.exit_code == 0, result.stderr
    output = json.loads(result.stdout)
    wanted = expected(folder, "Hello", max_new_tokens=12)
    assert output["tokens"] == wanted.tokens[0] and output["text"] == wanted.text[0]
    assert output["prompt_tokens"] == 5 and output["prefill_depth"] == 6
    assert output["times"].keys() >= {"truncated_prefill", "projection", "boundary", "decode", "time_to_first_token"}
    assert result.stderr == ""


def test_prompt_from_file_and_standard_input(folder, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("Grüße\n".encode())
    options = ("--max-new-tokens", 6, "--no-chat", "--json", *FLOAT32)
    from_file = pop("generate", folder, "--prompt-file", tmp_path / "prompt.txt", *options)
    from_stdin = pop("generate", folder, "--prompt-file", "-", *options, stdin="Grüße\r\n".encode())
    wanted = expected(folder, "Grüße", max_new_tokens=6).tokens[0]
    assert json.loads(from_file.stdout)["tokens"] == json.loads(from_stdin.stdout)["tokens"] == wanted


@pytest.mark.parametrize("text, depth", [("1", 1), ("1.0", 1.0), ("4", 4), ("0.5", 0.5), (" 3 ", 3), ("-2", -2)])
def test_prefill_depth_keeps_its_type(text, depth):
    parsed = parse_depth(text)
    assert parsed == depth and type(parsed) is type(depth)


def test_one_layer_is_not_all_layers(folder):
    prompt = "A prompt of some length, so that its depth matters to what comes next."
    tokens = {}
    for depth, value in (("1", 1), ("1.0", 1.0), ("6", 6)):
        result = pop(
            "generate", folder, "--prompt", prompt, "--no-chat", "--json", "--max-new-tokens", 24, "--prefill-depth",
            depth, *FLOAT32,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        tokens[depth] = json.loads(result.stdout)["tokens"]
        model = pop_ext.load(folder, prefill_depth=value, dtype=torch.float32)
        assert tokens[depth] == model.generate(prompt, max_new_tokens=24).tokens[0]
    assert tokens["1.0"] == tokens["6"] != tokens["1"]


def test_options_reach_the_model(folder, monkeypatch):
    seen = {}
    load = pop_ext.load
    monkeypatch.setattr(pop_ext, "load", lambda path, **options: seen.update(options) or load(path, **options))
    result = pop(
        "generate", folder, "--prompt", "a", "--prefill-depth", "0.5", "--boundary-tokens", 3, "--anchor-tokens", 0,
        "--max-cache-tokens", 640, "--dtype", "float32", "--max-new-tokens", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert seen == {
        "prefill_depth": 0.5, "boundary_tokens": 3, "anchor_tokens": 0, "max_cache_tokens": 640, "dtype": torch.float32,
        "calibration": None,
    }  # fmt: skip


def test_sampling(folder):
    options = ("--prompt", "a", "--no-chat", "--json", "--max-new-tokens", 16, *FLOAT32)

    def tokens(*more):
        return json.loads(pop("generate", folder, *options, *more).stdout)["tokens"]

    sampled = tokens("--temperature", 1.2, "--top-k", 0, "--seed", 3)
    wanted = expected(folder, "a", max_new_tokens=16, do_sample=True, temperature=1.2, top_k=0, seed=3)
    assert sampled == wanted.tokens[0] == tokens("--temperature", 1.2, "--top-k", 0, "--seed", 3)
    assert sampled != tokens("--temperature", 1.2, "--top-k", 0, "--seed", 4)
    assert tokens("--temperature", 0) == tokens() == tokens("--top-k", 1) == tokens("--top-p", 0.0001)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "either with --prompt TEXT or with --prompt-file FILE"),
        (("--prompt", "a", "--prompt-file", "b"), "either with --prompt TEXT or with --prompt-file FILE"),
        (("--prompt-file", "no-such-file"), "no-such-file"),
        (("--prompt", ""), "is empty"),
        (("--prompt", "a", "--prefill-depth", "many"), "--prefill-depth must be a number of layers"),
        (("--prompt", "a", "--prefill-depth", "7"), "prefill_depth"),
        (("--prompt", "a", "--prefill-depth", "1.5"), "prefill_depth"),
        (("--prompt", "a", "--boundary-tokens", "0"), "boundary_tokens"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--prompt", "a" * 100, "--max-cache-tokens", "64"), "cache is full"),
    ],
    ids=str,
)
def test_errors_are_one_line(folder, arguments, message):
    result = pop("generate", folder, "--no-chat", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr and result.stderr.startswith("pop: ")
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.output
    assert result.stdout.strip() == ""


def test_bad_folders_and_files(folder, tiny_llama, tmp_path):
    for result, message in (
        (pop("generate", tmp_path / "nothing-here", "--prompt", "a"), "nothing-here"),
        (pop("generate", tiny_llama, "--prompt", "a"), "no tokenizer"),
        (pop("convert", tmp_path / "model.gguf", tmp_path / "out"), "model.gguf is not a file"),
        (pop("generate", folder, "--prompt-file", tmp_path), "irectory"),
    ):
        assert result.exit_code == 1 and message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
    (tmp_path / "latin1.txt").write_bytes(b"Gr\xfc\xdfe")
    result = pop("generate", folder, "--prompt-file", tmp_path / "latin1.txt")
    assert result.exit_code == 1 and "is not UTF-8 text" in result.stderr
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but not really")
    result = pop("convert", tmp_path / "model.gguf", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.startswith("pop: ") and result.stderr.count("\n") == 1


def test_traceback_on_request(folder, monkeypatch):
    monkeypatch.setenv("POP_TRACEBACK", "1")
    assert isinstance(pop("generate", folder, "--no-chat", "--prompt", "").exception, ValueError)


def test_interrupt(folder, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pop_ext, "load", interrupt)
    result = pop("generate", folder, "--prompt", "a")
    assert result.exit_code == 130 and "Traceback" not in result.output


def test_info():
    shown = pop("info")
    assert shown.exit_code == 0, shown.stderr
    build = json.loads(pop("info", "--json").stdout)
    assert build and all(name.replace("_", " ") in shown.stdout for name in build)


def test_help_is_quick():
    """Help must not wait for transformers, which takes seconds to import."""
    code = (
        "import sys; from typer.testing import CliRunner; from pop_ext import cli;"
        "result = CliRunner().invoke(cli.app, ['--help']); assert result.exit_code == 0;"
        "assert 'generate' in result.stdout and 'convert' in result.stdout and 'info' in result.stdout;"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
