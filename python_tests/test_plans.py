"""The search for a prefill plan: its count of multiplications, what it finds on a model with branches that do nothing,
and the command.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, make_damped_llama, normwise, pop, run_in_terminal, tiny_folder
from safetensors.torch import load_file, save_file
from windows import random_windows

import pop_ext
from pop_ext.analysis import calibration, importance, plans
from pop_ext.analysis.data import Data
from pop_ext.analysis.samples import Pairs
from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import ModelSpec
from pop_ext.checkpoints.prefill_plan import PrefillPlan

IDLE = {(1, "mlp"), (2, "attention"), (3, "mlp"), (4, "mlp")}  # branches that add next to nothing to the residual
TEXT = " ".join(f"Sentence {i} says that {i} and {i + 1} are {2 * i + 1}." for i in range(400))
SIZES = ("--prompts", 2, "--prompt-tokens", 40, "--continuation-tokens", 8, "--shortlist", 3, "--draws", 1,
         "--dtype", "float32")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six layers, of which the last is of no use to prompts, and some branches that do next to nothing."""
    path = make_damped_llama(
        tmp_path_factory.mktemp("plans") / "tiny", 6, 1.0, hidden_size=32, intermediate_size=40, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    weights = load_file(path / "model.safetensors")
    for layer, branch in IDLE:
        name = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}[branch]
        weights[f"model.layers.{layer}.{name}.weight"] *= 1e-3
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def model(folder):
    return pop_ext.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def gates(folder):
    peer = importance.load_transformers(folder)
    return importance.measure(peer, random_windows(4, 40, vocabulary=258), 30, branches=True, draws=2).values[:, 0]


def pairs(count: int, seed: int) -> Pairs:
    windows = random_windows(count, 48, seed, vocabulary=258)
    return Pairs([w[:40] for w in windows], [w[40:] for w in windows])


# What a plan costs


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_multiplications(name, tmp_path_factory, monkeypatch):
    """Of the multiplications that truncated tokens run, counted as they run: rows times weights, and scores seen."""
    spec = ModelSpec.from_config(load_config(tiny_folder(name, tmp_path_factory)))
    layers, heads, hidden = spec.num_layers, spec.num_heads * spec.head_dim, spec.hidden_size
    plan = PrefillPlan(tuple(i % 2 == 0 for i in range(layers)), tuple(i % 3 > 0 for i in range(layers)))
    expected = 0
    for layer in range(layers):
        for token in range(25):
            expected += hidden * 2 * spec.num_kv_heads * spec.head_dim
            if layer < layers - 1 and plan.attention[layer]:
                window = spec.windows[layer] or 25
                seen = sum(token - window < key <= token for key in range(25))
                expected += hidden * heads + heads * hidden + 2 * heads * seen
            if layer < layers - 1 and plan.mlp[layer]:
                expected += 3 * hidden * spec.intermediate_size
    assert plans.multiplications(spec, plan, 25) == expected


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_multiplications_of_a_depth_are_the_benchmarks(folder, depth):
    """But for the tokens that run through all layers, of which a long prompt has few, and the vocabulary."""
    from bench.multiplications import pop_multiplications

    spec, tokens = ModelSpec.from_config(load_config(folder)), 20_000
    found = plans.multiplications(spec, PrefillPlan.suffix(depth, 6), tokens)
    assert found == pytest.approx(pop_multiplications(spec, tokens, depth), rel=1e-3)


def test_budgets(folder):
    spec = ModelSpec.from_config(load_config(folder))
    full = plans.multiplications(spec, PrefillPlan.suffix(5, 6), 40)
    assert plans.budget_of(spec, 40, None, 3) == plans.multiplications(spec, PrefillPlan.suffix(3, 6), 40)
    assert plans.budget_of(spec, 40, 0.6, None) == int(0.6 * full)
    for share in (0.0, 0.1, 1.0, 1.5, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"budget is .*, expected 0\.\d+ to 1 of the full model's multiplications"):
            plans.budget_of(spec, 40, share, None)
    for share, depth in ((None, None), (0.5, 3)):
        with pytest.raises(ValueError, match="budget and prefill_depth: expected one of them"):
            plans.budget_of(spec, 40, share, depth)


# The search


