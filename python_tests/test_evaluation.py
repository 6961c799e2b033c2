"""Fidelity: every method against transformers, the statistics against plain formulas, the command."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from helpers import make_chat_folder, normwise, pop, transformers_model
from reference_pop import ReferencePOP

import pop_ext
from pop_ext.analysis import baselines, calibration, evaluation, tasks, text


def random_windows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(293, (count, length), generator=generator).tolist()


@pytest.mark.parametrize("removed", [[4], [1, 2], [0, 3], [0, 1, 2, 3, 4]])
def test_removed_layers_are_gone(tiny, removed):
    """Against transformers' model without these modules."""
    model = baselines.without_layers(pop_ext.load(tiny, dtype=torch.float32), removed)
    reference = transformers_model(tiny)
    kept = [i for i in range(reference.config.num_hidden_layers) if i not in removed]
    if not kept:
        pytest.skip("a model of this depth would have no layer left")
    reference.model.layers = torch.nn.ModuleList(reference.model.layers[i] for i in kept)
    types = getattr(reference.config, "layer_types", None)
    if types:
        reference.config.layer_types = [types[i] for i in kept]
    reference.config.num_hidden_layers = len(kept)
    for index, layer in enumerate(reference.model.layers):
        layer.self_attn.layer_idx = index
    (window,) = random_windows(1, 40)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([window])).logits[0, 29:39]
    assert normwise(model.logits([window[:30]], [window[30:]])[0], expected) < 1e-5


class ReferenceSpeed(ReferencePOP):
    """Truncated tokens leave no keys and values at the deep layers; masks see the true distances."""

    def _run(self, token_ids, full):
        if not hasattr(self, "positions"):
            self.positions = []  # of the tokens that the deep layers see
        if full:
            self.positions += range(self.length, self.length + len(token_ids))
        return super()._run(token_ids, full)

    def _project(self, hidden, layer, rope, index):
        pass

    def _mask(self, positions, index, dtype):
        mask = super()._mask(positions, index, dtype)
        return mask if index < self.prefill_depth else mask[..., self.positions]


@pytest.mark.parametrize("boundary, anchors", [(1, 1), (3, 0), (2, 4), (0, 0)])
def test_deep_tokens_only(tiny, boundary, anchors):
    """SPEED's inference against transformers' modules; the windows of some are shorter than the prompt."""
    model = pop_ext.load(tiny, dtype=torch.float32, boundary_tokens=boundary, anchor_tokens=anchors)
    speed = baselines.SpeedBaseline(model)
    speed.chunk_tokens = 13
    (window,) = random_windows(1, 40)
    expected = ReferenceSpeed(transformers_model(tiny, attention="eager"), 2, boundary, anchors).logits(
        window[:30], window[30:]
    )
    found = speed.logits([window[:30]], [window[30:]], prefill_depth=2)[0]
    assert normwise(found, expected) < 1e-5
    # and the model it was made of is as it was
    assert normwise(model.logits([window[:30]], [window[30:]], prefill_depth=2)[0], expected) > 1e-2


def test_what_layers_are_chosen_by(tiny_llama):
    model, windows = pop_ext.load(tiny_llama, dtype=torch.float32), random_windows(3, 30)
    influence, angles = baselines.layer_similarity(model, windows)
    reference = transformers_model(tiny_llama)
    states = []
    reference.model.layers[-1].register_forward_hook(lambda module, args, output: states.append(output))
    expected, last = np.zeros(6), np.zeros(7)
    for window in windows:
        with torch.no_grad():
            hidden = reference(input_ids=torch.tensor([window]), output_hidden_states=True).hidden_states
        hidden = [h[0].double().numpy() for h in (*hidden[:-1], states.pop())]  # the last without the final norm
        cos = [np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
               for a, b in itertools.pairwise(hidden)]  # fmt: skip
        expected += [1 - c.mean() for c in cos]
        for i in range(7):
            a, b = hidden[0][-1], hidden[i][-1]
            last[i] += math.acos(min(1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b))) / math.pi
    np.testing.assert_allclose(influence.numpy(), expected / 3, atol=1e-5)
    np.testing.assert_allclose(angles[0].numpy(), last / 3, atol=1e-3)


@pytest.fixture(scope="module")
def calibrated(tiny_llama, tmp_path_factory):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    path = tmp_path_factory.mktemp("calibration") / "c.safetensors"
    calibration.calibrate(model, random_windows(20, 60, seed=1), [3]).save(path)
    return pop_ext.load(tiny_llama, dtype=torch.float32, calibration=path)


