"""Refinement of calibrated projections: its pass against the runner, its gradient, and how it goes on."""

from __future__ import annotations

import pytest
import torch
from helpers import normwise, tiny_folder
from windows import mean_kl, random_windows

import pop_ext
from pop_ext.analysis import calibration, refinement
from pop_ext.checkpoints import calibration as calibration_files


@pytest.mark.parametrize("boundary, anchors, rank", [(1, 1, 8), (3, 0, 8), (2, 4, 8), (3, 0, 0)])
def test_one_pass_over_blocks_is_the_runner(tiny, boundary, anchors, rank):
    """Every token of a block has the logits that a prompt of the earlier blocks and its continuation gives; with any
    projections, of features that weigh much.
    """
    model = pop_ext.load(tiny, dtype=torch.float32, boundary_tokens=boundary, anchor_tokens=anchors)
    (window,), depth = random_windows(1, 60), 2
    before = list(model.hidden_states([window]))[depth]
    starts = torch.arange(60) // 25 * 25
    own, size = model.weights.projection[depth:], model.spec.hidden_size
    features, weights = torch.randn(rank, size) / size**0.5, 0.1 * torch.randn(*own.shape[:2], rank)
    deep, projection = refinement.DeepLayers(model, depth, features), torch.cat([own, weights], -1)
    with torch.no_grad():
        logits = deep.logits(deep(before[None], projection, starts)[0])
    projection = (projection * calibration.column_scale(size, rank)).float()
    model.calibration = calibration_files.Calibration(
        {depth: projection}, {depth: features * calibration.FEATURE_SCALE}, {}
    )
    for start in (25, 50):
        prompt, end = start + boundary, min(start + 25, 60)
        expected = model.logits([window[:prompt]], [window[prompt:end]], prefill_depth=depth)[0]
        assert normwise(logits[prompt - 1 : end - 1], expected) < 1e-5


def test_divergence_and_its_gradient(tiny_llama):
    deep = refinement.DeepLayers(pop_ext.load(tiny_llama, dtype=torch.float32), 3, torch.zeros(0, 60))
    torch.manual_seed(0)
    hidden, full = torch.randn(7, 90, requires_grad=True), torch.randn(7, 90)
    p, q = deep.logits(full).log_softmax(-1), deep.logits(hidden).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum()
    total, gradient = refinement.divergence(deep, hidden.detach(), full, rows=3)
    assert total == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-6)


def test_without_a_boundary_as_with_one_token():
    """What predicts the first token of an answer is of no projection then."""
    starts = torch.arange(200) // 64 * 64
    assert torch.equal(refinement._scored(starts, 0), refinement._scored(starts, 1))


class Stop(Exception):
    pass


def test_refinement_lowers_kl_and_resumes(tmp_path_factory, tmp_path, monkeypatch):
    """Held-out KL falls, and on other text too; an interrupted run ends where an uninterrupted one does."""
    model = pop_ext.load(tiny_folder("llama_untied_bias", tmp_path_factory), dtype=torch.float32)
    # of few kinds of tokens, so that what is learned of some windows holds for others
    windows, depth, steps = random_windows(80, 130, vocabulary=12), 2, 30
    monkeypatch.setattr(refinement, "CHECK_EVERY", 5)
    start = calibration.calibrate(model, windows[:6], [depth])
    saved = tmp_path / "c.safetensors"
    start.save(saved)

    def fresh():
        return calibration_files.Calibration.load(saved, model.spec, torch.float32)

    once = fresh()
    refinement.refine(model, once, windows, steps, seed=3)
    entry = once.provenance["depths"][str(depth)]["refined"][-1]
    assert entry["kl_after"] < 0.95 * entry["kl_before"]
    torch.testing.assert_close(once.at(depth)[0][0], start.at(depth)[0][0], rtol=1e-6, atol=0)
    test = random_windows(16, 130, seed=5, vocabulary=12)
    kl = []
    for model.calibration in (start, once):
        kl.append(mean_kl(model, test, 65, depth))
    model.calibration = None
    assert kl[1] < 0.97 * kl[0]

    def stop(done, total, note=""):
        if done == 13:
            raise Stop

    def again(state, **settings):
        refinement.refine(model, twice, windows, steps, state=tmp_path / state, seed=3, **settings)

    twice = fresh()
    with pytest.raises(Stop):
        again("c", progress=stop)
    assert torch.equal(twice.at(depth)[0], start.at(depth)[0])
    (state,) = tmp_path.glob("c.refining*")
    data, reported = state.read_bytes(), []
    again("c", progress=lambda done, *_: reported.append(done))
    assert reported[0] == 10 and reported[-1] == steps and not state.exists()
    torch.testing.assert_close(twice.at(depth)[0], once.at(depth)[0], rtol=1e-3, atol=1e-5)
    state.write_bytes(data[: len(data) // 2])
    with pytest.raises(pop_ext.CalibrationError, match="damaged"):
        again("c")
    with pytest.raises(ValueError, match="expected one length, more than 65"):
        refinement.refine(model, twice, random_windows(4, 65), 1)
