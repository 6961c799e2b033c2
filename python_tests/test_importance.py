"""Virtual gates: against finite differences, the Hessian over all labels, and POP itself."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import TINY, make_chat_folder, pop, tiny_folder

import pop_ext
from pop_ext.analysis import importance


def windows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(293, (count, length), generator=generator).tolist()


@pytest.fixture(scope="module")
def small():
    """A model with a vocabulary so small that every label can be summed over, in float64."""
    import transformers
    from helpers import randomise

    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    randomise(model, 3)
    return model


def log_probabilities(model, tokens, prompt: int, values, branches: bool):
    gates = importance.Gates(model, branches)
    acts = importance.stage_masks(tokens.shape[1], prompt, 1, 1)
    with gates(values, acts.to(values.dtype)):
        return model(input_ids=tokens).logits[:, prompt - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("branches", [False, True])
def test_gradients_are_finite_differences(small, branches):
    torch.manual_seed(0)
    tokens, prompt = torch.randint(11, (1, 12)), 7
    labels = torch.randint(11, (1, 5, 1))
    shape = importance.Gates(small, branches).shape(1)

    def loss(values):
        return -log_probabilities(small, tokens, prompt, values, branches).gather(-1, labels).sum()

    values = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(loss(values), values)[0]
    for index in torch.cartesian_prod(*(torch.arange(n) for n in shape[1:])):
        step = torch.zeros(shape, dtype=torch.float64)
        step[(0, *index)] = 0.02  # transformers' norms round to float32 whatever the model's dtype
        near, far = (loss(values.detach() + k * step) - loss(values.detach() - k * step) for k in (1, 2))
        numeric = (8 * near - far) / (12 * 0.02)  # of fourth order
        assert abs(gradient[(0, *index)] - numeric) < 2e-4 * (1 + abs(numeric))


def test_importance_is_half_the_expected_hessian(small):
    """Half the Hessian's diagonal averaged over every label, by second differences of the loss, against many draws."""
    torch.manual_seed(1)
    tokens, prompt = torch.randint(11, (1, 9)), 5
    shape = importance.Gates(small).shape(1)
    ones = torch.ones(shape, dtype=torch.float64)
    weights = log_probabilities(small, tokens, prompt, ones, False).exp()

    def expected_loss(values):  # over y ~ p with open gates, exactly: a sum over the vocabulary at each position
        return -(weights * log_probabilities(small, tokens, prompt, values, False)).sum()

    exact = torch.zeros(shape[1:], dtype=torch.float64)
    for index in torch.cartesian_prod(torch.arange(shape[1]), torch.arange(2)):
        step = torch.zeros(shape, dtype=torch.float64)
        step[(0, *index)] = 1e-3
        exact[tuple(index)] = (
            0.5 * (expected_loss(ones + step) - 2 * expected_loss(ones) + expected_loss(ones - step)) / 1e-6
        )
    draws = 4000
    measured = importance.measure(small.float(), tokens.tolist(), prompt, draws=draws)
    small.double()
    assert (exact[:-1] > 1e-3).all() and exact[-1, 1] > 1e-3
    # A chi-squared variable of one degree of freedom has a standard deviation of sqrt(2) times its mean; the labels'
    # spread can be wider: five standard errors of twice that.
    assert ((measured.values - exact).abs() <= 5 * 2 * 2**0.5 * exact / draws**0.5 + 1e-9).all()


def test_last_layer_does_not_matter_for_prefill(tiny):
    model = importance.load_transformers(tiny)
    result = importance.measure(model, windows(2, 40), 30, draws=2)
    assert result.values[-1, 0] == 0.0
    assert (result.values[:-1, 0] > 0).all() and (result.values[:, 1] > 0).all()


