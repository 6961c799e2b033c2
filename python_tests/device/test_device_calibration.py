"""Calibrations on a device: used, fitted, refined and evaluated there, with the CPU's results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import normwise
from on_device import CACHE, DEVICE, assert_same_tokens, bound, draw_prompts, generate, load_both, on_the_double

import pop_ext
from pop_ext.analysis.calibration import calibrate
from pop_ext.analysis.evaluation import METHODS, evaluate
from pop_ext.analysis.refinement import refine

DEPTHS = 2, 4


@pytest.fixture(scope="module")
def windows():
    return draw_prompts(*[72] * 8, seed=5)


@pytest.fixture(scope="module", params=[0, 16])
def file(request, llama, windows, tmp_path_factory):
    """A calibration without and with features of the token before."""
    model = pop_ext.load(llama, device="cpu", max_cache_tokens=CACHE)
    path = tmp_path_factory.mktemp("calibration") / "calibration.safetensors"
    calibrate(model, windows, list(DEPTHS), rank=request.param).save(path)
    return path


def test_the_cpus_tokens(llama, file):
    cpu, ours = load_both(llama, prefill_depth=2, calibration=file)
    plain = pop_ext.load(llama, device="cpu", prefill_depth=2)
    prompts = draw_prompts(3, 90, 40)
    for depth in DEPTHS:
        tokens = generate(ours, prompts, prefill_depth=depth).tokens
        assert assert_same_tokens(cpu, tokens, prompts, depth) > 12
    logits = [m.prefill([m.new_sequence()], prompts[1:2])[0].cpu() for m in (cpu, ours, plain)]
    assert normwise(logits[1], logits[0]) <= 2 * bound(6) < normwise(logits[2], logits[0])


def test_chunks(llama, file):
    cpu, ours = load_both(llama, prefill_depth=2, calibration=file)
    results = []
    for model in (cpu, ours):
        model.chunk_tokens = 37
        sequences = [model.new_sequence(), model.new_sequence()]
        first = model.prefill(sequences, draw_prompts(70, 33))[0]
        results.append(torch.cat([first, model.prefill(sequences, draw_prompts(9, 60))[0]]).cpu())
    assert normwise(results[1], results[0]) <= 2 * bound(6)


@on_the_double
def test_a_forward_pass_is_one_copy(llama, file, log):
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=2, calibration=file, max_cache_tokens=CACHE)
    model.chunk_tokens = 37
    log.clear()
    model.prefill([model.new_sequence() for _ in range(3)], draw_prompts(3, 90, 40))
    assert [(e.kind, e.where.partition(":")[0]) for e in log] == [("to device", "transfer.py")] * 4


def test_fitted_on_the_device(llama, windows):
    """Nearly the CPU's projections, also of depths whose own projections the device did not keep."""
    cpu, ours = load_both(llama, prefill_depth=4)
    fits = [calibrate(model, windows, list(DEPTHS), rank=8) for model in (cpu, ours)]
    assert fits[0].provenance["fingerprint"] == fits[1].provenance["fingerprint"]
    for depth in DEPTHS:
        exact, fitted = (fit.at(depth)[0].float() for fit in fits)
        assert fitted.is_cpu and normwise(fitted[0], exact[0]) <= 2**-8
        for name, before in fits[0].provenance["depths"][str(depth)]["error_after"].items():
            after = fits[1].provenance["depths"][str(depth)]["error_after"][name]
            assert after == pytest.approx(before, rel=0.05)


def test_evaluated_on_the_device(llama):
    cpu, ours = load_both(llama, prefill_depth=4)
    prompts, continuations = draw_prompts(60, 60), draw_prompts(6, 6, seed=2)
    rows = [evaluate(model, prompts, continuations, [3], METHODS) for model in (cpu, ours)]
    assert [row.method for row in rows[1]] == [row.method for row in rows[0]]
    for exact, row in zip(*rows, strict=True):
        assert row.kl == pytest.approx(exact.kl, rel=0.2, abs=0.01) and row.prefill_seconds > 0


OF_ITS_OWN = "POP_TEST_PROCESS_OF_ITS_OWN"


def test_refined_on_the_device():
    """In a process of its own: autograd makes queues, once, for the devices that there are at its first backward."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"{__file__}::test_refined_in_this_process",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        OF_ITS_OWN: "1"
    }
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout + result.stderr


if OF_ITS_OWN in os.environ:

    def test_refined_in_this_process(llama, windows, tmp_path):
        fits = []
        for model in load_both(llama, prefill_depth=4):
            calibration = calibrate(model, windows, [4], rank=8)
            refine(model, calibration, windows, 2, state=tmp_path / model.device.type)
            fits.append(calibration)
        (before,), (after,) = (fit.provenance["depths"]["4"]["refined"] for fit in fits)
        assert after["kl_after"] == pytest.approx(before["kl_after"], rel=0.1)
        assert fits[1].at(4)[0].is_cpu
