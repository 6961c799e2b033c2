"""The cache of keys and values while conversations come and go: freed blocks, growth, a full cache, failures."""

from __future__ import annotations

import contextlib
import re

import pytest
from helpers import normwise
from pairs import (
    BOUND,
    Conversation,
    assert_logits,
    load,
    small,
    tokens,
)


def test_freed_blocks_are_used_again(tiny_llama, llama):
    """A cache of 256 tokens serves many conversations, one after the other, and nothing of them shines through."""
    model = small(tiny_llama, 256)
    for turn in range(6):
        prompts = [tokens(100 + turn, turn), tokens(60, turn)]
        continuations = [tokens(20, turn), tokens(3, turn)]
        assert_logits(model.logits(prompts, continuations), llama.reference_logits(prompts, continuations, 2))


def test_freeing_in_another_order(tiny_llama, llama):
    """Blocks of a conversation need not lie side by side."""
    model = small(tiny_llama, 512)
    first, second, third = (model.new_sequence() for _ in range(3))
    model.prefill([first, second, third], [tokens(64, 1), tokens(70, 2), tokens(64, 3)])
    model.free(first)
    model.free(third)
    fourth = model.new_sequence()
    references = [llama.reference(2), llama.reference(2)]
    expected = [references[0].prompt(tokens(70, 2)), references[1].prompt(tokens(250, 4))]
    logits, _ = model.prefill([fourth], [tokens(250, 4)])
    assert normwise(logits[0], expected[1]) <= BOUND
    for step in range(4):
        ids = tokens(2, 50 + step)
        logits = model.decode([second, fourth], ids)
        for row, reference, token in zip(logits, references, ids, strict=True):
            assert normwise(row, reference.decode([token])[0]) <= BOUND
    model.free(second)
    model.free(fourth)


def test_cache_grows(tiny_llama, llama):
    """Without `max_cache_tokens` given the cache takes what it needs; results do not depend on when it grew."""
    model = load(tiny_llama, prefill_depth=2)
    talk = Conversation(Growing(llama, model), 2, 2)
    talk.prompt([tokens(5, 1), tokens(63, 2)])
    for i in range(5):
        talk.decode([tokens(2, 10 * i + j) for j in range(3)])
        talk.prompt([tokens(100, i), tokens(30, i)])
    talk.end()


class Growing:
    def __init__(self, pair, model):
        self.model, self.reference = model, pair.reference


def test_full_cache(tiny_llama, llama):
    """A prompt that does not fit says what it needs and what there is, and changes nothing."""
    model = small(tiny_llama, 128)
    one, two = model.new_sequence(), model.new_sequence()
    reference = llama.reference(2)
    reference.prompt(tokens(60, 1))
    model.prefill([one], [tokens(60, 1)])
    for sequences, prompts in [
        ([two], [tokens(100, 2)]),
        ([one], [tokens(100, 2)]),
        ([one, two], [tokens(30, 3), tokens(60, 4)]),
    ]:
        with pytest.raises((RuntimeError, MemoryError, ValueError), match=r"max_cache_tokens") as error:
            model.prefill(sequences, prompts)
        assert small(tiny_llama, int(re.findall(r"\d+", str(error.value))[-1])).max_cache_tokens > 128, (
            "says what is needed"
        )
        assert list(one.token_ids) == tokens(60, 1) and list(two.token_ids) == [] and two.num_cached == 0
        assert one.num_cached == 60
    logits = model.decode([one], [5])  # nothing was lost
    assert normwise(logits[0], reference.decode([5])[0]) <= BOUND
    logits, _ = model.prefill([two], [tokens(64, 6)])  # and what was free still is
    assert normwise(logits[0], llama.reference(2).prompt(tokens(64, 6))) <= BOUND
    model.free(one)
    model.free(two)
    prompts, continuations = [tokens(120, 7)], [tokens(8, 8)]
    assert_logits(model.logits(prompts, continuations), llama.reference_logits(prompts, continuations, 2))


