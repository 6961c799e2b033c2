"""The operations of a decode step beside the layers, on the CPU and in CUDA: against torch and transformers, and
against each other."""

from __future__ import annotations

import pytest
import torch
from helpers import cuda_operations
from reference_ops import distribution

import pop_ext.ops  # noqa: F401


@pytest.fixture(params=["cpu", "cuda"])
def ops(request):
    """torch.ops.pop of each device; the PTX emulator checks every launch and finds no broken rule."""
    if request.param == "cpu":
        yield torch.ops.pop
        return
    operations = cuda_operations()
    if torch.cuda.is_available():
        yield operations
        return
    import ptx_emulator as emulator

    emulator.schedule("random", seed=1)
    emulator.checks("all")
    emulator.clear()
    yield operations
    emulator.checks()
    emulator.schedule()
    assert not (found := emulator.findings()), found[0]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# embedding


@pytest.mark.parametrize("tokens, vocabulary, hidden, scale", [(0, 3, 8, 1.0), (1, 7, 72, 1.0), (9, 50, 1040, 33.941)])
def test_embedding(ops, tokens, vocabulary, hidden, scale):
    weight = torch.randn(vocabulary, hidden + 8, generator=generator(0)).bfloat16()[:, :hidden]
    ids = torch.randint(vocabulary, (tokens,), generator=generator(1))
    expected = (weight[ids].float() * torch.tensor(scale, dtype=torch.float32)).bfloat16()
    assert torch.equal(ops.embedding(ids, weight, scale), expected)


def test_embedding_of_no_token(ops):
    weight = torch.randn(4, 16).bfloat16()
    y = ops.embedding(torch.tensor([-1, 2, 4, 2**40]), weight)
    assert torch.equal(y, torch.stack([weight[2] * 0, weight[2], weight[2] * 0, weight[2] * 0]))


# rope_gather


@pytest.mark.parametrize("axes", [False, True])
def test_rope_gather(ops, axes):
    cos, sin = torch.randn(2, 2, 40, 24, generator=generator(0))
    positions = torch.randint(40, (3, 11), generator=generator(1)) if axes else torch.arange(5, 16)
    which = torch.randint(3, (24,), generator=generator(2)) if axes else None
    out = ops.rope_gather(cos, sin, positions, which)
    rows = positions[which].T if axes else positions[:, None].expand(-1, 24)  # [T, E / 2]
    for table, ours in zip((cos, sin), out, strict=True):
        assert torch.equal(ours, table[:, rows, torch.arange(24)])
    outside = ops.rope_gather(cos, sin, torch.tensor([-1, 40, 3]))
    assert torch.equal(outside[:, :, :2], torch.zeros(2, 2, 2, 24)) and torch.equal(outside[0, :, 2], cos[:, 3])


# decode_advance


def test_decode_advance(ops):
    """A row in the middle of a block, one that starts its next, a padded one, and one whose table ends."""
    tables = torch.tensor([[5, 2, 9], [7, 3, 1], [4, 4, 4], [6, 8, 0]], dtype=torch.int32)
    seqlens = torch.tensor([3, 8, 0, 24], dtype=torch.int32)
    shifts = torch.tensor([0, -2, 0, 0])
    positions, slots, step = torch.full((4,), 77), torch.full((4,), 77), torch.tensor([4], dtype=torch.int32)
    ops.decode_advance(tables, 8, shifts, seqlens, positions, slots, step)
    assert seqlens.tolist() == [4, 9, 0, 25] and step.tolist() == [5]
    assert positions.tolist() == [3, 6, 0, 24] and slots.tolist() == [5 * 8 + 3, 3 * 8, -1, -1]
    ops.decode_advance(tables[:, :2], 8, shifts, seqlens, positions, slots)
    assert seqlens.tolist() == [5, 10, 0, 26] and slots.tolist() == [44, 25, -1, -1] and step.tolist() == [5]


# sample

GREEDY = dict(temperature=0.0)
SAMPLING = [
    dict(),
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_k=1),
    dict(top_p=0.8),
    dict(min_p=0.05),
    dict(repetition_penalty=1.3),
    dict(temperature=1.4, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=0.8),
]


def settings_of(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) -> torch.Tensor:
    return torch.tensor([[temperature, top_k, top_p, min_p, repetition_penalty]] * rows, dtype=torch.float32)


