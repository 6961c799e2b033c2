"""Forks and the prefix cache: what conversations share of the cache changes no result, in float32, with a boundary,
anchors, windows, calibrations and images; and blocks are copied, kept, forgotten and given back as they should be.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import normwise, tiny_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from vision_models import TINY_VISION, picture

import pop_ext
from pop_ext.analysis import calibration as calibrations
from pop_ext.runtime.kv_cache import BLOCK_SIZE, CacheFullError

BOUND = 1e-5
FAMILIES = ("llama", "gemma3")  # the second has windows of 9 tokens on some layers
VOCABULARY = 250


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(104729 * seed + count)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def load(folder, **options):
    return pop_ext.load(folder, dtype=torch.float32, **options)


_models: dict = {}


@pytest.fixture(params=FAMILIES)
def models(request, tmp_path_factory):
    """Two of one checkpoint: without a prefix cache and with an empty one."""
    if request.param not in _models:
        folder = tiny_folder(request.param, tmp_path_factory)
        _models[request.param] = load(folder), load(folder, prefix_cache=True)
    plain, shared = _models[request.param]
    reset(plain), reset(shared)
    return plain, shared


def reset(model) -> None:
    model.cache.forget(list(model.cache.prefixes))
    model.boundary_tokens, model.anchor_tokens, model.chunk_tokens, model.prefill_depth = 1, 1, 2048, 3
    assert len(model.cache.free_blocks) == model.cache.num_blocks and not any(model.cache.references)


def same(ours, expected, prompts) -> None:
    """Greedy tokens, and log-probabilities of what was chosen."""
    assert ours.tokens == expected.tokens
    for prompt, found, wanted in zip(prompts, ours.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=1e-4, msg=str(len(prompt)))


def compare(plain, shared, prompts, **options) -> list[int]:
    """Generates with both; how many tokens the second reused."""
    options = {"max_new_tokens": 3, "do_sample": False, "return_logprobs": True} | options
    found = shared.generate(prompts, **options)
    same(found, plain.generate(prompts, **options), prompts)
    return found.reused_tokens


def cached(model, sequence) -> torch.Tensor:
    """Keys and values of a conversation, [L, 2, tokens, Hkv, E]."""
    blocks = torch.cat([model.cache.data[:, :, block] for block in sequence.blocks], 2)
    return blocks[:, :, : sequence.num_cached].clone()


# Forks


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("boundary, anchors, depth", [(1, 1, 3), (3, 0, 2), (2, 2, 1.0)])
def test_a_fork_is_a_conversation_of_the_same_turns(models, length, boundary, anchors, depth):
    plain, _ = models
    plain.boundary_tokens, plain.anchor_tokens = boundary, anchors
    turns = [tokens(length, 1), [7], tokens(20, 2)]
    others = [[9], tokens(70, 3)]

    def run(sequence, turns):
        return [
            plain.decode([sequence], turn)[0]
            if len(turn) == 1
            else plain.prefill([sequence], [turn], prefill_depth=depth)[0][0]
            for turn in turns
        ]

    start = [[*turns[0]]] if length > 1 else [turns[0]]
    with plain.new_sequence() as one, plain.new_sequence() as alone, plain.new_sequence() as other:
        run(one, start)
        before = cached(plain, one)
        with one.fork() as fork:
            used = plain.cache.num_blocks - len(plain.cache.free_blocks)
            assert used == len(one.blocks) and fork.token_ids == one.token_ids
            # in turn, so that either writes where the other still reads
            ours = [[], []]
            for mine, others_turn in itertools.zip_longest(turns[1:], others):
                ours[0] += run(one, [mine])
                ours[1] += run(fork, [others_turn])
            expected = run(alone, start + turns[1:])[1:], run(other, start + others)[1:]
            for found, wanted in zip(ours, expected, strict=True):
                assert normwise(torch.stack(found), torch.stack(wanted)) <= BOUND
            for sequence, reference in ((one, alone), (fork, other)):
                assert normwise(cached(plain, sequence), cached(plain, reference)) <= BOUND
                assert torch.equal(cached(plain, sequence)[:, :, :length], before)
    assert len(plain.cache.free_blocks) == plain.cache.num_blocks


def test_forks_are_closed_in_any_order(models):
    plain, _ = models
    for order in itertools.permutations(range(3)):
        one = plain.new_sequence()
        plain.prefill([one], [tokens(100)])
        family = [one, one.fork()]
        family.append(family[1].fork())
        family[order[0]].close()
        rest = [family[i] for i in order[1:]]
        found = plain.decode(rest, [5, 5])  # a batch of two that share all blocks
        assert normwise(found[0], found[1]) <= BOUND
        with plain.new_sequence() as alone:
            plain.prefill([alone], [tokens(100)])
            assert normwise(found[0], plain.decode([alone], [5])[0]) <= BOUND
        for sequence in rest:
            sequence.close()
            sequence.close()  # again: nothing
        assert len(plain.cache.free_blocks) == plain.cache.num_blocks and not any(plain.cache.references)
    with pytest.raises(ValueError, match="was freed, expected a conversation that is open"):
        one.fork()
    with pytest.raises(ValueError, match="was freed"):
        plain.decode([one], [5])


def test_a_fork_keeps_the_token_that_waits(models):
    plain, _ = models
    output = plain.generate([tokens(70)], max_new_tokens=4, do_sample=False, keep=True)
    (one,) = output.sequences
    assert len(one.token_ids) == one.num_cached + 1
    with one, one.fork() as fork:
        rest = [
            plain.generate([tokens(9)], sequences=[s], keep=True, max_new_tokens=6, do_sample=False)
            for s in (one, fork)
        ]
        assert rest[0].tokens == rest[1].tokens and one.token_ids == fork.token_ids


def test_a_full_cache_counts_copies(tiny_llama):
    """The last holder of a block writes in place, so two forks of one partial block need a single copy."""
    model = load(tiny_llama, max_cache_tokens=2 * BLOCK_SIZE)
    with model.new_sequence() as one:
        model.prefill([one], [tokens(30)])
        with one.fork() as fork:
            model.decode([one, fork], [5, 6])
            with fork.fork() as third:
                before = list(third.blocks), list(third.token_ids)
                with pytest.raises(CacheFullError, match=r"1 more blocks .* 0 of 2 are free; close a conversation"):
                    model.decode([third], [7])
                assert (third.blocks, third.token_ids) == before
            model.decode([fork], [7])
    assert len(model.cache.free_blocks) == 2


# The prefix cache


@pytest.mark.parametrize("depth", [3, 1.0])
@pytest.mark.parametrize("boundary", [0, 1, 2, 3])
@pytest.mark.parametrize("anchors", [0, 1, 2])
def test_prompts_that_begin_alike(models, boundary, anchors, depth):
    """Around block edges: what the boundary of either prompt touches is not shared, and results are the same."""
    plain, shared = models
    for model in models:
        model.boundary_tokens, model.anchor_tokens, model.chunk_tokens = boundary, anchors, 50
    for length in range(127, 132):
        # blocks without a token of the prompt's boundary, or its last one
        whole = (length - max(boundary, 1)) // BLOCK_SIZE * BLOCK_SIZE
        short = tokens(length, length)
        assert compare(plain, shared, [short], prefill_depth=depth) == [0]
        assert compare(plain, shared, [short + tokens(40)], prefill_depth=depth) == [whole]
        assert compare(plain, shared, [short], prefill_depth=depth) == [whole]
        assert compare(plain, shared, [short + tokens(80)], prefill_depth=depth) == [length // BLOCK_SIZE * BLOCK_SIZE]


def test_other_settings_share_nothing(models):
    plain, shared = models
    prompt = tokens(150)
    for depth, anchors in ((3, 1), (2, 1), (3, 0), (3, 2), (1.0, 1)):
        for model in models:
            model.anchor_tokens = anchors
        assert compare(plain, shared, [prompt], prefill_depth=depth) == [0]
        assert compare(plain, shared, [prompt], prefill_depth=depth) == [128]
    # the boundary is no such setting: no shared block has a token of it
    for model in models:
        model.boundary_tokens, model.anchor_tokens = 3, 1
    assert compare(plain, shared, [prompt], prefill_depth=3) == [128]


def test_anchors_of_more_than_a_block(models):
    for model in models:
        model.anchor_tokens = 100
    start = tokens(180)
    assert compare(*models, [start[:90]]) == [0]
    assert compare(*models, [start]) == [64]
    assert compare(*models, [[*start, 5]]) == [128]


@pytest.mark.parametrize("chunk", [7, 64, 2048])
def test_rows_of_a_batch_share(models, chunk):
    plain, shared = models
    for model in models:
        model.chunk_tokens = chunk
    start = tokens(140, 1)
    prompts = [start + tokens(9, 1), start + tokens(80, 2), start[:70], tokens(100, 3), start]
    before = len(shared.cache.free_blocks)
    assert compare(plain, shared, prompts) == [0, 128, 64, 0, 128]
    assert compare(plain, shared, prompts) == [128, 192, 64, 64, 128]
    assert before - len(shared.cache.free_blocks) == len(shared.cache.prefixes) == 2 + 1 + 1


def test_conversations_go_on(models):
    """A first turn that shares, kept, forked and continued."""
    prompt, options = tokens(150), {"max_new_tokens": 5, "do_sample": False, "return_logprobs": True, "keep": True}
    outputs = []
    for model in models:
        model.generate([prompt], max_new_tokens=1)
        first = model.generate([prompt], **options)
        fork = first.sequences[0].fork()
        second = model.generate([tokens(30)], sequences=first.sequences, **options)
        other = model.generate([tokens(90)], sequences=[fork], **options)
        outputs.append((first, second, other))
        first.sequences[0].close(), fork.close()
    assert outputs[1][0].reused_tokens == [128] and outputs[1][1].reused_tokens == [0]
    for found, wanted in zip(outputs[1], outputs[0], strict=True):
        same(found, wanted, [prompt])


def test_room_is_made_for_conversations(tmp_path_factory):
    """What was used longest ago goes first, the end of a prompt before its start; what is in use stays."""
    folder = tiny_folder("llama", tmp_path_factory)
    plain, shared = load(folder), load(folder, prefix_cache=True, max_cache_tokens=6 * BLOCK_SIZE)
    first, second = tokens(2 * BLOCK_SIZE + 5, 1), tokens(2 * BLOCK_SIZE + 5, 2)
    assert [compare(plain, shared, [p]) for p in (first, second, first)] == [[0], [0], [128]]
    with shared.new_sequence() as sequence:
        shared.prefill([sequence], [tokens(2 * BLOCK_SIZE + 1, 3)])  # three of six blocks
        assert len(shared.cache.prefixes) == 3
        assert compare(plain, shared, [first]) == [128]
        with pytest.raises(CacheFullError, match="3 of 6 are free"):
            shared.generate([tokens(4 * BLOCK_SIZE, 4)], max_new_tokens=2)
        assert compare(plain, shared, [second[:30]]) == [0]
    assert compare(plain, shared, [second]) == [0]
    assert len(shared.cache.free_blocks) + len(shared.cache.prefixes) == 6


def test_a_failure_leaves_no_prefix(models, monkeypatch):
    """Blocks that a pass did not fill are no one's prefix afterwards."""
    plain, shared = models
    start = tokens(140)
    compare(plain, shared, [start[:70]])
    shared.chunk_tokens = 40
    with monkeypatch.context() as patch:
        forward, calls = shared._forward, iter(range(100))
        patch.setattr(shared, "_forward", lambda *args: forward(*args) if next(calls) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shared.generate([start, start + tokens(70)], max_new_tokens=2)
    assert len(shared.cache.prefixes) == 1
    assert len(shared.cache.free_blocks) == shared.cache.num_blocks - 1
    assert compare(plain, shared, [start]) == [64]


@pytest.mark.parametrize("rank", [0, 8])
def test_calibrated(tmp_path_factory, tmp_path, rank):
    """Features of the token before are there also where it was not computed."""
    folder = tiny_folder("llama", tmp_path_factory)
    plain = load(folder)
    windows = [tokens(64, seed) for seed in range(8)]
    calibrations.calibrate(plain, windows, [3], rank=rank).save(tmp_path / "c.safetensors")
    models = [load(folder, calibration=tmp_path / "c.safetensors", prefix_cache=share) for share in (False, True)]
    start = tokens(150)
    for chunk in (1, 30, 2048):
        for model in models:
            model.chunk_tokens = chunk
        reset_prefixes = list(models[1].cache.prefixes)
        models[1].cache.forget(reset_prefixes)
        assert compare(*models, [start], prefill_depth=3) == [0]
        assert compare(*models, [start + tokens(40), start[:65]], prefill_depth=3) == [128, 64]
        logits = [model.generate([start + [3] * 9], max_new_tokens=8, return_logprobs=True) for model in models]
        same(logits[1], logits[0], [start])
    # the calibration is part of what a block depends on
    models[0].calibration, models[1].calibration = None, None
    assert compare(*models, [start], prefill_depth=3) == [0]


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_images(tmp_path_factory, family):
    """What an image shows, and where it lies, is part of what its tokens and all later ones are. Blocks end within
    images; Gemma's tokens see the rest of theirs.
    """
    folder = TINY_VISION[family].make(tmp_path_factory.mktemp("prefix") / family, seed=3)
    plain, shared = load(folder), load(folder, prefix_cache=True)
    mark = plain.vision.written("image", plain.tokenizer)
    pictures = [picture(40, 30), picture(33, 33)]
    for before in (0, 50, 57):
        text = "x" * before + mark + "y" * 130
        for boundary, anchors in ((1, 1), (3, 0), (2, 60)):
            for model in (plain, shared):
                model.boundary_tokens, model.anchor_tokens, model.chunk_tokens = boundary, anchors, 37
            shared.cache.forget(list(shared.cache.prefixes))

            def ask(prompt, images):
                return compare(plain, shared, [prompt], images=[images], prefill_depth=3)[0]

            for image in (*pictures, mirrored(pictures[0])):  # the first and last have the same tokens
                assert ask(text, [image]) == 0
                assert ask(text + "z" * 9, [image]) >= 128
            assert ask(text + mark + "w", [*pictures[:1], pictures[1]]) >= 128
            assert ask(text + mark + "w" * 80, [*pictures[:1], pictures[1]]) >= 128
            assert ask("x" * 70, []) <= 64
    # two images in another order
    both = mark + mark + "y" * 70
    assert ask(both, pictures) == 0
    assert ask(both, pictures[::-1]) == 0
    assert ask(both, pictures) >= 64


def mirrored(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_bad_setting(tiny_llama):
    with pytest.raises(TypeError, match="prefix_cache is 1, expected a bool"):
        load(tiny_llama, prefix_cache=1)


# Random conversations

LENGTH = st.sampled_from([64, 128]).flatmap(lambda edge: st.integers(edge - 2, edge + 4)) | st.integers(1, 140)
TURN = st.tuples(st.integers(0, 1), LENGTH, st.integers(0, 3))  # which common start, its length, what follows


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.lists(TURN, min_size=1, max_size=3), min_size=2, max_size=5),
    boundary=st.integers(1, 3),
    anchors=st.integers(0, 2),
    depth=st.sampled_from([1, 3, 1.0]),
    chunk=st.sampled_from([5, 64, 2048]),
    capacity=st.integers(12, 20),
)
def test_random_conversations(tmp_path_factory, family, calls, boundary, anchors, depth, chunk, capacity):
    """Batches of prompts with common starts, some kept, forked and continued, in a cache that is often full."""
    folder = tiny_folder(family, tmp_path_factory)
    key = family, capacity
    if key not in _models:
        _models[key] = load(folder), load(folder, prefix_cache=True, max_cache_tokens=capacity * BLOCK_SIZE)
    plain, shared = _models[key]
    for model in (plain, shared):
        model.cache.forget(list(model.cache.prefixes))
        model.boundary_tokens, model.anchor_tokens, model.chunk_tokens = boundary, anchors, chunk
    options = {"max_new_tokens": 3, "do_sample": False, "return_logprobs": True, "prefill_depth": depth}
    for number, call in enumerate(calls):
        prompts = [tokens(160, start)[:length] + tokens(more, 90 + more) for start, length, more in call]
        outputs = [model.generate(prompts, keep=True, **options) for model in (plain, shared)]
        same(outputs[1], outputs[0], prompts)
        turns = [tokens(1 + number * 7, i) for i in range(len(prompts))]
        forks = [[s.fork() for s in output.sequences] for output in outputs]
        further = [
            model.generate(turns, sequences=output.sequences, **options)
            for model, output in zip((plain, shared), outputs, strict=True)
        ]
        same(further[1], further[0], turns)
        further = [
            model.generate(turns[::-1], sequences=f, **options) for model, f in zip((plain, shared), forks, strict=True)
        ]
        same(further[1], further[0], turns)
        for model in (plain, shared):
            held = len(model.cache.prefixes)
            assert sum(model.cache.references) == held
            assert len(model.cache.free_blocks) == model.cache.num_blocks - held