def test_decode_into_a_full_cache(tiny_llama, llama):
    model = small(tiny_llama, 64)
    sequence = model.new_sequence()
    reference = llama.reference(2)
    reference.prompt(tokens(62, 1))
    model.prefill([sequence], [tokens(62, 1)])
    for token in (3, 4):
        logits = model.decode([sequence], [token])
        assert normwise(logits[0], reference.decode([token])[0]) <= BOUND
    before = list(sequence.token_ids)
    for _ in range(2):
        with pytest.raises((RuntimeError, MemoryError, ValueError), match="max_cache_tokens"):
            model.decode([sequence], [5])
        assert list(sequence.token_ids) == before and sequence.num_cached == 64
    model.free(sequence)
    assert_logits(model.logits([tokens(30)], [tokens(9)]), llama.reference_logits([tokens(30)], [tokens(9)], 2))


def test_failed_logits_and_generate_leave_nothing(tiny_llama, llama):
    """`logits` and `generate` that fail in the middle give their blocks back."""
    model = small(tiny_llama, 128)
    for _ in range(3):
        with pytest.raises((RuntimeError, MemoryError, ValueError), match="max_cache_tokens"):
            model.logits([tokens(60), tokens(100)], [tokens(2), tokens(50)])
        with pytest.raises((RuntimeError, MemoryError, ValueError), match="max_cache_tokens"):
            model.generate([tokens(60), tokens(40)], max_new_tokens=64, do_sample=False)
    prompts, continuations = [tokens(120, 7)], [tokens(8, 8)]
    assert_logits(model.logits(prompts, continuations), llama.reference_logits(prompts, continuations, 2))


def test_failure_in_the_middle(tiny_llama, llama, monkeypatch):
    """A turn that fails after some of its chunks have run has not happened."""
    model = small(tiny_llama, 256)
    model.chunk_tokens = 16
    references = [llama.reference(2), llama.reference(2)]
    sequences = [model.new_sequence(), model.new_sequence()]
    model.prefill(sequences, [tokens(9, 1), tokens(20, 2)])
    for reference, prompt in zip(references, [tokens(9, 1), tokens(20, 2)], strict=True):
        reference.prompt(prompt)
    passes, forward = [], model._forward

    def interrupted(*args, **kwargs):
        passes.append(args)
        if len(passes) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.prefill(sequences, [tokens(30, 3), tokens(40, 4)])
    assert [(list(s.token_ids), s.num_cached) for s in sequences] == [(tokens(9, 1), 9), (tokens(20, 2), 20)]
    logits, _ = model.prefill(sequences, [tokens(5, 5), tokens(70, 6)])
    for row, reference, prompt in zip(logits, references, [tokens(5, 5), tokens(70, 6)], strict=True):
        assert normwise(row, reference.prompt(prompt)) <= BOUND


def test_freed_conversation_is_refused(llama):
    model = llama.model
    sequence = model.new_sequence()
    model.prefill([sequence], [tokens(5)])
    model.free(sequence)
    with pytest.raises((RuntimeError, ValueError), match="free"):
        model.decode([sequence], [1])
    with pytest.raises((RuntimeError, ValueError), match="free"):
        model.prefill([sequence], [tokens(5)])


def test_freeing_twice(tiny_llama, llama):
    """A second `free` gives no block back that has a new owner."""
    model = small(tiny_llama, 128)
    first, second, third = (model.new_sequence() for _ in range(3))
    model.prefill([first], [tokens(60, 1)])
    model.free(first)
    model.prefill([second], [tokens(60, 2)])
    with contextlib.suppress(RuntimeError, ValueError):
        model.free(first)
    model.prefill([third], [tokens(60, 3)])
    reference = llama.reference(2)
    reference.prompt(tokens(60, 2))
    assert normwise(model.decode([second], [7])[0], reference.decode([7])[0]) <= BOUND


def test_conversation_of_another_model(tiny_llama):
    """Its blocks are in another cache."""
    model, other = small(tiny_llama, 128), small(tiny_llama, 128)
    sequence = other.new_sequence()
    other.prefill([sequence], [tokens(9)])
    for call in (
        lambda: model.decode([sequence], [1]),
        lambda: model.prefill([sequence], [[1]]),
        lambda: model.free(sequence),
    ):
        with pytest.raises((RuntimeError, ValueError), match="sequence"):
            call()
