"""`pop verify` and `pop_ext.verify`: what they call safe, and calibrations that are not."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import make_damped_llama, run_in_terminal
from typer.testing import CliRunner

import pop_ext
from pop_ext import cli
from pop_ext.analysis import uses, verification
from pop_ext.analysis.verification import Check, Verification

DEPTH, SIZES = 5, {"prompts": 8, "prompt_tokens": 224}  # tokens are bytes here
OPTIONS = ("--prompts", "8", "--prompt-tokens", "224", "--dtype", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_damped_llama(
        tmp_path_factory.mktemp("verify") / "tiny", DEPTH, 0.3, hidden_size=64, intermediate_size=96,
        num_hidden_layers=10, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(folder):
    return pop_ext.load(folder, dtype="float32", prefill_depth=DEPTH)


@pytest.fixture(scope="module")
def calibration(model):
    return pop_ext.calibrate(model, [DEPTH], [uses.prose(60_000), uses.code(60_000)], tokens=16_000)


def verified(model, calibration, **settings) -> Verification:
    found = copy.copy(model)
    found.calibration = calibration
    return pop_ext.verify(found, **SIZES, **settings)


def spoiled(calibration, change):
    """The same with other projections."""
    result = copy.copy(calibration)
    result.projections = {depth: change(tensor) for depth, tensor in calibration.projections.items()}
    return result


def test_the_full_model_is_safe(model):
    """At the last layer's input nothing is lost; what passes then is all that there is to pass."""
    seen = []
    result = pop_ext.verify(model, prefill_depth=9, **SIZES, progress=lambda *what: seen.append(what))
    assert (result.verdict, result.exit_code, result.safe_uses) == ("safe", 0, list(uses.USES))
    assert all(abs(check.kl) < 1e-6 and check.top1_agreement == 1 for check in result.checks)
    assert len(seen) == 6 * 8 and seen[-1] == (47, 48, "copying")


def test_a_good_calibration_is_safe_and_planted_ones_are_not(model, calibration):
    assert verified(model, calibration).verdict == "safe"
    shuffled = verified(model, spoiled(calibration, lambda p: p[[0, 3, 4, 1, 2]]))
    assert (shuffled.verdict, shuffled.problem) == ("not safe", None)
    scaled = verified(model, spoiled(calibration, lambda p: p * 1.1))
    assert (scaled.verdict, scaled.exit_code) == ("not safe", 2) and "differ from the model's own by 10%" in str(scaled)


def test_another_models_calibration_is_refused(calibration, tiny_llama, folder, tmp_path):
    provenance = calibration.provenance | {"fingerprint": "another's"}
    pop_ext.Calibration(calibration.projections, calibration.features, provenance).save(tmp_path / "file")
    result = pop("verify", folder, "--calibration", tmp_path / "file")
    assert result.exit_code == 3 and "made for another model" in result.stderr and not result.stdout


def test_calibrations_of_bfloat16_have_no_problem(folder, calibration):
    """Their rounding is not damage."""
    model = pop_ext.load(folder, dtype="bfloat16")
    model.calibration = spoiled(calibration, lambda p: p.bfloat16())
    assert verification.calibration_problem(model, DEPTH) is None


def test_a_share_of_deep_tokens_is_verified(model):
    found = copy.copy(model)
    found.deep_tokens = 0.5
    result, without = (pop_ext.verify(m, prefill_depth=2, **SIZES) for m in (found, model))
    assert result.deep_tokens == 0.5 and result.prefill_depth == 2
    assert sum(check.kl for check in result.checks) < sum(check.kl for check in without.checks)


@pytest.mark.parametrize(
    "full, truncated, kl, safe, kept",
    [
        (20, 19, 1.0, True, 19),  # 95% kept, whatever the KL
        (20, 18, 0.0, False, 18),
        (4, 4, 1.0, True, 4),
        (3, 3, 1.0, False, 3),  # too few: the KL decides
        (3, 0, 0.0, True, 0),
    ],
)
def test_right_answers_decide_where_there_are_enough(full, truncated, kl, safe, kept):
    scores = np.zeros((20, 2, 5))
    scores[:full, 0, 4], scores[:truncated, 1, 4], scores[:, 1, 1] = 1, 1, kl
    check = verification._check("retrieval", scores, 0)
    assert (check.safe, check.full_right, check.kept) == (safe, full, kept)


