"""Calibrated projections: the closed form against float64 and transformers, the file, and refinement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers import normwise, tiny_folder, transformers_model
from test_cli import pop
from test_generation import make_chat_folder

import pop_ext
from pop_ext.analysis import calibration, refinement
from pop_ext.analysis import text as texts
from pop_ext.checkpoints import calibration as calibration_files


def random_windows(count: int, length: int, seed: int = 0, vocabulary: int = 293) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def mean_kl(model, windows, prompt: int, depth: int) -> float:
    total = 0.0
    for window in windows:
        full, cut = (
            model.logits([window[:prompt]], [window[prompt:]], prefill_depth=p)[0].log_softmax(-1) for p in (1.0, depth)
        )
        total += float((full.exp() * (full - cut)).sum(-1).mean())
    return total / len(windows)


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


def test_fingerprint_is_of_the_weights(tiny_llama, tmp_path_factory):
    first, second = (pop_ext.load(tiny_llama, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert first.fingerprint() == second.fingerprint()
    first.weights.layers[3].down = first.weights.layers[3].down * 1.01
    assert first.fingerprint() != second.fingerprint()


def test_refused_files(tiny_llama, tmp_path_factory, tmp_path):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    result = calibration.calibrate(model, random_windows(4, 50), [2])
    path = tmp_path / "c.safetensors"
    result.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(pop_ext.CalibrationError, match="prefill_depth is 3 layers, but the calibration was made for 2"):
        pop_ext.load(tiny_llama, prefill_depth=3, calibration=path)
    loaded = pop_ext.load(tiny_llama, prefill_depth=2, calibration=path)
    with pytest.raises(pop_ext.CalibrationError, match="made for 2"):
        loaded.generate([[1, 2, 3]], prefill_depth=0.5, max_new_tokens=1)
    with pytest.raises(pop_ext.CalibrationError, match=r"depth 2 has a tensor"):
        pop_ext.load(tiny_folder("mistral_full", tmp_path_factory), calibration=path)
    result.provenance["fingerprint"] = "of another"
    result.save(path)
    with pytest.raises(pop_ext.CalibrationError, match="another model"):
        pop_ext.load(tiny_llama, calibration=path)
    data = path.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"c\.safetensors"):
            pop_ext.load(tiny_llama, calibration=path)
    with pytest.raises(pop_ext.CalibrationError, match="not a calibration"):
        pop_ext.load(tiny_llama, calibration=tiny_llama / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no such calibration"):
        pop_ext.load(tiny_llama, calibration=tmp_path / "none")


def test_bad_arguments(tiny_llama):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    for depth in (0, 6):
        with pytest.raises(ValueError, match=f"prefill_depth is {depth}, expected 1 to 5"):
            calibration.calibrate(model, random_windows(4, 50), [depth])
    with pytest.raises(ValueError, match="at least 2"):
        calibration.calibrate(model, random_windows(1, 50), [2])


# Refinement


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
    with pytest.raises(ValueError, match="windows must be of one length, more than 65"):
        refinement.refine(model, twice, random_windows(4, 65), 1)


# The command


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
    assert failed.exit_code == 1 and "anchor_tokens is -1" in failed.stderr


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
        ((chat_folder, "--prefill-depth", 0), "prefill_depth is 0"),
        ((tiny_llama, "--prefill-depth", 3), "no tokenizer"),
    ):
        failed = pop("calibrate", *arguments, *options)
        assert failed.exit_code == 1 and message in failed.stderr, failed.stderr
    text.write_text("A line of text, again and again. " * 200)
    failed = pop("calibrate", chat_folder, "--prefill-depth", 6, *options)
    assert failed.exit_code == 1 and "prefill_depth is 6, expected 1 to 5" in failed.stderr
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
