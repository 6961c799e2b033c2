"""The `pop` command: what it prints where, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import make_chat_folder, pop

import pop_ext
from pop_ext.analysis import importance
from pop_ext.cli.common import with_options
from pop_ext.runtime import device
from pop_ext.runtime.prefill_depth import parse_depth


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return str(make_chat_folder(tiny_llama, tmp_path_factory))


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
        "calibration": None, "device": "auto", "deep_tokens": 0.0,
        "prefill_plan": None,
    }  # fmt: skip


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "evaluate", "importance", "verify"])
def test_paper(folder, tmp_path, monkeypatch, command):
    """Own weights, one boundary token, no anchor; options that say otherwise are refused by name, others are not."""
    text, stop, seen = tmp_path / "t.txt", RuntimeError("enough"), {}
    text.write_text("A line of text. " * 1300)
    options = {
        "generate": ("--prompt", "a", "--prefill-depth", 2),
        "evaluate": ("--text", text),
        "importance": ("--text", text),
        "verify": ("--prefill-depth", 2),
    }.get(command, ())

    def load(*arguments, **settings):
        seen.update(settings)
        raise stop

    monkeypatch.setattr(pop_ext, "load", load)
    monkeypatch.setattr(importance, "summarise", load)
    names = {"boundary_tokens": 1, "anchor_tokens": 0}
    if command != "importance":
        names |= {"deep_tokens": 0.0, "calibration": None}
    for more in ((), ("--anchor-tokens", 0, "--boundary-tokens", 1)):
        if more and command not in ("generate", "evaluate", "importance"):
            continue
        seen.clear()
        assert "enough" in pop(command, folder, *options, "--paper", *more).stderr
        assert {name: seen.get(name, "nothing") for name in names} == names
    conflicts = {"--anchor-tokens": "1", "--boundary-tokens": "0", "--deep-tokens": "0.5", "--calibration": str(text)}
    known = pop(command, "-h").stdout
    for option, value in conflicts.items():
        if option in known:
            seen.clear()
            result = pop(command, folder, *options, "--paper", option, value)
            assert result.exit_code and not seen and result.stderr.count("\n") == 1
            shown = "[0.5]" if (command, option) == ("evaluate", "--deep-tokens") else value
            assert f"{option} is {shown}, expected " in result.stderr and "with --paper" in result.stderr


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
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "a", "--prefill-depth", "many"), "--prefill-depth is 'many', expected a number of layers"),
        (("--prompt", "a", "--prefill-depth", "7"), "--prefill-depth is 7, expected 1 to 6"),
        (("--prompt", "a", "--prefill-depth", "1.5"), "--prefill-depth is 1.5, expected a share"),
        (("--prompt", "a", "--boundary-tokens", "-1"), "--boundary-tokens is -1"),
        (("--prompt", "a", "--boundary-tokens", "0", "--deep-tokens", "0.5"), "--deep-tokens is 0.5, expected 0 with"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens"),
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
    ):
        assert result.exit_code == 1 and message in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1 and result.stdout == ""
    for file in (tmp_path, tmp_path / "none"):
        result = pop("generate", folder, "--prompt-file", file)
        assert result.exit_code == 1 and f"--prompt-file is {file}: no such file" in result.stderr
    (tmp_path / "empty.txt").touch()
    result = pop("generate", folder, "--prompt-file", tmp_path / "empty.txt")
    assert result.exit_code == 1 and "empty.txt is empty" in result.stderr
    (tmp_path / "latin1.txt").write_bytes(b"Gr\xfc\xdfe")
    result = pop("generate", folder, "--prompt-file", tmp_path / "latin1.txt")
    assert result.exit_code == 1 and "is not UTF-8 text" in result.stderr
    (tmp_path / "model.gguf").write_bytes(b"GGUF, but not really")
    result = pop("convert", tmp_path / "model.gguf", tmp_path / "out")
    assert result.exit_code == 1 and result.stderr.startswith("pop: ") and result.stderr.count("\n") == 1


def test_traceback_on_request(folder, monkeypatch):
    monkeypatch.setenv("POP_TRACEBACK", "1")
    assert isinstance(pop("generate", folder, "--no-chat", "--prompt", "").exception, ValueError)


def test_version_and_short_help(capsys):
    shown = pop("--version")
    assert shown.exit_code == 0 and shown.stdout == f"pop {pop_ext.__version__}\n"
    for command in ((), *((name,) for name in ("calibrate", "evaluate", "generate", "importance", "info", "tune"))):
        shown = pop(*command, "-h")
        assert shown.exit_code == 0 and shown.stdout == pop(*command, "--help").stdout and "Usage" in shown.stdout
    assert "POP_TRACEBACK" in pop("-h").stdout


def test_messages_name_options():
    """As they are typed; a word that only looks like one, and a path, stay."""
    names = ["max_new_tokens", "top_p", "seed"]
    found = with_options("top_p is 2, in top_p.txt and /a/top_p: expected less than max_new_tokens", names)
    assert found == "--top-p is 2, in top_p.txt and /a/top_p: expected less than --max-new-tokens"
    assert with_options("seed is x, expected a seed", names) == "--seed is x, expected a seed"


def test_one_layer_warns(folder):
    result = pop("generate", folder, "--prompt", "a", "--prefill-depth", 1, "--max-new-tokens", 1)
    assert result.exit_code == 0 and "pop: --prefill-depth=1 is one layer of 6; all layers are 1.0\n" in result.stderr


def test_names_and_reprs(folder, tmp_path):
    assert {name for name in dir(pop_ext) if not name.startswith("__")} == set(pop_ext.__all__) - {"__version__"}
    model = pop_ext.load(folder, prefill_depth=4)
    for part in ("llama", "bfloat16 on cpu", "prefill depth 4 of 6", "own projections"):
        assert part in repr(model)
    output = model.generate("Hello", max_new_tokens=3)
    assert repr(output.text[0]) in repr(output) and "5 + 3" in repr(output)


@pytest.mark.parametrize("command", ["generate", "chat", "bench", "evaluate", "tune", "calibrate", "verify"])
def test_the_device_reaches_the_model(folder, tmp_path, monkeypatch, command):
    """And one that this machine lacks is refused by the option's name."""
    text = tmp_path / "t.txt"
    text.write_text("A line of text. " * 1300)
    options = {
        "generate": ("--prompt", "Hi", "--max-new-tokens", 1),
        "chat": (),
        "bench": ("--prompt-tokens", 8, "--decode-tokens", 1, "--rounds", 1),
        "evaluate": ("--text", text),
        "tune": ("--text", text, "--output", tmp_path / "c"),
        "calibrate": ("--text", text, "--output", tmp_path / "c", "--prefill-depth", 3),
        "verify": ("--prefill-depth", 3),
    }[command]
    load, seen = pop_ext.load, []
    monkeypatch.setattr(device, "why_no_cuda", lambda *_: "there is no GPU here")
    monkeypatch.setattr(pop_ext, "load", lambda *a, **k: seen.append(k["device"]) or load(*a, **k))
    result = pop(command, folder, *options, "--device", "cuda")
    assert "--device is 'cuda', but there is no GPU here" in result.stderr, result.stderr
    assert result.exit_code == (3 if command == "verify" else 1)
    assert seen == ["cuda"] and result.stderr.count("\n") == 1


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


