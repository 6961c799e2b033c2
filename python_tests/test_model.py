"""The runner on tiny random models of every family, in float32: full depth against transformers, truncated depth
against `reference_pop`, and what must not change results: batches and chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import normwise, transformers_model
from pairs import (
    BOUND,
    CONTINUATIONS,
    PROMPTS,
    VOCABULARY,
    assert_logits,
    batched_logits,
    load,
    tokens,
)
from reference_pop import ReferencePOP

import pop_ext

# The reference itself


def test_reference_at_full_depth_is_transformers(tiny):
    peer = transformers_model(tiny, torch.float64)
    layers = peer.config.num_hidden_layers
    for prompt, continuation in zip(PROMPTS, CONTINUATIONS, strict=True):
        with torch.no_grad():
            expected = peer(torch.tensor([prompt + continuation[:-1]])).logits[0, len(prompt) - 1 :]
        for depth in (layers, layers - 1):
            assert (
                normwise(ReferencePOP(peer, depth).logits(prompt, continuation), expected) < 1e-6
            )  # its norms are fp32


def test_reference_is_sensitive(pair):
    """Each parameter of the definition changes the logits far beyond the bound, or a comparison would mean nothing."""
    prompt, continuation = tokens(8), tokens(20)  # within every window, or the anchor would not be seen
    variants = {
        (depth, boundary, anchors): pair.reference(depth, boundary, anchors).logits(prompt, continuation)
        for depth in (1, pair.layers - 2, pair.layers) for boundary in (1, 5) for anchors in (0, 1)
    }  # fmt: skip
    for (one, a), (other, b) in itertools.combinations(variants.items(), 2):
        if one[0] == other[0] == pair.layers:
            continue
        assert normwise(a, b) > 100 * BOUND, (one, other)


# Full depth


def test_full_depth_is_transformers(pair):
    expected = [pair.plain_logits(p, c) for p, c in zip(PROMPTS, CONTINUATIONS, strict=True)]
    assert_logits(pair.model.logits(PROMPTS, CONTINUATIONS), expected)
    assert_logits(batched_logits(pair.model, PROMPTS, CONTINUATIONS, None), expected)


def test_greedy_tokens_are_transformers(pair):
    """64 tokens each: transformers, given the same past, chooses the same token unless its two best are a near tie."""
    prompts = PROMPTS[:6]
    output = pair.model.generate(prompts, max_new_tokens=64, do_sample=False)
    ties = 0
    for prompt, made in zip(prompts, output.tokens, strict=True):
        assert len(made) == 64
        logits = pair.plain_logits(prompt, made)
        best = logits.topk(2)
        tie = (best.values[:, 0] - best.values[:, 1]) < 1e-3
        ties += int(tie.sum())
        assert ((logits.argmax(-1) == torch.tensor(made)) | tie).all()
    assert ties <= 4  # of 384: the models are made so that this is rare


def test_last_layer_costs_nothing(pair):
    """P = L - 1 is the plain model."""
    full = pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=pair.layers)
    assert_logits(pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=pair.layers - 1), full, 1e-6)


# Truncated depth


def test_without_a_boundary_the_last_layer_is_missed(pair):
    """At P = L - 1 the logits after the prompt are those of the last layer's input, and all later ones the plain
    model's; at P = L nothing is missed.
    """
    full = pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=pair.layers)
    pair.model.boundary_tokens = pair.model.anchor_tokens = 0
    assert_logits(pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=pair.layers), full, 1e-6)
    found = pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=pair.layers - 1)
    for prompt, ours, expected in zip(PROMPTS, found, full, strict=True):
        last = list(pair.model.hidden_states([prompt]))[-2][-1:]
        assert normwise(ours[0], pair.model.head(last)[0]) <= BOUND and normwise(ours[1:], expected[1:]) <= BOUND
        assert normwise(ours[0], expected[0]) > 1e-3


@pytest.mark.parametrize("anchors", [0, 1])
@pytest.mark.parametrize("boundary", [0, 1, 5])
def test_truncated_depth_is_the_reference(pair, boundary, anchors):
    pair.model.boundary_tokens, pair.model.anchor_tokens = boundary, anchors
    for depth in {1, pair.layers // 2, pair.layers - 2}:
        expected = pair.reference_logits(PROMPTS, CONTINUATIONS, depth, boundary, anchors)
        assert_logits(pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=depth), expected)
        assert_logits(batched_logits(pair.model, PROMPTS, CONTINUATIONS, depth), expected)


def test_settings_of_load(tiny_llama, llama):
    """What `load` is given is what a call that says nothing uses."""
    model = load(tiny_llama, prefill_depth=2, boundary_tokens=3, anchor_tokens=0)
    assert (model.prefill_depth, model.boundary_tokens, model.anchor_tokens) == (2, 3, 0)
    assert_logits(model.logits(PROMPTS, CONTINUATIONS), llama.reference_logits(PROMPTS, CONTINUATIONS, 2, 3, 0))


@pytest.mark.parametrize("boundary, anchors", [(1, 4), (2, 10), (200, 0), (3, 200)])
def test_wide_boundaries_and_anchors(pair, boundary, anchors):
    """More than some prompts have: nothing of those is truncated."""
    pair.model.boundary_tokens, pair.model.anchor_tokens = boundary, anchors
    ours = pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=2)
    assert_logits(ours, pair.reference_logits(PROMPTS, CONTINUATIONS, 2, boundary, anchors))


@pytest.mark.parametrize("boundary", [1, 5, 40])
def test_short_prompts_are_not_truncated(pair, boundary):
    pair.model.boundary_tokens = boundary
    prompts = [tokens(n) for n in (1, boundary, max(boundary - 1, 1))]
    continuations = [tokens(6, 3)] * 3
    expected = [pair.plain_logits(p, c) for p, c in zip(prompts, continuations, strict=True)]
    assert_logits(pair.model.logits(prompts, continuations, prefill_depth=1), expected)


def test_depth_of_a_call(llama):
    """The same model, without reloading: any depth as layers or as a share, and its own again afterwards."""
    L = llama.layers
    expected = {P: llama.reference_logits(PROMPTS, CONTINUATIONS, P) for P in range(1, L + 1)}
    for given, P in [(1, 1), (1.0, L), (0.5, 3), (L, L), (0.4, 2), (0.65, 4), (4, 4), (None, L), (0.99, L), (2, 2)]:
        ours = llama.model.logits(PROMPTS, CONTINUATIONS, **({} if given is None else {"prefill_depth": given}))
        assert_logits(ours, expected[P])


def test_every_instruction_set(isa, llama, gemma):
    for pair in (llama, gemma):
        for depth in (2, pair.layers):
            expected = pair.reference_logits(PROMPTS, CONTINUATIONS, depth, 5)
            pair.model.boundary_tokens = 5
            assert_logits(pair.model.logits(PROMPTS, CONTINUATIONS, prefill_depth=depth), expected)


# Batches and chunks


@pytest.mark.parametrize("boundary", [0, 1, 5])
@pytest.mark.parametrize("anchors", [0, 1, 3])
def test_chunks_do_not_matter(pair, boundary, anchors):
    """Chunk edges fall before, inside and after boundary and anchor; down to one token a chunk."""
    model = pair.model
    model.boundary_tokens, model.anchor_tokens = boundary, anchors
    prompts, continuations = [PROMPTS[i] for i in (0, 5, 1, 8)], [CONTINUATIONS[i][:4] for i in (0, 5, 1, 8)]
    for depth in (2, pair.layers):
        model.chunk_tokens = 10_000
        whole = model.logits(prompts, continuations, prefill_depth=depth)
        assert_logits(whole, pair.reference_logits(prompts, continuations, depth, boundary, anchors))
        for chunk in (1, 2, 3, 7, 16, 64, 68, 69):
            model.chunk_tokens = chunk
            assert_logits(batched_logits(model, prompts, continuations, depth), whole)


@pytest.mark.parametrize("chunk", range(1, 22))
def test_every_chunk_edge(llama, chunk):
    """A prompt of 20 tokens, boundary of 6: an edge at every place, one sequence and two."""
    llama.model.boundary_tokens, llama.model.chunk_tokens = 6, chunk
    prompts, continuations = [tokens(20, 5), tokens(9, 6)], [tokens(3, 7), tokens(2, 8)]
    expected = llama.reference_logits(prompts, continuations, 3, 6)
    assert_logits(llama.model.logits(prompts, continuations, prefill_depth=3), expected)
    assert_logits(batched_logits(llama.model, prompts, continuations, 3), expected)


def test_logits_shapes(llama):
    """One row per continuation token; an empty continuation has none."""
    rows = llama.model.logits([tokens(5), tokens(3), tokens(70)], [tokens(1), [], tokens(4)])
    assert [tuple(row.shape) for row in rows] == [(1, VOCABULARY), (0, VOCABULARY), (4, VOCABULARY)]


def test_bfloat16_runs(pair):
    """The same models in bf16 stay near float32: as near as transformers' own bf16, by a factor of two."""
    ours = pop_ext.load(pair.folder, dtype=torch.bfloat16)
    peer = transformers_model(pair.folder, torch.bfloat16)
    exact = torch.cat([pair.plain_logits(p, c) for p, c in zip(PROMPTS, CONTINUATIONS, strict=True)])
    with torch.no_grad():
        theirs = [
            peer(torch.tensor([p + c[:-1]])).logits[0, len(p) - 1 :]
            for p, c in zip(PROMPTS, CONTINUATIONS, strict=True)
        ]
    error = normwise(torch.cat(ours.logits(PROMPTS, CONTINUATIONS)), exact)
    assert error <= 2 * normwise(torch.cat(theirs).float(), exact)
