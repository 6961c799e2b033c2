"""Calibrated projections: the closed form against float64 and transformers, and in the runner."""

from __future__ import annotations

import pytest
import torch
from helpers import normwise, tiny_folder, transformers_model
from windows import mean_kl, random_windows

import pop_ext
from pop_ext.analysis import calibration


def moments_of(layers, x, y):
    moments = calibration.NormalEquations(layers, x.shape[1], y.shape[1])
    moments.add_inputs(x.double())
    for layer in layers:
        moments.add_targets(layer, x.double(), y.double())
    return moments


def test_closed_form_is_the_minimum():
    """The gradient of the penalised error vanishes, and the error from moments is the error."""
    torch.manual_seed(0)
    x, y, own = torch.randn(200, 12), torch.randn(200, 6), torch.randn(12, 6).double()
    moments = moments_of(range(3, 4), x, y)
    for penalty in (1e-3, 1.0):
        weight = moments.solve(3, own, penalty, torch.linalg.eigh(moments.xx)).requires_grad_()
        scale = penalty * moments.xx.diagonal().mean()
        loss = (x.double() @ weight - y.double()).square().sum() + scale * (weight - own).square().sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.abs().max() < 1e-9 * scale
        error = (x.double() @ weight.detach() - y.double()).square().sum(0)
        torch.testing.assert_close(moments.errors(3, weight.detach()), error, rtol=1e-9, atol=1e-9)


def test_errors_of_all_penalties_are_those_of_each():
    """In the eigenvectors' basis, against the solutions themselves, on a stream that they were not fitted to."""
    torch.manual_seed(0)
    own, weight = torch.randn(20, 8).double(), torch.randn(20, 8).double()
    fitted, other = (
        moments_of(range(3, 4), x, x @ weight + torch.randn(len(x), 8).double())
        for x in (torch.randn(30, 20).double(), torch.randn(50, 20).double())
    )
    spectrum = torch.linalg.eigh(fitted.xx)
    found = fitted.penalty_errors(3, own, spectrum, other.of(spectrum[1].T))
    solved = [fitted.solve(3, own, penalty, spectrum) for penalty in calibration.PENALTIES]
    expected = torch.stack([other.errors(3, each).sum() / other.yy[3].sum() for each in solved])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(set(found.tolist())) == len(calibration.PENALTIES)


def test_sound_where_nothing_is_to_be_learned():
    """Inputs of rank 2 in 12 dimensions: what they do not span stays at the own weights."""
    torch.manual_seed(0)
    x = torch.randn(50, 2).double() @ torch.randn(2, 12).double()
    own = torch.randn(12, 6).double()
    moments = moments_of(range(1), x, torch.randn(50, 6))
    weight = moments.solve(0, own, 1e-8, torch.linalg.eigh(moments.xx))
    null = torch.linalg.svd(x)[2][2:]
    assert weight.isfinite().all() and torch.allclose(null @ weight, null @ own, atol=1e-6)


def test_features_are_what_the_token_before_tells():
    """Keys that hang on three directions of it: three features find them, two do not."""
    torch.manual_seed(0)
    now, before = torch.randn(900, 20).double(), torch.randn(900, 20).double() + 3
    x = torch.cat([now, before + now @ torch.randn(20, 20).double()], 1)
    y = now @ torch.randn(20, 8).double() + x[:, 20:] @ torch.randn(20, 3).double() @ torch.randn(3, 8).double()
    moments = calibration.NormalEquations(range(2), 40, 16)
    moments.add_inputs(x)
    for layer in range(2):
        moments.add_targets(layer, x, torch.cat([y * (1 + layer), torch.randn(900, 8).double()], 1))
    left = []
    for rank in (2, 3):
        features = calibration.features_of(moments, 20, rank)
        of = moments.of(torch.block_diag(torch.eye(20, dtype=torch.float64), features))
        weight = of.solve(0, torch.zeros(20 + rank, 16).double(), 1e-9, torch.linalg.eigh(of.xx))
        left.append(of.errors(0, weight)[:8].sum() / moments.yy[0][:8].sum())
    assert left[0] > 1e-3 and left[1] < 1e-6, left


