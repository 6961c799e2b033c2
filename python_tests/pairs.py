"""Our model and transformers' of one tiny checkpoint, and conversations that drive both alike."""

from __future__ import annotations

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

    def reference(self, depth, boundary=1, anchors=1, share=0.0) -> ReferencePOP:
        return ReferencePOP(self.peer, depth, boundary, anchors, share)

    def reference_logits(self, prompts, continuations, depth, boundary=1, anchors=1, share=0.0):
        results = []
        for prompt, continuation in zip(prompts, continuations, strict=True):
            key = (tuple(prompt), tuple(continuation), depth, boundary, anchors, share)
            if key not in self._references:
                self._references[key] = self.reference(depth, boundary, anchors, share).logits(prompt, continuation)
            results.append(self._references[key])
        return results


_pairs: dict = {}


def pair_of(folder) -> Pair:
    """The pair of a folder, made once, its settings as they are after loading."""
    if folder not in _pairs:
        _pairs[folder] = Pair(folder)
    restore(_pairs[folder].model)
    return _pairs[folder]


def restore(model) -> None:
    """The settings a test may have changed, as they are after loading."""
    fresh = restore.defaults.setdefault(id(model), (model.chunk_tokens,))
    (model.chunk_tokens,) = fresh
    model.boundary_tokens, model.anchor_tokens, model.deep_tokens, model.prefill_plan = 1, 1, 0.0, None


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


class Conversation:
    """Several sequences, ours and the references', driven alike."""

    def __init__(self, pair, count, depth, boundary=1, anchors=1, share=0.0):
        self.model, self.depth = pair.model, depth
        self.model.boundary_tokens, self.model.anchor_tokens, self.model.deep_tokens = boundary, anchors, share
        self.sequences = [self.model.new_sequence() for _ in range(count)]
        self.references = [pair.reference(depth, boundary, anchors, share) for _ in range(count)]
        self.ids: list[list[int]] = [[] for _ in range(count)]

    def prompt(self, prompts, depth=None):
        pending = [s.token_ids[s.num_cached :] for s in self.sequences]
        logits, _ = self.model.prefill(self.sequences, prompts, prefill_depth=depth or self.depth)
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


def small(folder, max_cache_tokens, **settings):
    return load(folder, max_cache_tokens=max_cache_tokens, prefill_depth=2, **settings)