def test_a_console_without_the_characters(folder):
    """What it cannot show becomes a replacement; nothing of the answer is lost."""
    sampled = {"do_sample": True, "temperature": 3.0, "top_k": 0, "seed": 1}
    wanted = expected(folder, "Hello", max_new_tokens=24, **sampled).text[0]
    assert not wanted.isascii(), "the test needs an answer that ASCII cannot show"
    command = [sys.executable, "-m", "pop_ext.cli", "generate", folder, "--prompt", "Hello", "--no-chat", *FLOAT32]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = ("--max-new-tokens", "24", "--temperature", "3.0", "--top-k", "0", "--seed", "1")
    done = subprocess.run([*command, *options], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").removesuffix("\n") == wanted.encode("ascii", "replace").decode()


def test_importing_waits_for_nothing():
    """Neither torch nor transformers is imported before a command needs it; afterwards torch.ops.pop is there."""
    code = (
        "import sys, pop_ext.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "assert {'load', 'calibrate', 'evaluate', 'suggest_depth', '__version__'} <= set(dir(pop_ext));"
        "import torch; torch.ops.pop.linear(torch.ones(1, 8), torch.ones(4, 8))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option, value", [("--top-p", "1.5"), ("--top-p", "-0.1"), ("--top-k", "-1")])
def test_values_outside_their_range(folder, option, value):
    result = pop("generate", folder, "--prompt", "a", option, value)
    assert result.exit_code == 2 and option in result.stderr and "Input should be" in result.stderr


def test_calibrate_prints_a_table(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} says {i * i}." for i in range(900)))
    common = ("calibrate", folder, "--text", text, "--prefill-depth", 3, "--tokens", 2048, *FLOAT32)
    shown = pop(*common, "--output", tmp_path / "a.safetensors")
    assert shown.exit_code == 0, shown.stderr
    assert "error before" in shown.stdout and "after" in shown.stdout
    output = pop("generate", folder, "--prompt", "a", "--calibration", tmp_path / "a.safetensors", *FLOAT32)
    assert output.exit_code == 0 and "prefill depth 3 of 6, calibrated projections" in output.stderr
    machine = pop(*common, "--output", tmp_path / "b.safetensors", "--json")
    assert machine.exit_code == 0 and "3" in json.loads(machine.stdout)["depths"]


def test_python_does_what_the_commands_do(folder, tmp_path):
    texts = [" ".join(f"Line {i} says {i * i}." for i in range(600))]
    model = pop_ext.load(folder, dtype="float32")
    calibration = pop_ext.calibrate(model, [3], texts, tokens=2048)
    calibration.save(tmp_path / "c.safetensors")
    calibrated = pop_ext.load(folder, dtype="float32", calibration=tmp_path / "c.safetensors")
    assert calibrated.resolve_prefill_depth() == 3  # the file's only depth
    sizes = {"prompts": 3, "prompt_tokens": 60, "continuation_tokens": 8}
    rows = pop_ext.evaluate(calibrated, texts, [3], **sizes)
    assert [row.method for row in rows] == ["full", "pop_uncalibrated", "pop_calibrated"]
    assert rows[0].kl == 0 < rows[2].kl
    depth, measured = pop_ext.suggest_depth(model, texts, max_kl=1e9, **sizes)
    assert depth == min(measured) == 1
    with pytest.raises(TypeError, match=r"texts is .* expected a list of strings"):
        pop_ext.evaluate(model, texts[0], [3])
    with pytest.raises(ValueError, match=r"prefill_depth is 3\.0, expected layers as an int \(3\)"):
        pop_ext.load(folder, prefill_depth=3.0)
    with pytest.warns(UserWarning, match=r"prefill_depth=1 is one layer of 6; all layers are 1\.0"):
        pop_ext.load(folder, prefill_depth=1)
    with pytest.raises(ValueError, match="dtype is 'int8', expected 'auto', 'bfloat16'"):
        pop_ext.load(folder, dtype="int8")
    with pytest.raises(TypeError):
        pop_ext.load(folder, 3)


def test_an_unwritable_cache_does_not_matter(folder, tmp_path, monkeypatch, caplog):
    from pop_ext.analysis import text

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = pop_ext.load(folder, dtype="float32")
    assert text.sampled_texts(model, 64) and "the sampled text is not cached" in caplog.text