def test_an_answer_that_only_the_truncated_model_gets_right_is_not_kept():
    scores = np.zeros((20, 2, 5))
    scores[:10, 0, 4], scores[10:, 1, 4] = 1, 1
    assert (verification._check("copying", scores, 0).kept, verification._check("prose", scores, 0).kept) == (0, None)


def check(use: str, safe: bool) -> Check:
    return Check(use, 20, 0.2, (0.1, 0.3), 0.8, None, None, safe)


@pytest.mark.parametrize(
    "safe, code, verdict, first",
    [
        ((True, True), 0, "safe", "Safe: prefill depth 5 of 10 passes all 2 checks."),
        ((True, False), 1, "partly safe", "Safe for prose only: prefill depth 5 of 10 is not safe for code."),
        ((False, False), 2, "not safe", "Not safe: prefill depth 5 of 10 passes none of 2 checks."),
    ],
)
def test_verdicts(safe, code, verdict, first):
    result = Verification(5, 10, True, 0.0, [check("prose", safe[0]), check("code", safe[1])])
    assert (result.exit_code, result.verdict, result.sentences()[0]) == (code, verdict, first)
    assert len(result.sentences()) == 1 + safe.count(False)


def test_arguments(model):
    with pytest.raises(ValueError, match="prefill_depth is 10 of 10 layers, expected fewer"):
        pop_ext.verify(model, prefill_depth=1.0)


# The command


def pop(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_json(folder, monkeypatch):
    monkeypatch.setattr(verification, "MAX_KL", 1e-9)
    result = pop("verify", folder, "--prefill-depth", DEPTH, "--json", *OPTIONS)
    found = json.loads(result.stdout)
    assert result.exit_code == 2 and found["verdict"] == "not safe" and found["safe_uses"] == []
    assert (found["prefill_depth"], found["layers"], found["calibrated"], found["deep_tokens"]) == (5, 10, False, 0.0)
    assert [row["use"] for row in found["checks"]] == list(uses.USES)
    for row in found["checks"]:
        assert row["kl_ci95"][0] <= row["kl"] <= row["kl_ci95"][1] and row["reason"]
    assert result.stderr == ""  # no progress where it is no terminal


def test_a_terminal_of_80_columns(folder):
    command = [sys.executable, "-m", "pop_ext.cli", "verify", str(folder), "--prefill-depth", "1", *OPTIONS]
    status, shown = run_in_terminal(command, 80)
    lines = [re.split(r"\r", line)[-1] for line in shown.split("\n")]
    assert status == 2 and max(map(len, lines)) <= 80
    assert "verifying: prose" in shown and re.search(r"prose +\d\.\d{3} ± \d\.\d{3} +\d+\.\d +no", shown)
    assert "Not safe: prefill depth 1 of 10 passes none of 6 checks." in " ".join(shown.split())


def test_what_cannot_be_verified(folder, tmp_path):
    for arguments, message in [
        ((folder,), "--prefill-depth is not given"),
        ((folder, "--prefill-depth", "1.0"), "expected fewer"),
        ((tmp_path / "nothing", "--prefill-depth", "2"), "nothing"),
    ]:
        result = pop("verify", *arguments)
        assert result.exit_code == 3 and message in result.stderr and result.stderr.count("\n") == 1


# The uses


@pytest.mark.parametrize("use", uses.USES)
def test_uses(model, use):
    prompts, continuations = uses.use_pairs(use, model, 8, 224, 0)
    assert len(prompts) == len(continuations) == 8 and all(continuations)
    assert len({tuple(prompt) for prompt in prompts}) == 8
    assert all(60 < len(prompt) <= (400 if use == "chat" else 224) for prompt in prompts)
    assert uses.use_pairs(use, model, 8, 224, 0) == (prompts, continuations)


def test_answers_are_right():
    generator = np.random.default_rng(0)
    for _ in range(200):
        _, answer = uses.problem(generator)
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", answer)
        assert steps
        for a, sign, b, result in steps:
            a, b, result = int(a), int(b), int(result)
            assert result == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