def test_does_not_depend_on_the_batch(tiny_llama):
    model = importance.load_transformers(tiny_llama)
    one, three = (importance.measure(model, windows(5, 30), 20, batch_size=size, draws=3) for size in (1, 3))
    torch.testing.assert_close(one.values, three.values, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(one.errors, three.errors, rtol=1e-3, atol=1e-6)
    other = importance.measure(model, windows(5, 30), 20, seed=1, draws=3)
    assert not torch.allclose(one.values, other.values, rtol=1e-2)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("boundary, anchors", [(1, 1), (4, 0), (2, 3), (0, 0), (0, 2)])
def test_closed_prefill_gates_are_pop(name, boundary, anchors, tmp_path_factory):
    """KL by closing gates in transformers' model, and by the runner with own weights."""
    folder = tiny_folder(name, tmp_path_factory)
    model = pop_ext.load(folder, dtype=torch.float32, boundary_tokens=boundary, anchor_tokens=anchors)
    depth, (window,) = 2, windows(1, 44, seed=5)
    full, cut = (
        model.logits([window[:30]], [window[30:]], prefill_depth=p)[0].double().log_softmax(-1) for p in (1.0, depth)
    )
    expected = float((full.exp() * (full - cut)).sum(-1).mean())
    found = importance.truncation_kl(
        importance.load_transformers(folder), [window], 30, depth, boundary_tokens=boundary, anchor_tokens=anchors
    )
    assert expected > 0.01 and found == pytest.approx(expected, rel=1e-3)


def test_what_is_kept_for_other_depths_changes_nothing(tiny_llama):
    model, full = importance.load_transformers(tiny_llama), {}
    for depth in (4, 2, 3):
        kept = importance.truncation_kl(model, windows(3, 40), 30, depth, full=full)
        assert kept == importance.truncation_kl(model, windows(3, 40), 30, depth)
    assert full.keys() == {0, 1, 2}


def test_branches_cover_every_family(tiny):
    model = importance.load_transformers(tiny)
    result = importance.measure(model, windows(1, 24), 16, draws=1, branches=True)
    assert result.values.shape == (model.config.num_hidden_layers, 2, 2)
    assert (result.values[-1, 0] == 0).all() and (result.values[:-1] > 0).all()


def test_both_branches_closed_is_the_layer_closed(tiny_gemma):
    model = importance.load_transformers(tiny_gemma)
    tokens = torch.tensor(windows(1, 24))
    layer, branch = (torch.ones(importance.Gates(model, b).shape(1)) for b in (False, True))
    layer[:, 2], branch[:, 2] = 0, 0
    results = [log_probabilities(model, tokens, 16, v, b) for v, b in ((layer, False), (branch, True))]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_depth_search():
    curve = {1: 2.0, 2: 1.0, 3: 0.6, 4: 0.3, 5: 0.2, 6: 0.04, 7: 0.0}
    for budget, depth in ((0.05, 6), (0.25, 5), (0.6, 3), (3.0, 1), (0.0, 7)):
        found, measured = importance.suggest_depth(8, budget, curve.get)
        assert found == depth and measured.items() <= curve.items()
    assert importance.suggest_depth(8, 0.05, lambda depth: 0.2, boundary_tokens=0)[0] == 8
    dip = {**curve, 4: 0.04}  # not monotone: 4 is within, 5 is not
    assert importance.suggest_depth(8, 0.05, dip.get)[0] == 4


def test_command(tiny_llama, tmp_path_factory, tmp_path):
    folder = make_chat_folder(tiny_llama, tmp_path_factory)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = ("--text", tmp_path / "text.txt", "--prompts", 3, "--prompt-tokens", 30, "--continuation-tokens", 10)
    result = pop(
        "importance", folder, *options, "--json", "--output", tmp_path / "i.json", "--plot", tmp_path / "i.png"
    )
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == json.loads((tmp_path / "i.json").read_text())
    assert len(summary["importance"]) == 12 and summary["importance"][-2]["importance"] == 0
    suggested = {row["prefill_depth"]: row["kl"] for row in summary["depths"]}[summary["suggested_depth"]]
    assert suggested <= summary["budget"]
    assert (tmp_path / "i.png").read_bytes().startswith(b"\x89PNG")
    shown = pop("importance", folder, *options)
    assert shown.exit_code == 0 and "own weights. Calibrated projections allow fewer layers" in shown.stdout
    asked = pop("importance", folder, *options, "--json", "--prefill-depth", 1, "--prefill-depth", "0.33")
    found = {row["prefill_depth"]: row["kl"] for row in json.loads(asked.stdout)["depths"]}
    assert found.keys() >= {1, 2} and found[1] > found[5] == 0


def test_bad_input(tiny_llama, tmp_path_factory, tmp_path):
    folder = make_chat_folder(tiny_llama, tmp_path_factory)
    text = tmp_path / "short.txt"
    text.write_text("short")
    assert "tokens, expected at least" in pop("importance", folder, "--text", text).stderr
    text.write_text("The quick brown fox. " * 400)
    failed = pop("importance", tiny_llama, "--text", text)
    assert failed.exit_code == 1 and "no tokenizer" in failed.stderr
    for depth in ("0", "6", "-1", "1.0", "1.5"):
        failed = pop("importance", folder, "--text", text, f"--prefill-depth={depth}")
        assert (
            failed.exit_code == 1
            and f"--prefill-depth is {depth}, expected 1 to 5 of the model's 6 layers" in failed.stderr
        )
    failed = pop("importance", folder, "--text", text, "--output", tmp_path / "no" / "folder.json")
    assert failed.exit_code == 1 and "folder that exists" in failed.stderr
    failed = pop(
        "importance", folder, "--text", text, "--prompts", 1, "--prompt-tokens", 20, "--plot", tmp_path / "x.pt"
    )
    assert failed.exit_code == 1 and "no format for plots" in failed.stderr and not list(tmp_path.glob("*.pt"))
