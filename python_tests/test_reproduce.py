"""`pop reproduce`: its methods and figures against the references, tasks in files, and the command."""

from __future__ import annotations

import json
import mmap
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_damped_llama, normwise, pop, run_in_terminal, transformers_model
from reference_pop import ReferencePOP

import pop_ext
from pop_ext.analysis import benchmarks, reproduction, uses
from pop_ext.analysis.benchmarks import Chosen, Continued, Task, Worked, final_number
from pop_ext.runtime.device import peak_memory, reset_peak_memory

LAYERS, DEPTHS = 10, [7, 5]


def nothing(*_) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_damped_llama(
        tmp_path_factory.mktemp("reproduce") / "tiny", 4, 0.3, hidden_size=64, intermediate_size=96,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(folder):
    return pop_ext.load(folder, dtype="float32", max_cache_tokens=8192)


@pytest.fixture(scope="module")
def calibration(model):
    return pop_ext.calibrate(model, DEPTHS, [uses.prose(30_000)], tokens=8_000)


@pytest.fixture(scope="module")
def calibrated(calibration, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    calibration.save(path)
    return path


@pytest.fixture(scope="module")
def runs(model, calibration):
    return reproduction.runs_of(model, calibration, DEPTHS, uses.use_pairs("prose", model, 2, 64, 0)[0])


@pytest.fixture(scope="module")
def window():
    return torch.randint(258, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def logits_of(run, window):
    return run.model.logits([window[:50]], [window[50:]], prefill_depth=run.depth)[0]


def test_methods(runs, folder, model, calibrated, window):
    """Each is what it is called: against the reference, or `load`'s model of the same settings."""
    peer, full = transformers_model(folder), logits_of(runs[0], window)
    order = [(run.method, run.prefill_depth) for run in runs]
    assert order == [("full", LAYERS), *((m, d) for m in list(reproduction.METHODS)[1:] for d in DEPTHS)]
    found = {(run.method, run.prefill_depth): logits_of(run, window) for run in runs}
    for depth in DEPTHS:
        for method, boundary in (("pop_paper", 1), ("no_boundary", 0)):
            expected = ReferencePOP(peer, depth, boundary, 0).logits(window[:50], window[50:])
            assert normwise(found[method, depth], expected) < 1e-5
        best = pop_ext.load(folder, dtype="float32", calibration=calibrated, prefill_depth=depth)
        assert normwise(found["pop_calibrated", depth], best.logits([window[:50]], [window[50:]])[0]) < 1e-5
    for run in runs[1:]:
        assert normwise(found[run.method, run.prefill_depth], full) > 1e-4
        assert run.model.spec.num_layers == (run.prefill_depth if run.method == "shortgpt" else LAYERS)
    assert (model.calibration, model.boundary_tokens, model.anchor_tokens) == (None, 1, 1)


@pytest.mark.parametrize("skipped, depths", [([20, 25, 33, 40, 50], [24, 23, 20, 18, 15]), ([50, 50], [15])])
def test_depths(skipped, depths):
    assert reproduction.depths_of(skipped, 30) == depths


@dataclass
class Fixed:
    """An item whose score hangs on the method alone."""

    values: dict

    def score(self, model, depth: int) -> float:
        return self.values[depth]


def test_differences_are_paired(model):
    """Items that differ much from one another, methods that differ by as much on each: the interval is narrow."""
    items = [Fixed({LAYERS: x, 5: x - 0.25, 7: x}) for x in np.linspace(0.25, 1, 16).tolist()]
    methods = [reproduction.Run("full" if d == LAYERS else "pop_paper", d, model, d) for d in (LAYERS, 5, 7)]
    full, less, same = reproduction.scores(methods, Task("t", "right", items), 0, nothing)
    assert full.score == same.score == pytest.approx(0.625) and full.difference == 0
    assert less.score == pytest.approx(0.375) and less.difference_ci95 == pytest.approx((-0.25, -0.25))
    assert same.difference_ci95 == (0, 0)


def test_scores_of_items(model, folder, window):
    """Against transformers at full depth."""
    prompt, rest = window[:50], window[50:]
    peer = transformers_model(folder)
    with torch.no_grad():
        greedy = peer(torch.tensor([prompt])).logits[0, -1].argmax().item()
        second = peer(torch.tensor([[*prompt, greedy]])).logits[0, -1].argmax().item()
    right, half = [greedy, second], [greedy, (second + 1) % 258]
    for continuation, share, whole in ((right, 1, 1), (half, 0.5, 0)):
        assert Continued(prompt, continuation, False).score(model, LAYERS) == share
        assert Continued(prompt, continuation, True).score(model, LAYERS) == whole
    choices, characters = [rest[:2], rest[2:7], rest[7:8]], [2, 500, 1]  # by their sums alone the second is the last
    rates = []
    for choice, count in zip(choices, characters, strict=True):
        with torch.no_grad():
            log_p = peer(torch.tensor([prompt + choice])).logits[0, 49:-1].log_softmax(-1)
        rates.append(float(log_p.gather(1, torch.tensor(choice)[:, None]).sum()) / count)
    best = rates.index(max(rates))
    found = [Chosen(prompt, choices, characters, answer).score(model, LAYERS) for answer in range(3)]
    assert found == [float(answer == best) for answer in range(3)]


def test_a_worked_answer_ends_at_the_next_question():
    seen = {}
    for text, right in (("2 * 3 = 6. #### 1,206", "1206"), ("2 * 3 = 6.", "6")):
        output = SimpleNamespace(text=[f"{text}\n\nQuestion: What is 5?"])
        model = SimpleNamespace(generate=lambda _, output=output, **settings: seen.update(settings) or output)
        assert [a for a in ("1206", "5", "6") if Worked([1], a, 9).score(model, 3)] == [right]
    assert (seen["prefill_depth"], seen["max_new_tokens"], seen["do_sample"]) == (3, 9, False)


@pytest.mark.parametrize(
    "text, number",
    [("so 3 and 4.", "4"), ("#### -1,234", "-1234"), ("it is $5.00.", "5"), ("#### 7 of 9", "7"), ("2.50", "2.50"),
     ("10 apples", "10"), ("none", None), ("#### $18", "18")],
)  # fmt: skip
def test_final_number(text, number):
    assert final_number(text) == number


@torch.no_grad()
def test_drift(runs, folder, window):
    """Of the paper's POP, against transformers' hidden states and values."""
    some = [run for run in runs if run.method == "full" or run.prefill_depth == 5]
    paper, best = reproduction.drift(some, [window[:50]], [window[50:54]], nothing)
    assert (paper["method"], best["method"]) == ("pop_paper", "pop_calibrated")
    peer = transformers_model(folder)
    states = peer(torch.tensor([window[:50]]), output_hidden_states=True).hidden_states
    for layer in range(LAYERS):
        norm, project = peer.model.layers[layer].input_layernorm, peer.model.layers[layer].self_attn.v_proj
        own, true = (states[i][0, 1:-1] for i in (min(layer, 5), layer))
        for name, pair in (
            ("prompt_hidden", (own, true)),
            ("prompt_values", (project(norm(own)), project(norm(true)))),
        ):
            expected = float((1 - torch.cosine_similarity(*pair, dim=-1)).mean())
            assert paper[name][layer] == pytest.approx(expected, abs=1e-5)
        assert (paper["answer_attention"][layer] > 1e-4) == (layer > 5)
        assert (paper["answer_hidden"][layer] > 1e-6) == (layer > 6)  # what came of attention in layer 6
    assert max(best["prompt_values"]) < max(paper["prompt_values"])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory():
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    torch.frombuffer(mmap.mmap(-1, 64 << 20), dtype=torch.uint8).fill_(1)  # pages that the process did not have before
    assert peak_memory(device) - before > 60 << 20
    reset_peak_memory(device)
    assert peak_memory(device) - before < 32 << 20


# Tasks in files


def lines(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


QUESTION = {"question": "What is cold?", "choices": ["fire", "ice"], "answer": 1}
PROBLEM = {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}


def test_multiple_choice(model, tmp_path):
    path = tmp_path / "easy.jsonl"
    lines(path, *(QUESTION | {"answer": answer} for answer in (1, "B", "ice", 0, 1)))
    task = benchmarks.choice_task(path, model, 4)
    assert task.name == "easy" and [item.answer for item in task.items] == [1, 1, 1, 0]
    item = task.items[0]
    assert model.tokenizer.decode(item.prompt) == "Question: What is cold?\nAnswer:"
    assert list(map(model.tokenizer.decode, item.choices)) == [" fire", " ice"] and item.characters == [4, 3]


def test_gsm8k(model, tmp_path):
    path = tmp_path / "gsm.jsonl"
    lines(path, *(PROBLEM | {"question": f"Number {i}?"} for i in range(9)))
    task = benchmarks.gsm8k_task(path, model, 3, 20)
    assert [item.answer for item in task.items] == ["4"] * 3
    texts = [model.tokenizer.decode(item.prompt) for item in task.items]
    assert all(text.count("####") == 5 and text.startswith("Question: Number 0?\nAnswer: 2 + 2 =") for text in texts)
    assert [text.split("\n\n")[-1] for text in texts] == [f"Question: Number {i}?\nAnswer:" for i in (5, 6, 7)]


@pytest.mark.parametrize(
    "option, rows, message",
    [
        ("--multiple-choice", [QUESTION, 3], "line 2: 3, expected an object"),
        ("--multiple-choice", [QUESTION | {"choices": ["one"]}], "line 1: {'question': 'What is cold?'"),
        ("--multiple-choice", [QUESTION | {"answer": 2}], "line 1: answer is 2, expected one of the choices"),
        ("--multiple-choice", [QUESTION | {"answer": "C"}], "line 1: answer is 'C', expected one of the choices"),
        ("--multiple-choice", [QUESTION | {"question": "?" * 3000}], "expected at most 2048, the model's context"),
        ("--multiple-choice", [], "no questions, expected at least one"),
        ("--gsm8k", [PROBLEM] * 5, "no questions, expected at least one (of GSM8K after the first 5)"),
        ("--gsm8k", [PROBLEM, {"question": "?", "answer": "4"}], "line 2: {'question': '?', 'answer': '4'}, expected"),
        ("--tasks", ["poetry"], "--tasks is poetry, expected some of chat, prose,"),
        ("--skipped", [0], "--skipped is 0 per cent, expected a share that leaves 1 to 9 of 10 layers"),
        ("--skipped", [97], "--skipped is 97 per cent, expected"),
        ("--markdown", ["/no/such/folder/file"], "expected a file name in a folder that exists"),
    ],
    ids=str,
)
def test_refusals_before_any_weights(folder, tmp_path, monkeypatch, option, rows, message):
    monkeypatch.setattr(pop_ext, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    in_file = option in ("--multiple-choice", "--gsm8k")
    value = lines(tmp_path / "file.jsonl", *rows) if in_file else str(rows[0])
    result = pop("reproduce", folder, "--quick", option, value)
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_calibration_of_other_depths(folder, calibrated):
    result = pop("reproduce", folder, "--calibration", calibrated, "--skipped", 60, "--skipped", 50)
    assert "--calibration is made for 5, 7 layers, expected also 4, which --skipped asks for" in result.stderr


# The command


def options(folder, calibrated) -> list:
    return ["reproduce", folder, "--quick", "--dtype", "float32", "--calibration", calibrated, "--skipped", 50]


def test_command(folder, calibrated, tmp_path):
    files = ["--multiple-choice", lines(tmp_path / "easy.jsonl", *[QUESTION] * 3), "--gsm8k",
             lines(tmp_path / "gsm8k.jsonl", *[PROBLEM] * 7)]  # fmt: skip
    result = pop(
        *options(folder, calibrated), "--tasks", "retrieval", *files, "--json", "--markdown", tmp_path / "t.md"
    )
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    found = json.loads(result.stdout)
    assert (found["layers"], found["prefill_depths"]) == (LAYERS, [5])
    assert [(task["name"], task["items"]) for task in found["tasks"]] == [("retrieval", 4), ("easy", 3), ("gsm8k", 2)]
    assert (
        [row["method"] for row in found["tasks"][0]["scores"]] == list(reproduction.METHODS) == list(found["methods"])
    )
    speeds = [(row["method"], row["batch"]) for row in found["speed"]]
    assert speeds == [(method, batch) for batch in (1, 8) for method in reproduction.TIMED]
    assert all(row["prefill_seconds"] > 0 and row["peak_bytes"] > 1e7 for row in found["speed"])
    assert [row["speedup"] for row in found["speed"] if row["method"] == "full"] == [1, 1]
    assert [(row["method"], len(row["answer_attention"])) for row in found["drift"]] == [
        ("pop_paper", LAYERS), ("pop_calibrated", LAYERS)
    ]  # fmt: skip
    text = (tmp_path / "t.md").read_text()
    (easy,) = (task for task in found["tasks"] if task["name"] == "easy")
    paper = next(row for row in easy["scores"] if row["method"] == "pop_paper")
    assert f"| POP, paper | {100 * paper['score']:.1f}±0.0 |" in text.split("easy: choices right")[1]
    assert text.count("\n| --- |") == 3 + 1 + 2 and "- no boundary: ablation: " in text


def test_a_terminal_of_80_columns(folder, calibrated):
    command = [*options(folder, calibrated), "--tasks", "none"]
    status, shown = run_in_terminal([sys.executable, "-m", "pop_ext.cli", *map(str, command)], 80)
    printed = [line.split("\r")[-1] for line in shown.split("\n")]
    assert status == 0 and max(map(len, printed)) <= 80
    assert "reproducing: speed" in shown and re.search(r"POP, paper, 5/10, batch 8 +\d\.\d{3} +\d+\.\d\d", shown)
    assert "…" not in shown.split("cosine distance")[1]


def test_nothing_is_written_where_it_fails(folder, calibrated, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no figures")

    monkeypatch.setattr(reproduction, "drift", fail)
    arguments = (*options(folder, calibrated), "--tasks", "none", "--markdown", tmp_path / "t.md")
    result = pop(*arguments)
    assert result.exit_code == 1 and "no figures" in result.stderr and not list(tmp_path.iterdir())
    assert result.stdout == ""
