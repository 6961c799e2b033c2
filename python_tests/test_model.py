"""The runner on tiny random models of every family, in float32: full depth against transformers, truncated depth
against `reference_pop`, and what must not change results: batches, chunks, turns, the state of the cache, failures."""

from __future__ import annotations

import contextlib
import itertools
import re

import pytest
import torch
from helpers import normwise, transformers_model
from reference_pop import ReferencePOP

import pop_ext

BOUND = 1e-5
VOCABULARY = 293


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(7919 * count + seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


# Lengths around the block size (64), the windows (9 to 17) and the boundaries, in no order.
LENGTHS = [(70, 9), (1, 5), (5, 1), (64, 20), (2, 3), (17, 64), (130, 7), (63, 2), (6, 40), (33, 33)]
PROMPTS = [tokens(n, 1) for n, _ in LENGTHS]
CONTINUATIONS = [tokens(c, 2) for _, c in LENGTHS]


def load(folder, **settings):
    return pop_ext.load(folder, **{"dtype": torch.float32, **settings})


class Pair:
    """Ours and transformers' model of one checkpoint."""

    def __init__(self, folder):
        self.folder, self.model, self.peer = folder, load(folder), transformers_model(folder)
        self.layers = self.peer.config.num_hidden_layers
        self._references: dict = {}

    @torch.no_grad()
    def plain_logits(self, prompt, continuation):
        """transformers, all at once: logits that predict the continuation."""
        ids = torch.tensor([prompt + continuation[:-1]])
        return self.peer(ids).logits[0, len(prompt) - 1 :]

    def reference(self, depth, boundary=1, anchors=1) -> ReferencePOP:
        return ReferencePOP(self.peer, depth, boundary, anchors)

    def reference_logits(self, prompts, continuations, depth, boundary=1, anchors=1):
        results = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            key = (tuple(prompt), tuple(continuation), depth, boundary, anchors)
            if key not in self._references:
                self._references[key] = self.reference(depth, boundary, anchors).logits(prompt, continuation)
            results.append(self._references[key])
        return results


_pairs: dict = {}


@pytest.fixture
def pair(tiny) -> Pair:
    if tiny not in _pairs:
        _pairs[tiny] = Pair(tiny)
    restore(_pairs[tiny].model)
    return _pairs[tiny]


@pytest.fixture
def llama(tiny_llama) -> Pair:
    if tiny_llama not in _pairs:
        _pairs[tiny_llama] = Pair(tiny_llama)
    restore(_pairs[tiny_llama].model)
    return _pairs[tiny_llama]


@pytest.fixture
def gemma(tiny_gemma) -> Pair:
    if tiny_gemma not in _pairs:
        _pairs[tiny_gemma] = Pair(tiny_gemma)
    restore(_pairs[tiny_gemma].model)
    return _pairs[tiny_gemma]


def restore(model) -> None:
    """The settings a test may have changed, as they are after loading."""
    fresh = restore.defaults.setdefault(id(model), (model.chunk_tokens,))
    (model.chunk_tokens,) = fresh
    model.boundary_tokens, model.anchor_tokens = 1, 1


restore.defaults = {}


def batched_logits(model, prompts, continuations, depth) -> list[torch.Tensor]:
    """The same as `model.logits`, in one batch: a prefill of all, then decode steps of those that go on."""
    sequences = [model.new_sequence() for _ in prompts]
    logits, _ = model.prefill(sequences, prompts, prefill_depth=depth)
    rows = [[row] for row in logits]
    for step in range(max(map(len, continuations)) - 1):
        on = [i for i, continuation in enumerate(continuations) if len(continuation) > step + 1]
        logits = model.decode([sequences[i] for i in on], [continuations[i][step] for i in on])
        for i, row in zip(on, logits, strict=True):
            rows[i].append(row)
    for sequence in sequences:
        model.free(sequence)
    return [torch.stack(r) for r in rows]


def assert_logits(ours: list[torch.Tensor], expected: list[torch.Tensor], bound: float = BOUND) -> None:
    """Over all logits, and for each sequence on its own."""
    assert len(ours) == len(expected)
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert a.dtype == torch.float32
        assert normwise(a, b) <= bound, f"sequence {i}: {normwise(a, b):.2e}"
    assert normwise(torch.cat(ours), torch.cat(expected)) <= bound


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


@pytest.mark.parametrize("anchors", [0, 1])
@pytest.mark.parametrize("boundary", [1, 5])
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


@pytest.mark.parametrize("boundary", [1, 5])
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


# Turns


class Conversation:
    """Several sequences, ours and the references', driven alike."""

    def __init__(self, pair, count, depth, boundary=1, anchors=1):
        self.model, self.depth = pair.model, depth
        self.model.boundary_tokens, self.model.anchor_tokens = boundary, anchors
        self.sequences = [self.model.new_sequence() for _ in range(count)]
        self.references = [pair.reference(depth, boundary, anchors) for _ in range(count)]
        self.ids: list[list[int]] = [[] for _ in range(count)]

    def prompt(self, prompts, depth=None):
        pending = [s.token_ids[s.num_cached :] for s in self.sequences]
        logits, times = self.model.prefill(self.sequences, prompts, prefill_depth=depth or self.depth)
        assert times.total >= 0
        for i, (prompt, row) in enumerate(zip(prompts, logits, strict=True)):
            self.references[i].decode(pending[i])
            expected = self.references[i].prompt(prompt, depth=depth)
            assert normwise(row, expected) <= BOUND, f"sequence {i}"
            self.ids[i] += prompt
            self.check(i)

    def decode(self, steps):
        """steps: a list of lists, one token per sequence each."""
        for step in steps:
            logits = self.model.decode(self.sequences, step)
            for i, (token, row) in enumerate(zip(step, logits, strict=True)):
                assert normwise(row, self.references[i].decode([token])[0]) <= BOUND, f"sequence {i}"
                self.ids[i].append(token)
                self.check(i)

    def leave_pending(self, step):
        """Tokens that were sampled last and not run."""
        for i, token in enumerate(step):
            self.sequences[i].token_ids.append(token)
            self.ids[i].append(token)

    def check(self, i):
        assert list(self.sequences[i].token_ids) == self.ids[i]
        assert self.sequences[i].num_cached == len(self.ids[i])

    def end(self):
        for sequence in self.sequences:
            self.model.free(sequence)


@pytest.mark.parametrize("boundary, anchors", [(1, 1), (5, 1), (1, 0), (3, 30)])
def test_turns(pair, boundary, anchors):
    """Three turns of three conversations, with pending tokens; turns shorter than the boundary and longer."""
    talk = Conversation(pair, 3, 2, boundary, anchors)
    talk.prompt([tokens(20, 1), tokens(3, 2), tokens(64, 3)])
    talk.decode([tokens(3, 10 + i) for i in range(5)])
    talk.leave_pending(tokens(3, 20))
    talk.prompt([tokens(4, 4), tokens(70, 5), tokens(1, 6)])
    talk.prompt([tokens(2, 4), tokens(7, 5), tokens(9, 6)])  # a turn right after a turn
    talk.decode([tokens(3, 30 + i) for i in range(3)])
    talk.end()


def test_turns_with_chunks(gemma):
    for chunk in (1, 5, 13):
        gemma.model.chunk_tokens = chunk
        talk = Conversation(gemma, 2, 3, boundary=4)
        talk.prompt([tokens(20, 1), tokens(11, 2)])
        talk.decode([tokens(2, 3)])
        talk.leave_pending(tokens(2, 4))
        talk.prompt([tokens(9, 5), tokens(31, 6)])
        talk.decode([tokens(2, 7)])
        talk.end()


def test_turns_of_other_depths(pair):
    """Each turn may have its own depth; what a turn left in the cache stays."""
    talk = Conversation(pair, 2, 2, boundary=2)
    talk.prompt([tokens(20, 1), tokens(33, 2)], depth=1)
    talk.decode([tokens(2, 3)])
    talk.prompt([tokens(15, 4), tokens(6, 5)], depth=pair.layers)
    talk.prompt([tokens(15, 6), tokens(6, 7)], depth=pair.layers - 2)
    talk.decode([tokens(2, 8)])
    talk.end()


def test_some_turn_while_others_wait(llama):
    """Prefill and decode of some conversations leave the others as they are; pending tokens differ per sequence."""
    talk = Conversation(llama, 3, 2, boundary=2)
    talk.prompt([tokens(20, 1), tokens(5, 2), tokens(64, 3)])
    talk.decode([tokens(3, 4)])
    sequences, references, ids = talk.sequences, talk.references, talk.ids
    sequences[0].token_ids.append(17)
    ids[0].append(17)
    talk.sequences, talk.references, talk.ids = sequences[:2], references[:2], ids[:2]
    talk.prompt([tokens(8, 5), tokens(9, 6)])
    talk.sequences, talk.references, talk.ids = sequences[1:], references[1:], ids[1:]
    talk.decode([tokens(2, 7), tokens(2, 8)])
    talk.sequences, talk.references, talk.ids = sequences, references, ids
    talk.decode([tokens(3, 9)])
    talk.end()


def test_generate_goes_on(llama):
    """A second `generate` on kept conversations: the last sampled token is run first, then the new prompt."""
    prompts, more = [tokens(20, 1), tokens(40, 2)], [tokens(7, 3), tokens(12, 4)]
    first = llama.model.generate(prompts, prefill_depth=2, max_new_tokens=9, do_sample=False, keep=True)
    second = llama.model.generate(
        more, sequences=first.sequences, prefill_depth=2, max_new_tokens=8, do_sample=False, keep=True
    )
    for i in range(2):
        reference = llama.reference(2)
        reference.logits(prompts[i], first.tokens[i])
        reference.decode(first.tokens[i][-1:])
        expected = reference.logits(more[i], second.tokens[i])
        best = expected.topk(2).values
        agree = expected.argmax(-1) == torch.tensor(second.tokens[i])
        assert (agree | (best[:, 0] - best[:, 1] < 1e-3)).all()
        ids = prompts[i] + first.tokens[i] + more[i] + second.tokens[i]
        assert list(second.sequences[i].token_ids) == ids
        llama.model.free(second.sequences[i])


# The cache


def small(folder, max_cache_tokens, **settings):
    return load(folder, max_cache_tokens=max_cache_tokens, prefill_depth=2, **settings)


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


# Bad arguments: each raises before anything is changed, and the message names the argument


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
    *(("boundary_tokens", v) for v in (0, -1, 1.5, True, "1", None)),
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


@pytest.mark.parametrize("name, value", [("chunk_tokens", 0), ("boundary_tokens", 0), ("anchor_tokens", -1)])
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