def test_what_does_nothing_is_closed(model, gates):
    """And only that, where the budget is what the rest costs; the suffix of equal cost loses what it closes."""
    idle = PrefillPlan.suffix(5, 6)
    for layer, branch in IDLE:
        idle = idle.switched(layer, branch, False)
    full = plans.multiplications(model.spec, PrefillPlan.suffix(5, 6), 40)
    budget = plans.multiplications(model.spec, idle, 40) / full + 1e-6
    seen = []
    found = plans.find(
        model, gates, pairs(3, 1), pairs(9, 2), budget=budget, shortlist=3, progress=lambda *what: seen.append(what)
    )
    assert (found.plan.attention, found.plan.mlp) == (idle.attention, idle.mlp)
    assert found.better and found.rows[1].kl < 0.01 * found.rows[2].kl and found.rows[0].kl == 0
    assert found.shares == pytest.approx([1, budget, found.shares[2]], rel=1e-4) and found.shares[2] <= budget
    assert found.plan.fingerprint == model.fingerprint() and found.plan.found_with["better_than_suffix"]
    assert "The plan is better than prefill depth" in found.sentences()[1]
    done = [at for at, _, _ in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1] and len(seen) > 4


def test_greedy_closes_what_adds_least(model):
    """Where all branches are tried, and the ranking says nothing of them."""
    idle = PrefillPlan.suffix(5, 6)
    for layer, branch in IDLE:
        idle = idle.switched(layer, branch, False)
    budget = plans.multiplications(model.spec, idle, 40)
    search = plans.Search(model, torch.ones(6, 2), plans.Divergence(model, pairs(2, 1)), budget, 40, 99)
    seen = []
    assert search.greedy(PrefillPlan.suffix(5, 6), seen.append) == idle and len(seen) == len(IDLE)


def test_the_figures_are_of_the_plan(model, gates):
    """On the text held out, by plain formulas in float64."""
    held_out = pairs(6, 3)
    found = plans.find(model, gates, pairs(2, 1), held_out, prefill_depth=2, shortlist=2)
    assert found.shares[1] <= found.shares[2] + 1e-9 and found.suffix_depth == 2
    differences = []
    for row, plan in zip(found.rows[1:], (found.plan, PrefillPlan.suffix(2, 6)), strict=True):
        variant, kl = plans.with_plan(model, plan), []
        for both in zip(held_out.prompts, held_out.continuations, strict=True):
            p, q = (
                variant.logits(*([x] for x in both), prefill_depth=d)[0].double().log_softmax(-1) for d in (6, None)
            )
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
        assert row.kl == pytest.approx(sum(kl) / 6, rel=1e-4)
        differences.append(row.kl)
    low, high = found.excess_interval
    assert low <= differences[0] - differences[1] <= high


def test_divergence_runs_each_plan_once(model, monkeypatch):
    kl, calls, logits = plans.Divergence(model, pairs(2, 1)), [], type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda *a, **k: calls.append(1) or logits(*a, **k))
    plan = PrefillPlan.suffix(2, 6)
    assert kl(plan) == kl(PrefillPlan(plan.attention, plan.mlp, "of a model")) > 0 and len(calls) == 2
    assert kl(PrefillPlan.suffix(5, 6)) < 1e-6


