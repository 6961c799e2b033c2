"""Bad arguments of the runner: each raises before anything is changed, and the message names the argument."""

from __future__ import annotations

import pytest
import torch
from helpers import normwise
from pairs import (
    BOUND,
    CONTINUATIONS,
    PROMPTS,
    VOCABULARY,
    load,
    tokens,
)

import pop_ext


@pytest.mark.parametrize(
    "depth", [0, 7, -1, 100, 0.0, 1.5, -0.5, float("nan"), float("inf"), True, False, "3", "0.5", [3], 2**70]
)
def test_bad_depth(tiny_llama, llama, depth):
    for call in (
        lambda: load(tiny_llama, prefill_depth=depth),
        lambda: llama.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=depth),
        lambda: llama.model.generate(PROMPTS, max_new_tokens=2, prefill_depth=depth),
    ):
        with pytest.raises((ValueError, TypeError), match="prefill_depth"):
            call()


@pytest.mark.parametrize("name, value", [
    *(("boundary_tokens", v) for v in (-1, 1.5, True, "1", None)),
    *(("anchor_tokens", v) for v in (-1, 1.5, True, "1", None)),
    *(("max_cache_tokens", v) for v in (0, -1, 1.5, True, "64")),
    *(("dtype", v) for v in (torch.float16, torch.int8, "bfloat17", None)),
])  # fmt: skip
def test_bad_settings(tiny_llama, name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        pop_ext.load(tiny_llama, **{name: value})


@pytest.mark.parametrize("prompts, continuations, match", [
    ([[]], [[1]], "prompts"),
    ([[1], []], [[1], [1]], "prompts"),
    ([[1, VOCABULARY]], [[1]], "prompts"),
    ([[-1]], [[1]], "prompts"),
    ([[2**63]], [[1]], "prompts"),
    ([[1.5]], [[1]], "prompts"),
    ([["a"]], [[1]], "prompts"),
    ([[True]], [[1]], "prompts"),
    ([1, 2], [1, 2], "prompts"),
    (None, [[1]], "prompts"),
    ([[1]], [[VOCABULARY]], "continuations"),
    ([[1]], [[2, -1]], "continuations"),
    ([[1]], [[1], [2]], "continuations"),
    ([[1], [2]], [[1]], "continuations"),
    ([[1]], [[None]], "continuations"),
    ([[1]], [1], "continuations"),
])  # fmt: skip
def test_bad_token_ids(llama, prompts, continuations, match):
    with pytest.raises((ValueError, TypeError), match=match):
        llama.model.logits(prompts, continuations)


@pytest.mark.parametrize("name, value", [("chunk_tokens", 0), ("boundary_tokens", -1), ("anchor_tokens", -1)])
def test_bad_attributes(llama, name, value):
    """The settings are attributes that anyone may set: a bad one raises, when it is set or when it is used."""
    model = llama.model
    try:
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(model, name, value)
            model.logits([tokens(9)], [tokens(2)], prefill_depth=2)
    finally:
        model.chunk_tokens, model.boundary_tokens, model.anchor_tokens = 512, 1, 1


def test_bad_sequences(llama):
    model = llama.model
    one, two = model.new_sequence(), model.new_sequence()
    reference = llama.reference(llama.layers)
    reference.prompt(tokens(9))
    model.prefill([one], [tokens(9)])
    for call, match in [
        (lambda: model.prefill([two, two], [tokens(3), tokens(4)]), "sequence"),
        (lambda: model.prefill([one, two], [tokens(3)]), "prompts"),
        (lambda: model.prefill([one], [tokens(3), tokens(3)]), "prompts"),
        (lambda: model.prefill([one, two], [tokens(3), []]), "prompts"),
        (lambda: model.prefill([one, two], [tokens(3), [VOCABULARY]]), "prompts"),
        (lambda: model.prefill([], []), "sequences"),
        (lambda: model.prefill(["x"], [tokens(3)]), "sequence"),
        (lambda: model.prefill([one], [tokens(3)], prefill_depth=0), "prefill_depth"),
        (lambda: model.decode([one], [VOCABULARY]), "token_ids"),
        (lambda: model.decode([one], [-1]), "token_ids"),
        (lambda: model.decode([one], [1, 2]), "token_ids"),
        (lambda: model.decode([one, one], [1, 2]), "sequence"),
        (lambda: model.decode([], []), "sequences"),
    ]:
        with pytest.raises((ValueError, TypeError), match=match):
            call()
        assert list(one.token_ids) == tokens(9) and one.num_cached == 9
        assert list(two.token_ids) == [] and two.num_cached == 0
    logits = model.decode([one], [5])
    assert normwise(logits[0], reference.decode([5])[0]) <= BOUND
    model.free(one)
    model.free(two)
