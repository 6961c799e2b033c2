"""Tuning: how data is split, which depth is chosen, how a run goes on, chats as data."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import make_chat_folder, make_tokenizer, pop

import pop_ext
from pop_ext.analysis import calibration as calibrations
from pop_ext.analysis import evaluation, normal_equations, tune
from pop_ext.analysis.data import Data, Encoder
from pop_ext.analysis.evaluation import Fidelity
from pop_ext.checkpoints.calibration import Calibration, default_depth

TEXT = " ".join(f"Line {i} says {i * i}." for i in range(1200))
SIZES = {"tokens": 3000, "prompts": 8, "prompt_tokens": 100, "continuation_tokens": 12}
RUN = {**SIZES, "verify": False}


def chat(i: int) -> list[dict]:
    return [
        {"role": "user", "content": f"What is {i} and {i}? " * 3},
        {"role": "assistant", "content": f"It is {2 * i}."},
    ]


@pytest.fixture(scope="module")
def folder(tiny_llama, tmp_path_factory):
    return make_chat_folder(tiny_llama, tmp_path_factory)


@pytest.fixture
def model(folder):
    return pop_ext.load(folder, dtype="float32")


def row(depth: int, method: str, kl: float, high: float, top1: float = 0.9, speedup: float = 1.0) -> Fidelity:
    return Fidelity(
        method, depth, 1.0, kl, (kl, high), top1, (top1 - 0.05, top1 + 0.05), kl, 1.0, speedup, (speedup, speedup), 0.0
    )


def test_the_depth_that_is_chosen():
    """The shallowest within the limit at the end of its interval; for a speed-up, the deepest that has it."""
    rows = [row(6, "full", 0, 0, 1.0)]
    for depth, kl, high, top1, speedup in (
        (2, 0.2, 0.3, 0.7, 2.0),
        (3, 0.04, 0.06, 0.8, 1.6),
        (4, 0.03, 0.05, 0.9, 1.3),
    ):
        rows += [row(depth, "pop_uncalibrated", 0.001, 0.002), row(depth, "pop_calibrated", kl, high, top1, speedup)]
    for goal, depth in (
        ({}, 4), ({"max_kl": 0.06}, 3), ({"max_kl": 0.3}, 2), ({"max_kl": 0.02}, None), ({"min_top1": 0.75}, 3),
        ({"min_top1": 0.9}, None), ({"speedup": 1.4}, 3), ({"speedup": 2.5}, None),
    ):  # fmt: skip
        assert tune.Goal.of(**goal).choose(rows) == depth, goal
    for goal, message in (
        ({"max_kl": 0}, "max_kl is 0, expected more than 0"), ({"min_top1": 1.1}, "min_top1 is 1.1, .* at most 1"),
        ({"speedup": 1.0}, "speedup is 1.0"), ({"max_kl": math.nan}, "max_kl is nan"), ({"max_kl": math.inf}, "is inf"),
        ({"max_kl": 1, "speedup": 2}, "max_kl and speedup are given"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tune.Goal.of(**goal)


def test_candidates():
    assert tune.candidates(30) == [12, 15, 18, 20, 23, 26]
    for layers in range(2, 90):
        found = tune.candidates(layers)
        assert found and found[0] >= 1 and found[-1] <= max(1, layers - 2) and found == sorted(set(found))


def test_what_is_held_out_is_not_calibrated_on(folder):
    """Of text the last quarter; of chats every fourth."""
    encoder = Encoder(folder)
    fit, held_out = Data(TEXT).split(encoder, 10**6, 8, 100, 12)
    tokens = make_tokenizer()(TEXT).input_ids
    used = [token for window in fit.prompts for token in window]
    assert used == tokens[: len(used)] and len(used) <= len(tokens) * 3 // 4
    ends = "".join(map(chr, tokens[len(tokens) - len(tokens) // 4 :]))
    assert len(held_out) == 8 and {len(p) for p in held_out.prompts} == {100}
    assert all("".join(map(chr, window)) in ends for window in held_out.windows)
    short, _ = Data(TEXT).split(encoder, 2000, 8, 100, 12)
    assert sum(map(len, short.prompts)) <= 2000
    fit, held_out = Data.of(None, [chat(i) for i in range(40)]).split(encoder, 10**6, 8, 0, 5)
    texts = [encoder.tokenizer.decode(p) for p in held_out.prompts]
    assert len(fit) == 30 and len(held_out) == 8 and all(len(c) <= 5 for c in held_out.continuations)
    assert not {text for text in texts} & {encoder.tokenizer.decode(p) for p in fit.prompts}
    assert f"What is {3} and 3?" in texts[0] and "What is 7 and 7?" in texts[1]


def test_chats_are_drawn_by_the_template_once(folder):
    """A pair is what the template makes of the whole chat, without what it puts after an answer's end."""
    encoder = Encoder(folder)
    pairs = Data.of(None, [chat(3), {"messages": chat(4)}, {"prompt": "Once", "continuation": " upon"}]).pairs(
        encoder, 3, 0, 99
    )
    whole = encoder.tokenizer.apply_chat_template(chat(3), tokenize=False)
    assert encoder.tokenizer.decode(pairs.windows[0]) == whole.rstrip("\n")
    assert encoder.tokenizer.decode(pairs.continuations[0]) == "It is 6.<|end|>"
    assert pairs.windows[0].count(256) == whole.count("<|start|>") == 3
    assert encoder.tokenizer.decode(pairs.continuations[2]) == " upon"
    for bad, message in (
        ([], "chats is empty"), ([[{"role": "user", "content": "a"}]], r"chats\[0\]: the last message is"),
        ([chat(1), 3], r"chats\[1\]: 3, expected an object with messages"), ([[chat(1)[1]]], "a question before"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            Data.of(None, bad)
    with pytest.raises(ValueError, match="texts and chats: expected one of them"):
        Data.of(None, None)


def test_bos_is_not_doubled(folder):
    """A template that writes the beginning of a sequence itself."""
    encoder = Encoder(folder)
    encoder.tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    encoder.tokenizer.chat_template = "{{ bos_token }}" + encoder.tokenizer.chat_template.replace("<|start|>", "")
    (window,) = Data.of(None, [chat(1)]).pairs(encoder, 1, 0, 99).windows
    assert window.count(256) == 1 and window[0] == 256


def test_figures_are_those_of_evaluate(model, tmp_path):
    """And the file holds the candidates, each as it is when calibrated alone, and the recommendation."""
    path = tmp_path / "t.safetensors"
    result = pop_ext.tune(model, [TEXT], depths=[2, 4], max_kl=100, output=path, **RUN)
    assert result.recommended == 2 == default_depth(path) and model.calibration is None
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    fit, held_out = Data(TEXT).split(model, *SIZES.values())
    alone = calibrations.calibrate(model, fit.windows, [4])
    loaded = Calibration.load(path, model.spec, torch.float32)
    assert loaded.depths == [2, 4] and loaded.recommended == 2 and torch.equal(loaded.at(4)[0], alone.at(4)[0])
    assert "2 (recommended), 4" in repr(loaded)
    calibrated = pop_ext.load(model.folder, dtype="float32", calibration=path)
    assert calibrated.resolve_prefill_depth() == 2
    rows = evaluation.evaluate(calibrated, held_out.prompts, held_out.continuations, [2, 4], tune.METHODS)
    for found, expected in zip(result.rows, rows, strict=True):
        assert (found.method, found.prefill_depth) == (expected.method, expected.prefill_depth)
        for name in ("kl", "kl_ci95", "top1_agreement", "perplexity"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-4), name
    assert result.row(4).speedup > 0 and math.isnan(result.row(4, "pop_uncalibrated").speedup)
    strict = replace(result, goal=tune.Goal("max_kl", 1e-9))
    strict.calibration.provenance["recommended"] = None
    assert "No candidate reaches a KL of at most 1e-09" in strict.sentences()[0]
    strict.calibration.save(path)
    with pytest.raises(pop_ext.CalibrationError, match=r"holds several and recommends none: expected one of 2, 4"):
        pop_ext.load(model.folder, calibration=path)


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["evaluating", "timing"])
def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch, where):
    """It computes no prompt twice and ends with the same figures; a run of other data or options starts anew."""
    once = pop_ext.tune(model, [TEXT], depths=[3], **RUN)
    path, scored = tmp_path / "t.safetensors", []
    score, calibrate = evaluation.score, calibrations.calibrate
    monkeypatch.setattr(evaluation, "score", lambda *a: scored.append(a[1]) or score(*a))
    monkeypatch.setattr(calibrations, "calibrate", lambda *a, **k: scored.append("calibrate") or calibrate(*a, **k))

    def stop(done, total, note=""):
        if note.startswith(where) and (where == "timing" or scored.count("calibrate") + 3 == len(scored)):
            raise Stop

    def again(text=TEXT, depths=(3,), **settings):
        return pop_ext.tune(model, [text], depths=depths, output=path, **(RUN | settings))

    with pytest.raises(Stop):
        again(progress=stop)
    work = tmp_path / "t.safetensors.tuning"
    assert work.exists() and not path.exists()
    state = work.read_bytes()
    result = again()
    assert result.continued and scored.count("calibrate") == 1 and len(scored) == 1 + 8
    assert len({tuple(prompt) for prompt in scored[1:]}) == 8
    assert [row.kl for row in result.rows] == [row.kl for row in once.rows] and not work.exists() and path.exists()
    for change in ({"text": TEXT[1:]}, {"depths": (2, 3)}, {"rank": 3}, {"prompts": 9}):
        work.write_bytes(state)
        scored.clear()
        assert not again(**change).continued and scored[0] == "calibrate"
    work.write_bytes(state[: len(state) // 2])
    assert not again().continued


def test_an_interrupted_pass_goes_on(model, tmp_path, monkeypatch, caplog):
    """No window of the calibration is run twice, and the calibration is the same; of another run nothing is taken."""
    monkeypatch.setattr(calibrations, "BATCH", 1)
    monkeypatch.setattr(normal_equations, "SAVE_SECONDS", 0)
    monkeypatch.setattr(normal_equations, "SAVE_SHARE", math.inf)
    once = pop_ext.tune(model, [TEXT], depths=[2, 4], **RUN)
    path, ran, run = tmp_path / "t.safetensors", [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *a: ran.append(a[0]) or run(*a))
    windows = once.calibration.provenance["windows"]

    def stop_after(count):
        def stop(done, total, note=""):
            if note.startswith("calibrating") and done == count:
                raise Stop

        return stop

    def tune_to(path, depths=(2, 4), **settings):
        return pop_ext.tune(model, [TEXT], depths=depths, output=path, **RUN, **settings)

    for count in (2, windows - 1, windows):  # the last is held out, and what was summed up before it stays
        with pytest.raises(Stop):
            tune_to(path, progress=stop_after(count))
    assert len(ran) == windows
    work = tmp_path / "t.safetensors.tuning"
    state = work.read_bytes()
    result = tune_to(path)
    assert result.continued and len(ran) == windows and not work.exists()
    for depth in (2, 4):
        for found, expected in zip(result.calibration.at(depth), once.calibration.at(depth), strict=True):
            assert torch.equal(found, expected)
    for spoilt, settings in ((state, {"depths": (2, 3)}), (state, {"seed": 1}), (state[:-9], {})):
        ran.clear()
        work.write_bytes(spoilt)
        assert not tune_to(path, **settings).continued and len(ran) == windows
    monkeypatch.setattr(normal_equations, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    tune_to(path)
    assert caplog.text.count("cannot be written, so an interrupted run would begin anew: the disk is full") == 1


def test_progress_grows_to_its_total(model):
    seen = []
    result = pop_ext.tune(model, [TEXT], depths=[3], max_kl=99, progress=lambda *report: seen.append(report), **SIZES)
    done, totals, notes = zip(*seen, strict=True)
    assert list(done) == sorted(done) and set(totals) == {done[-1]}
    for part in ("calibrating", "solving", "evaluating", "timing", "verifying copying"):
        assert any(note.startswith(part) for note in notes), part
    tuned = copy.copy(model)
    tuned.calibration = result.calibration
    alone = pop_ext.verify(tuned, prefill_depth=3, prompts=tune.VERIFIED)
    assert result.verification.sentences() == alone.sentences() == result.sentences()[-len(alone.sentences()) :]
    nothing = pop_ext.tune(model, [TEXT], depths=[3], max_kl=1e-9, **SIZES)
    assert nothing.recommended is None and nothing.verification is None


def test_command_on_chats(folder, tmp_path):
    """tune, calibrate, evaluate and importance take chats."""
    source, output = tmp_path / "chats.jsonl", tmp_path / "c.safetensors"
    source.write_text("".join(json.dumps({"messages": chat(i)}) + "\n" for i in range(36)))
    options = ("--chats", source, "--json")
    result = pop("tune", folder, *options, "--output", output, "--max-kl", 99, "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["recommended"] == found["verification"]["prefill_depth"] == 2 and found["prompts"] == 9
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert found["rows"][1]["speedup"] is None and found["rows"][2]["speedup"] > 0
    for command in (
        ("evaluate", folder, *options, "--calibration", output, "--prompts", 4),
        ("calibrate", folder, *options, "--prefill-depth", 3, "--output", output),
        ("importance", folder, *options, "--prompts", 2, "--draws", 1),
    ):
        result = pop(*command)
        assert result.exit_code == 0, result.stderr
        json.loads(result.stdout)
    short = tmp_path / "short.jsonl"
    short.write_text(source.read_text().split("\n")[0])
    assert "has 1 chats, expected at least 32" in pop("tune", folder, "--chats", short, "--output", output).stderr