def test_the_suffix_may_be_best(folder, gates, tmp_path):
    """Of a model whose deep layers do nothing; the sentence says so."""
    path = make_damped_llama(
        tmp_path / "tiny", 2, 1e-4, hidden_size=32, intermediate_size=40, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model = pop_ext.load(path, dtype="float32")
    flat = torch.ones(6, 2)
    found = plans.find(model, flat, pairs(2, 1), pairs(8, 2), prefill_depth=2, shortlist=2)
    assert not found.better and "which is as good: use that" in found.sentences()[1]
    assert not found.plan.found_with["better_than_suffix"]


def test_calibrated(model, gates, tmp_path):
    """Plans keep the depths that the calibration has, and use it; the suffix's depth must be among them."""
    path = tmp_path / "c.safetensors"
    calibration.calibrate(model, random_windows(12, 60, 4, vocabulary=258), [2, 4], rank=0).save(path)
    calibrated = pop_ext.load(model.folder, dtype="float32", calibration=path, prefill_depth=1.0)
    found = plans.find(calibrated, gates, pairs(2, 1), pairs(6, 2), prefill_depth=2, shortlist=2)
    assert found.plan.depth in (2, 4) and [row.method for row in found.rows[1:]] == ["pop_calibrated"] * 2
    with pytest.raises(ValueError, match="calibration holds the depths 2, 4, expected 3, too"):
        plans.find(calibrated, gates, pairs(2, 1), pairs(6, 2), prefill_depth=3)


def test_split():
    search, held_out = plans.split(Data("abcdefgh" * 10))
    assert search.text == "abcdefgh" * 7 + "abcd" and search.text + held_out.text == "abcdefgh" * 10
    samples = [(str(i), {}) for i in range(9)]
    search, held_out = plans.split(Data(samples=samples))
    assert [name for name, _ in held_out.samples] == ["3", "7"] and len(search.samples) == 7


# The command


def test_command(folder, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    plan, options = tmp_path / "plan.json", ("plan", folder, "--text", tmp_path / "text", *SIZES)
    done = pop(*options, "--budget", 0.6, "--output", plan, "--json")
    assert done.exit_code == 0 and done.stderr == "", done.stderr
    found, written = json.loads(done.stdout), json.loads(plan.read_text())
    assert found == written and written["found_with"]["prompts"] == 6
    row = written["found_with"]["rows"][1]
    assert row["name"] == "plan" and row["multiplications_share"] <= 0.6 and row["kl"] > 0
    loaded = pop_ext.load(folder, dtype="float32", prefill_plan=plan)
    assert loaded.prefill_plan.found_with == written["found_with"]
    full, cut = (loaded.logits([[5] * 30], [[6, 7]], prefill_depth=d)[0] for d in (1.0, None))
    assert normwise(cut, full) > 1e-4
    shown = pop(*options, "--prefill-depth", 3, "--output", plan)
    assert shown.exit_code == 0 and shown.stderr == ""
    for part in ("prefill depth 3", "6 held-out prompts of 40 tokens", "It runs attention of layers", "--prefill-plan"):
        assert part in shown.stdout


def test_progress_in_a_terminal(folder, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    options = ["--text", tmp_path / "text", *SIZES, "--budget", 0.6, "--output", tmp_path / "plan.json"]
    command = [sys.executable, "-m", "pop_ext.cli", "plan", folder, *options]
    status, shown = run_in_terminal(list(map(str, command)), 100)
    assert status == 0 and "importance:" in shown and "plans tried, KL 0." in shown and "100%" in shown


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "--budget and --prefill-depth: expected one of them"),
        (("--budget", 0.6, "--prefill-depth", 3), "--budget and --prefill-depth: expected one of them"),
        (("--budget", 0.01), "--budget is 0.01, expected 0."),
        (("--budget", 1.0), "to 1 of the full model's multiplications"),
        (("--prefill-depth", 6), "--prefill-depth is 6, expected 1 to 5 of the model's 6 layers"),
        (("--budget", 0.6, "--prompts", 200), "tokens, expected at least"),
        (("--budget", 0.6, "--output", "no/such/plan.json"), "folder that exists"),
    ],
)
def test_bad_input(folder, tmp_path, options, message):
    (tmp_path / "text").write_text(TEXT)
    options = ("--output", tmp_path / "plan.json", *options)
    failed = pop("plan", folder, "--text", tmp_path / "text", "--prompt-tokens", 40, *options)
    assert failed.exit_code == 1 and message in failed.stderr, failed.stderr
    assert failed.stderr.count("\n") == 1 and not (tmp_path / "plan.json").exists()


def test_nothing_is_written_when_it_fails(folder, tmp_path, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.setattr(plans, "compare", lambda *_: 1 / 0)
    failed = pop("plan", folder, "--text", tmp_path / "text", *SIZES, "--budget", 0.6, "--output", tmp_path / "p.json")
    assert failed.exit_code == 1 and [file.name for file in tmp_path.iterdir()] == ["text"]


def test_benchmark(folder, model, tmp_path, monkeypatch, capsys):
    """Rows for plans and depths, with own weights and where the calibration is for them."""
    (tmp_path / "text").write_text(TEXT)
    plan = PrefillPlan.suffix(2, 6, model.fingerprint()).switched(3, "attention", True)
    plan.save(tmp_path / "some.json")
    calibration.calibrate(model, random_windows(8, 60, 4, vocabulary=258), [3, 4], rank=0).save(tmp_path / "c")
    options = ("--text", tmp_path / "text", "--plan", tmp_path / "some.json", "--prefill-depth", 2, 3, "--prompts", 2,
               "--calibration", tmp_path / "c", "--output", tmp_path / "rows.json")  # fmt: skip
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(sys, "argv", ["plans.py", str(folder), *map(str, options)])
    runpy.run_path(str(ROOT / "bench" / "plans.py"), run_name="__main__")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["name"], row["projections"]) for row in rows] == [
        ("depth 2", "own"), ("depth 3", "own"), ("depth 3", "calibrated"), ("some, 4 layers", "own"),
        ("some, 4 layers", "calibrated"),
    ]  # fmt: skip
    counts = [plans.multiplications(model.spec, p, 256) for p in (plan, PrefillPlan.suffix(6, 6))]
    assert rows[3]["multiplications"] == counts[0] / counts[1] and len({row["text"]["kl"] for row in rows}) == 5
    assert capsys.readouterr().out.count("\n| ") == 7