def test_rank_is_bounded(tiny_llama):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    for rank in (-1, 1 + model.spec.hidden_size):
        with pytest.raises(ValueError, match=f"rank is {rank}, expected 0 to the hidden size"):
            calibration.calibrate(model, random_windows(4, 50), [2], rank=rank)


def reference_projection(folder, windows, depth: int, layer: int, penalty: float, anchors: int, features):
    """The same ridge regression from transformers' hidden states, in float64 throughout: [out, D + rank], Y for x."""
    model = transformers_model(folder, torch.float32)
    attention, norm = model.model.layers[layer].self_attn, model.model.layers[layer].input_layernorm
    own_norm_gain = norm.weight.double() + (1.0 if "gemma" in model.config.model_type else 0.0)
    kv = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).double()
    xs, ys = [], []
    with torch.no_grad():
        for window in windows:
            states = model(input_ids=torch.tensor([window]), output_hidden_states=True).hidden_states
            h, target = states[depth][0, anchors:].double(), states[layer][0, anchors:].double()
            eps = model.config.rms_norm_eps
            x = h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
            xs.append(torch.cat([x[1:], x[:-1] @ features.double().T], 1) if len(features) else x)
            target = target[len(target) - len(xs[-1]) :]
            ys.append(target / (target.square().mean(-1, keepdim=True) + eps).sqrt() * own_norm_gain @ kv.T)
    x, y, own = torch.cat(xs), torch.cat(ys), (kv * own_norm_gain).T
    own = torch.cat([own, own.new_zeros(len(features), own.shape[1])])
    gram = x.T @ x
    damped = gram + penalty * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return (own + torch.linalg.solve(damped, x.T @ (y - x @ own))).T


@pytest.mark.parametrize("rank", [0, 8])
def test_every_family_against_transformers(tiny, rank):
    """The projections of one layer; attention biases stay out of the targets, Gemma's norm gains in."""
    model = pop_ext.load(tiny, dtype=torch.float32, anchor_tokens=1 - (rank > 0))
    windows, depth = random_windows(9, 60), 2
    result = calibration.calibrate(model, windows, [depth], rank=rank)
    projection, features = result.at(depth)
    size = model.spec.hidden_size
    assert features.shape == (rank, size)
    projection = projection / calibration.column_scale(size, rank)
    own = model.weights.projection[depth].double()
    torch.testing.assert_close(projection[0], torch.cat([own, own.new_zeros(len(own), rank)], 1), rtol=1e-6, atol=0)
    layer = model.spec.num_layers - 1
    # with a K-norm, keys are fitted up to the scale that it discards: values only
    rows = slice(model.spec.num_kv_heads * model.spec.head_dim if model.spec.qk_norm else 0, None)
    penalty = result.provenance["depths"][str(depth)]["penalty"]
    features = features / calibration.FEATURE_SCALE
    expected = reference_projection(tiny, windows, depth, layer, penalty, model.anchor_tokens, features)
    assert normwise(projection[layer - depth][rows], expected[rows]) < 2e-4


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_calibration_lowers_kl_on_other_text(name, tmp_path_factory, tmp_path):
    folder = tiny_folder(name, tmp_path_factory)
    model = pop_ext.load(folder, dtype=torch.float32)
    depth = model.spec.num_layers - 2
    result = calibration.calibrate(model, random_windows(40, 100), [depth])
    entry = result.provenance["depths"][str(depth)]
    assert sum(entry["error_after"].values()) < sum(entry["error_before"].values())
    test = random_windows(6, 60, seed=9)
    before = mean_kl(model, test, 40, depth)
    result.save(tmp_path / "c.safetensors")
    model = pop_ext.load(folder, dtype=torch.float32, prefill_depth=depth, calibration=tmp_path / "c.safetensors")
    assert mean_kl(model, test, 40, depth) < 0.85 * before


