"""`deep_tokens`: truncated tokens that go on through all layers, chosen by the attention of the prompt's end; on tiny
models of every family, in float32, against `reference_pop`."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import make_chat_folder, normwise
from pairs import CONTINUATIONS, PROMPTS, Conversation, assert_logits, batched_logits, load, tokens
from typer.testing import CliRunner

from pop_ext import cli
from pop_ext.runtime.selection import following
from pop_ext.vision.spans import ImageSpan

SOME = (0, 5, 1, 8, 6)  # of PROMPTS: longer and shorter than what chooses


@pytest.mark.parametrize("share", [0.05, 0.3, 0.75, 1.0])
def test_a_share_is_the_reference(pair, share):
    pair.model.deep_tokens = share
    for depth, boundary, anchors in [(2, 1, 1), (pair.layers - 2, 5, 0), (1, 3, 4)]:
        pair.model.boundary_tokens, pair.model.anchor_tokens = boundary, anchors
        expected = pair.reference_logits(PROMPTS, CONTINUATIONS, depth, boundary, anchors, share)
        assert_logits(pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=depth), expected)
        assert_logits(batched_logits(pair.model, PROMPTS, CONTINUATIONS, depth), expected)


def test_nothing_and_everything_are_identities(pair):
    """0 is POP to the bit, 1 the full model; in between it is neither."""
    pop = pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=2)
    full = pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=pair.layers)
    found = {}
    for share in (0, 0.0, 1, 1.0, 0.3):
        pair.model.deep_tokens = share
        found[share] = pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=2)
    assert all(torch.equal(a, b) for a, b in zip(found[0], pop, strict=True))
    assert_logits(found[1], full)
    assert normwise(found[0.3][0], pop[0]) > 1e-3 and normwise(found[0.3][0], full[0]) > 1e-3


def test_all_but_one(pair):
    """So many that only one token is not chosen: every other one of the choice's and the passes' places counts."""
    pair.model.deep_tokens = 0.99
    expected = pair.reference_logits(PROMPTS, CONTINUATIONS, 2, share=0.99)
    assert_logits(pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=2), expected)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_what_followed_a_repetition(pair, share):
    """Prompts whose end stood in them, or in the turn before, and what followed: it goes on before all else."""
    end, pair.model.deep_tokens = tokens(5, 4), share
    prompts = [tokens(9, 1) + end + tokens(50, 2) + end, end[2:] + tokens(30, 3) + end, tokens(20, 5) + [7] * 9]
    continuations = [tokens(4, 6)] * 3
    expected = pair.reference_logits(prompts, continuations, 2, share=share)
    pair.model.chunk_tokens = 30
    assert_logits(pair.model.logits(prompts, continuations, prefill_depth=2), expected)
    talk = Conversation(pair, 1, 2, share=share)
    talk.prompt([tokens(30, 1) + end + tokens(4, 2)])
    talk.prompt([tokens(30, 3) + end])
    talk.end()


@pytest.mark.parametrize(
    "ids, expected",
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], 3),
        ([2, 3, 9, 8, 1, 2, 3], None),  # two are too few
        ([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 7),  # the latest
        ([5, 1, 2, 3, 7, 6, 1, 2, 3, 8, 5, 1, 2, 3], 4),  # the longest
        ([4, 4, 4, 4, 4], 4),  # it may overlap the end
        ([1], None),
        ([1, 2], None),
    ],
)
def test_following(ids, expected):
    assert following(ids) == expected


def test_chunks_do_not_matter(pair):
    """Down to one token a pass: the end of the prompt, the chosen tokens and the boundary are cut anywhere."""
    model, prompts, continuations = pair.model, [PROMPTS[i] for i in SOME], [CONTINUATIONS[i][:4] for i in SOME]
    model.deep_tokens, model.boundary_tokens = 0.2, 3
    expected = pair.reference_logits(prompts, continuations, 2, 3, 1, 0.2)
    for chunk in (1, 2, 7, 16, 64, 69, 10_000):
        model.chunk_tokens = chunk
        assert_logits(batched_logits(model, prompts, continuations, 2), expected)


@pytest.mark.parametrize("chunk", [5, 2048])
def test_turns(pair, chunk):
    """Three turns with tokens that were sampled and not run; prompts shorter than the boundary among them."""
    pair.model.chunk_tokens = chunk
    talk = Conversation(pair, 3, 2, boundary=2, share=0.25)
    talk.prompt([tokens(20, 1), tokens(2, 2), tokens(64, 3)])
    talk.decode([tokens(3, 10 + i) for i in range(3)])
    talk.leave_pending(tokens(3, 20))
    talk.prompt([tokens(4, 4), tokens(70, 5), tokens(1, 6)])
    talk.prompt([tokens(24, 7), tokens(7, 8), tokens(40, 9)], depth=pair.layers - 2)
    talk.decode([tokens(3, 30)])
    talk.end()


def test_load_and_times(tiny_llama, llama):
    model = load(tiny_llama, prefill_depth=2, deep_tokens=0.25)
    assert_logits(model.logits(PROMPTS, CONTINUATIONS), llama.reference_logits(PROMPTS, CONTINUATIONS, 2, share=0.25))
    times = model.generate([PROMPTS[0]], max_new_tokens=2).times
    assert times.selection > 0
    model.deep_tokens = 0
    assert model.generate([PROMPTS[0]], max_new_tokens=2).times.selection == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.1", True, None])
def test_not_a_share(tiny_llama, share):
    with pytest.raises(ValueError, match=r"deep_tokens is .*expected a share in"):
        load(tiny_llama, deep_tokens=share)


def test_not_with_a_prefix_cache(tiny_llama):
    with pytest.raises(ValueError, match=r"deep_tokens is 0\.1, expected 0 with prefix_cache"):
        load(tiny_llama, deep_tokens=0.1, prefix_cache=True)


def test_not_with_images(llama):
    """Nothing of the turn stays."""
    llama.model.deep_tokens, sequence = 0.2, llama.model.new_sequence()
    sequence.token_ids += tokens(9)
    sequence.visuals.append(ImageSpan(2, 5, None, None))
    with pytest.raises(ValueError, match=r"deep_tokens is 0\.2, expected 0 for a conversation with images"):
        llama.model.prefill([sequence], [tokens(20)], prefill_depth=2)
    assert sequence.token_ids == tokens(9) and sequence.num_cached == 0


# The commands


def pop(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_generate(tiny_llama, tmp_path_factory):
    folder = make_chat_folder(tiny_llama, tmp_path_factory)
    options = ("generate", folder, "--prompt", "Hello, who are you?", "--prefill-depth", 2, "--dtype", "float32",
               "--max-new-tokens", 4, "--deep-tokens", 0.25)  # fmt: skip
    line = pop(*options).stderr
    assert "prefill depth 2 of 6, own projections, 25% deep tokens; " in line and ", selection 0." in line
    found = json.loads(pop(*options, "--json").stdout)
    assert found["deep_tokens"] == 0.25 and found["times"]["selection"] > 0
    assert pop(*options[:-1], 1.5).exit_code == 2


def test_evaluate(tiny_llama, tmp_path_factory, tmp_path):
    """A row for each share; everything is the full model."""
    folder = make_chat_folder(tiny_llama, tmp_path_factory)
    (tmp_path / "text").write_text("Some text, and some more of it. " * 40)
    options = ("evaluate", folder, "--text", tmp_path / "text", "--prefill-depth", 2, "--prompts", 2, "--prompt-tokens",
               64, "--continuation-tokens", 4, "--dtype", "float32", "--deep-tokens", 0, "--deep-tokens", 0.5,
               "--deep-tokens", 1)  # fmt: skip
    rows = json.loads(pop(*options, "--json").stdout)
    assert [(row["method"], row["deep_tokens"]) for row in rows] == [
        ("full", 0.0), ("pop_uncalibrated", 0.0), ("pop_uncalibrated", 0.5), ("pop_uncalibrated", 1.0)
    ]  # fmt: skip
    assert rows[1]["kl"] > rows[2]["kl"] > 1e-3 and abs(rows[3]["kl"]) < 1e-6
    assert "2, own weights, 50% deep" in " ".join(pop(*options).stdout.split())