def test_statistics(calibrated):
    """Every figure of a row against its definition, computed from logits in float64."""
    windows = random_windows(5, 40, seed=2)
    prompts, continuations = [w[:30] for w in windows], [w[30:] for w in windows]
    results = evaluation.evaluate(calibrated, prompts, continuations, [3, 4])
    assert [(r.method, r.prefill_depth) for r in results] == [
        ("full", 6), ("pop_uncalibrated", 3), ("pop_calibrated", 3), ("last_layers_removed", 3), ("shortgpt", 3),
        ("gromov", 3), ("speed", 3), ("pop_uncalibrated", 4), ("last_layers_removed", 4), ("shortgpt", 4),
        ("gromov", 4), ("speed", 4),
    ]  # fmt: skip
    row = results[2]
    kl, nll, top, first = [], [], [], []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        p, q = (
            calibrated.logits([prompt], [continuation], prefill_depth=d)[0].double().log_softmax(-1) for d in (6, 3)
        )
        each = (p.exp() * (p - q)).sum(-1)
        kl.append(each.mean().item())
        first.append(each[0].item())
        nll.append(-q[range(10), continuation].mean().item())
        top.append((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert row.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert row.first_token_kl == pytest.approx(np.mean(first), rel=1e-3)
    assert row.perplexity == pytest.approx(math.exp(np.mean(nll)), rel=1e-4)
    assert row.top1_agreement == pytest.approx(np.mean(top))
    assert row.kl_ci95[0] < row.kl < row.kl_ci95[1] and row.prefill_seconds > 0
    assert row.top1_ci95[0] <= row.top1_agreement <= row.top1_ci95[1]
    assert row.speedup_quartiles[0] <= row.speedup <= row.speedup_quartiles[1]
    assert results[0].kl == 0 and results[0].top1_agreement == 1
    best = min((r for r in results if r.prefill_depth == 3), key=lambda r: r.kl)
    assert best.excess_interval == (0, 0)
    assert all(r.excess_interval[1] >= 0 for r in results)


def test_bootstrap_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    resamples = np.random.default_rng(1).integers(400, size=(4000, 400))
    low, high = evaluation.interval(values, resamples)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_windows_start_as_the_tokenizer_says(tiny_llama, tmp_path_factory):
    tokenizer = pop_ext.load(make_chat_folder(tiny_llama, tmp_path_factory)).tokenizer
    source = "".join(f"{i} words. " for i in range(500))
    bos, tokens = text.encode(tokenizer, source)
    assert tokenizer(source).input_ids == bos + tokens
    found = text.windows(tokenizer, source, 50)
    assert len(found) == len(tokens) // (50 - len(bos)) and all(w[: len(bos)] == bos for w in found)
    assert [t for w in found for t in w[len(bos) :]] == tokens[: len(found) * (50 - len(bos))]
    spread = text.windows(tokenizer, source, 50, 3)
    assert len(spread) == 3 and spread[0] == found[0] and all(len(w) == 50 for w in spread)
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, expected at least 50000 for 1000 windows of 50"):
        text.windows(tokenizer, source, 50, 1000)
    with pytest.raises(ValueError, match="leave no room"):
        text.windows(tokenizer, source, len(bos))


@pytest.mark.parametrize("kind", ["retrieval", "copying"])
def test_synthetic_task(kind, tiny_llama, tmp_path_factory):
    tokenizer = pop_ext.load(make_chat_folder(tiny_llama, tmp_path_factory)).tokenizer
    filler = random_windows(6, 400)
    prompts, continuations = tasks.synthetic_task(kind, filler, tokenizer, seed=4)
    assert prompts == tasks.synthetic_task(kind, filler, tokenizer, seed=4)[0]
    for prompt, continuation, window in zip(prompts, continuations, filler, strict=True):
        assert len(prompt) == 400 and prompt[0] == window[0]
        answer = tokenizer.decode(continuation).strip().rstrip(".")
        assert answer and answer in tokenizer.decode(prompt)
    with pytest.raises(ValueError, match="prompts of 10 tokens are too short"):
        tasks.synthetic_task(kind, random_windows(1, 10), tokenizer)


def test_command(tiny_llama, tmp_path_factory, tmp_path):
    folder = make_chat_folder(tiny_llama, tmp_path_factory)
    source = tmp_path / "text.txt"
    source.write_text("".join(f"Line {i} of a text with {i * i} words, more or less. " for i in range(300)))
    calibrate = pop("calibrate", folder, "--prefill-depth", 4, "--text", source, "--output", tmp_path / "c", "--json")
    assert calibrate.exit_code == 0, calibrate.stderr
    options = (
        "evaluate", folder, "--text", source, "--prompts", 3, "--prompt-tokens", 40, "--continuation-tokens", 8,
        "--calibration", tmp_path / "c",
    )  # fmt: skip
    result = pop(*options, "--json", "--baselines", "--plot", tmp_path / "p.svg")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 7 and (tmp_path / "p.svg").read_text().startswith("<?xml")
    expected = {"method", "prefill_depth", "perplexity", "kl", "kl_ci95", "top1_agreement", "first_token_kl"}
    assert expected | {"prefill_seconds", "prompt_tokens"} <= rows[0].keys()
    assert [row["prefill_depth"] for row in rows if row["method"] == "pop_calibrated"] == [4]
    refused = pop(*options, "--prefill-depth", 3)
    assert (
        refused.exit_code == 1 and "--prefill-depth is 3 layers, but the calibration was made for 4" in refused.stderr
    )
    shown = pop(*options, "--prompt-tokens", 60, "--method", "pop_uncalibrated", "--synthetic-task", "retrieval")
    assert shown.exit_code == 1 and "too short" in shown.stderr
    shown = pop(*options, "--prompt-tokens", 60, "--method", "pop_uncalibrated")
    assert shown.exit_code == 0 and "60 prompt tokens" in shown.stdout and "gromov" not in shown.stdout


def test_command_refuses(tiny_llama, tmp_path_factory, tmp_path):
    folder = make_chat_folder(tiny_llama, tmp_path_factory)
    source = tmp_path / "text.txt"
    source.write_text("A line of text, again and again. " * 200)
    options = ("--text", source, "--prompts", 2, "--prompt-tokens", 40)
    for arguments, message in (
        ((folder, *options, "--prefill-depth", 0), "--prefill-depth is 0"),
        ((folder, *options, "--prefill-depth", 6), "--prefill-depth is 6, expected 1 to 5 of the model's 6 layers"),
        (
            (folder, *options, "--method", "magic"),
            "'magic' is not one of 'full', 'pop_uncalibrated', 'pop_calibrated', 'last_layers_removed'",
        ),
        ((folder, *options, "--method", "pop_calibrated"), "--method pop_calibrated needs a calibration"),
        ((folder, *options, "--prompt-tokens", 10000), "--prompt-tokens is 10000, expected at most"),
        ((folder, *options, "--prompts", 1000), "text.txt has"),
        ((folder, "--text", tmp_path / "none.txt"), "Invalid value for '--text'"),
        ((folder, "--text", tmp_path), "Invalid value for '--text'"),
        ((tiny_llama, *options), "no tokenizer"),
        ((folder, *options, "--calibration", source), "not a calibration file"),
        ((folder, *options, "--plot", tmp_path / "p.doc"), "--plot"),
        ((folder,), "give either --text FILE or --chats FILE"),
    ):
        failed = pop("evaluate", *arguments)
        assert failed.exit_code in (1, 2) and message in failed.stderr, failed.stderr


def test_refused_before_weights_are_loaded(tiny_llama, tmp_path_factory, tmp_path, monkeypatch):
    """What can be known without them."""
    folder, source = make_chat_folder(tiny_llama, tmp_path_factory), tmp_path / "text.txt"
    source.write_text("A line of text, again and again. " * 20)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')

    def loading(*arguments, **options):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(pop_ext, "load", loading)
    monkeypatch.setattr("pop_ext.analysis.importance.load_transformers", loading)
    text, output = ("--text", source), ("--output", tmp_path / "o")
    for command, message in (
        (("evaluate", folder, *text, "--prefill-depth", 6), "--prefill-depth is 6"),
        (("evaluate", folder, *text, "--plot", tmp_path / "p.doc"), "no format for plots"),
        (("evaluate", folder, *text), "text.txt has 660 tokens, expected at least 14336 for 32 windows of 448"),
        (("evaluate", folder, "--chats", tmp_path / "chats.jsonl"), "line 1: the last message is"),
        (("calibrate", folder, *text, *output, "--prefill-depth", 0), "--prefill-depth is 0"),
        (("calibrate", folder, *text, "--output", tmp_path / "no" / "o", "--prefill-depth", 2), "folder that exists"),
        (("importance", folder, *text), "text.txt has 660 tokens"),
        (("importance", folder, *text, "--prefill-depth", 9), "--prefill-depth is 9"),
        (("tune", folder, *text, *output), "lower --prompt-tokens"),
        (("tune", folder, *text, *output, "--max-kl", 0), "--max-kl is 0.0, expected more than 0"),
        (("tune", folder, *text, *output, "--max-kl", 1, "--speedup", 2), "--max-kl and --speedup are given"),
        (("tune", folder, *text, *output, "--prefill-depth", 6), "--prefill-depth is 6"),
        (("tune", folder, *text, "--output", tmp_path), "expected a file name"),
    ):
        failed = pop(*command)
        assert failed.exit_code == 1 and message in failed.stderr, (command, failed.stderr, failed.exception)
        assert failed.stderr.count("\n") == 1


def test_gemma_windows_start_with_bos():
    """On a real tokenizer that adds one."""
    from helpers import real_model

    from pop_ext.checkpoints.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(real_model("gemma-3-270m"))
    bos, _ = text.encode(tokenizer, "A text")
    assert bos == [tokenizer.bos_token_id]
    assert all(w[0] == bos[0] for w in text.windows(tokenizer, "A text of some length. " * 30, 20))