def test_several_depths_are_what_each_is_alone(tiny_llama):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    windows = random_windows(10, 50)
    both, one = (calibration.calibrate(model, windows, depths) for depths in ([4, 2], [2]))
    assert both.depths == [2, 4] and torch.equal(both.at(2)[0], one.at(2)[0])


def test_chunks_and_turns_do_not_change_what_the_token_before_tells(tiny):
    """Keys and values in the cache, in chunks of every size, beside another conversation, and in a second turn after a
    decoded token; the first token of a turn whose predecessor is cached takes the full depth.
    """
    model, depth = pop_ext.load(tiny, dtype=torch.float32, anchor_tokens=0), 2
    model.calibration = calibration.calibrate(model, random_windows(8, 40), [depth], rank=8)
    (first, second, other), caches = random_windows(3, 23, seed=4), []
    for chunk in (200, 1, 3, 7):
        model.chunk_tokens = chunk
        sequences = [model.new_sequence() for _ in range(2)]
        model.prefill(sequences, [first, other[:9]], prefill_depth=depth)
        model.decode(sequences[:1], [5])
        sequences[0].token_ids.append(7)  # sampled, and not yet in the cache
        model.prefill(sequences, [second, other], prefill_depth=depth)
        blocks = [sequence.blocks for sequence in sequences]
        caches.append([torch.cat([model.cache.data[:, :, block] for block in table], 2) for table in blocks])
        for cache, sequence in zip(caches[-1], sequences, strict=True):
            cache[:, :, sequence.num_cached :] = 0
            model.free(sequence)
    for chunked in caches[1:]:
        for one, same in zip(caches[0], chunked, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)
    # what the first shallow tokens have there, from their hidden states
    before = list(model.hidden_states([first]))[depth]
    x = torch.nn.functional.rms_norm(before, before.shape[1:], eps=model.spec.rms_norm_eps)
    projection, features = model.calibration.at(depth)
    size = model.spec.hidden_size
    inputs = torch.cat([x[1:], x[:-1] @ features.T], 1)
    values = inputs @ (projection[-1].float() * (size + 8) ** 0.5 / size**0.5).T
    values = values[:, values.shape[1] // 2 :]
    if model.weights.projection_bias is not None:
        values = values + model.weights.projection_bias[-1, values.shape[1] :]
    torch.testing.assert_close(caches[0][0][-1, 1, 1:22].flatten(1), values[:21], rtol=1e-3, atol=1e-4)


def test_one_skipped_layer_has_nothing_to_fit(tiny_llama):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    layers, size = model.spec.num_layers, model.spec.hidden_size
    projection, features = calibration.calibrate(model, random_windows(4, 50), [layers - 1]).at(layers - 1)
    own = model.weights.projection[-1:].double()
    torch.testing.assert_close(
        (projection / calibration.column_scale(size, len(features)))[..., :size], own, rtol=1e-6, atol=0
    )


def test_full_depth_ignores_the_calibration(tiny_llama, tmp_path):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    calibration.calibrate(model, random_windows(4, 50), [2]).save(tmp_path / "c.safetensors")
    calibrated = pop_ext.load(tiny_llama, dtype=torch.float32, calibration=tmp_path / "c.safetensors")
    (window,) = random_windows(1, 40)
    for depth in (1.0, 5):
        assert torch.equal(
            model.logits([window[:30]], [window[30:]], prefill_depth=depth)[0],
            calibrated.logits([window[:30]], [window[30:]], prefill_depth=depth)[0],
        )
    assert not torch.allclose(
        model.logits([window[:30]], [window[30:]], prefill_depth=2)[0],
        calibrated.logits([window[:30]], [window[30:]], prefill_depth=2)[0],
    )


def test_bad_arguments(tiny_llama):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    for depth in (0, 6):
        with pytest.raises(ValueError, match=f"prefill_depth is {depth}, expected 1 to 5"):
            calibration.calibrate(model, random_windows(4, 50), [depth])
    with pytest.raises(ValueError, match="at least 2"):
        calibration.calibrate(model, random_windows(1, 50), [2])