def draw(rows: int, vocabulary: int, seed: int):
    """logits, seen and its ids, uniforms of three draws."""
    g = generator(seed)
    logits = 3 * torch.randn(rows, vocabulary, generator=g)
    ids = [torch.randint(vocabulary, (7,), generator=g) for _ in range(rows)]
    seen = torch.zeros(rows, vocabulary, dtype=torch.uint8)
    for row, some in zip(seen, ids, strict=True):
        row[some] = 1
    return logits, seen, ids, torch.rand(3, rows, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("vocabulary", [1, 5, 293, 4099])
def test_greedy(ops, vocabulary):
    logits = torch.randn(6, vocabulary, generator=generator(0))
    logits[1] = 0  # ties: the first
    logits[2, vocabulary // 2] = float("inf")
    logits[3] = float("-inf")
    logits[4] = float("nan")
    logits[5, 0] = float("nan")
    tokens = torch.full((6,), 77)
    ops.sample(logits, None, None, None, None, tokens)
    expected = logits.nan_to_num(float("-inf")).argmax(-1)
    expected[1], expected[3], expected[4] = 0, 0, -1
    if vocabulary == 1:
        expected[5] = -1
    assert torch.equal(tokens, expected)
    again = torch.full_like(tokens, 77)
    ops.sample(logits, settings_of(6, **GREEDY), None, torch.zeros(1, 6, dtype=torch.float64), None, again)
    assert torch.equal(again, tokens)


@pytest.mark.parametrize("settings", SAMPLING, ids=lambda s: "-".join(s) or "plain")
@pytest.mark.parametrize("vocabulary", [40, 1000])
def test_sampling_is_transformers(ops, vocabulary, settings):
    """Each row by inverting transformers' probabilities, but where the number is at the edge of two tokens."""
    logits, seen, ids, uniforms = draw(12, vocabulary, seed=vocabulary)
    before, clear = seen.clone(), 0
    for step in range(3):
        tokens, counter = torch.full((12,), 77), torch.tensor([step], dtype=torch.int32)
        seen.copy_(before)
        ops.sample(logits, settings_of(12, **settings), seen, uniforms, counter, tokens)
        for b in range(12):
            sums = distribution(logits[b], ids[b], **settings).cumsum(0)
            point = uniforms[step, b] * sums[-1]
            low, high = (torch.searchsorted(sums, point + e, right=True) for e in (-1e-5, 1e-5))
            assert low <= tokens[b] <= high
            clear += int(low == high)
            assert seen[b, tokens[b]] == 1 and int(seen[b].sum()) <= int(before[b].sum()) + 1
    assert clear > 30


@pytest.mark.parametrize("settings", SAMPLING, ids=lambda s: "-".join(s) or "plain")
def test_the_same_token_on_every_device(settings):
    """Exactly, with numbers at the very edges between tokens, equal scores and scores that are ruled out."""
    cuda = cuda_operations()
    for vocabulary, seed in ((7, 0), (513, 1), (5000, 2)):
        logits, seen, _, uniforms = draw(8, vocabulary, seed)
        logits[1] = logits[1].round()  # many ties
        logits[2, ::3] = float("-inf")
        logits[3] *= 1e-3  # flat
        logits[4] *= 20
        uniforms[0, :] = torch.tensor([0, 1 - 2**-53, 0.5, 2**-40, 0.25, 1 - 2**-24, 0, 0.999])
        for step in range(3):
            chosen, counter = [], torch.tensor([step], dtype=torch.int32)
            for operations in (torch.ops.pop, cuda):
                tokens, marks = torch.full((8,), 77), seen.clone()
                operations.sample(logits, settings_of(8, **settings), marks, uniforms, counter, tokens)
                chosen.append((tokens, marks))
            assert torch.equal(chosen[0][0], chosen[1][0]) and torch.equal(chosen[0][1], chosen[1][1])
            assert (chosen[0][0] >= 0).all()


def test_frequencies(ops):
    """Of 20,000 evenly spaced numbers each token gets its share."""
    rows = 2000 if ops is torch.ops.pop else 200
    logits = torch.randn(1, 11, generator=generator(0)).expand(rows, 11)
    uniforms = ((torch.arange(rows) + 0.5) / rows).double()[None]
    tokens = torch.empty(rows, dtype=torch.int64)
    ops.sample(logits, settings_of(rows), None, uniforms, None, tokens)
    shares = tokens.bincount(minlength=11) / rows
    assert (shares - logits[0].softmax(-1)).abs().max() <= 1.5 / rows


def test_nothing_to_sample(ops):
    logits = torch.zeros(3, 9)
    logits[0], logits[1], logits[2, 4] = float("nan"), float("-inf"), float("inf")
    tokens = torch.full((3,), 77)
    ops.sample(logits, settings_of(3), None, torch.zeros(1, 3, dtype=torch.float64), None, tokens)
    assert tokens.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda o: o.embedding(torch.zeros(2, 2).long(), torch.zeros(3, 8).bfloat16()), "token_ids is of shape"),
        (lambda o: o.embedding(torch.zeros(2), torch.zeros(3, 8).bfloat16()), "token_ids is float32, expected int64"),
        (lambda o: o.embedding(torch.zeros(2).long(), torch.zeros(3, 8).int()), "weight is int32"),
        (lambda o: o.rope_gather(torch.zeros(1, 3, 4), torch.zeros(1, 2, 4), torch.zeros(2).long()), "sin_table is of"),
        (lambda o: o.rope_gather(*torch.zeros(2, 1, 3, 4), torch.zeros(3, 2).long()), "axes is None"),
        (lambda o: o.sample(torch.zeros(2, 3), None, None, None, None, torch.zeros(3).long()), "tokens is of shape"),
        (lambda o: o.sample(torch.zeros(2, 3), settings_of(2), None, None, None, torch.zeros(2).long()), "uniforms is"),
        (lambda o: o.sample(torch.zeros(2, 3), settings_of(1), None, None, None, torch.zeros(2).long()), "settings is"),
    ],
)  # fmt: skip
def test_arguments(ops, call, message):
    with pytest.raises(RuntimeError, match=f"pop::.*: {message}"):
        call(ops)


def test_opcheck():
    tests = ["test_schema", "test_faketensor"]
    one = torch.zeros(1, dtype=torch.int64)
    logits, seen, _, uniforms = draw(2, 20, seed=0)
    ints = torch.tensor([[0]], dtype=torch.int32), 8, one, torch.tensor([1], dtype=torch.int32), one.clone()
    for operation, arguments in (
        (torch.ops.pop.embedding, (torch.tensor([1, 2]), torch.randn(4, 8), 2.0)),
        (torch.ops.pop.rope_gather, (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([1, 2]))),
        (torch.ops.pop.decode_advance, (*ints, one.clone(), torch.tensor([0], dtype=torch.int32))),
        (torch.ops.pop.sample, (logits, settings_of(2), seen, uniforms, None, torch.zeros(2, dtype=torch.int64))),
    ):
        torch.library.opcheck(operation, arguments, test_utils=tests)
