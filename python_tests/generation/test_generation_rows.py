"""Rows of a batch have nothing to do with each other; depth and times are reported as they are."""

from __future__ import annotations

import time

import pytest
import torch
import transformers
from generation_prompts import PROMPTS, expected, make_prompts


def test_sampling_does_not_depend_on_neighbours(model):
    settings = dict(max_new_tokens=16, do_sample=True, top_k=0)
    batch = model.generate(PROMPTS, seed=11, **settings).tokens
    assert batch == model.generate(PROMPTS, seed=11, **settings).tokens
    assert batch != model.generate(PROMPTS, seed=12, **settings).tokens
    alone = [model.generate([prompt], seed=11 + i, **settings).tokens[0] for i, prompt in enumerate(PROMPTS)]
    assert batch == alone
    assert model.generate(PROMPTS[:2], seed=11, **settings).tokens == batch[:2]
    same = model.generate([PROMPTS[0]] * 3, seed=11, **settings).tokens
    assert len({tuple(tokens) for tokens in same}) == 3


def test_without_a_seed_torch_decides(model):
    def sample():
        return model.generate(PROMPTS, max_new_tokens=16, do_sample=True).tokens

    torch.manual_seed(0)
    first, second = sample(), sample()
    torch.manual_seed(0)
    assert first == sample() and first != second


def test_finished_rows_are_not_decoded(model, peer, monkeypatch):
    eos = expected(peer, PROMPTS[1], max_new_tokens=4)[3]
    rows = []
    decode = model.decode
    monkeypatch.setattr(
        model, "decode", lambda sequences, ids: (rows.append(len(sequences)), decode(sequences, ids))[1]
    )
    output = model.generate(PROMPTS, max_new_tokens=12, eos_token_id=eos)
    lengths = [len(tokens) for tokens in output.tokens]
    assert lengths[1] <= 4
    assert rows == [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert output.times.decode_tokens == sum(rows)
    rows.clear()
    assert [len(tokens) for tokens in model.generate(PROMPTS, max_new_tokens=1).tokens] == [1, 1, 1]
    assert rows == []


def test_own_processors_and_criteria_see_their_row(model):
    seen = []

    def only_even(ids, scores):
        seen.append(ids.tolist()[0])
        scores[:, 1::2] = -torch.inf
        return scores

    class StopAfter(transformers.StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            assert scores is None
            return torch.tensor([ids[0, -1] % 32 == 0])

    output = model.generate(
        PROMPTS,
        max_new_tokens=24,
        logits_processor=transformers.LogitsProcessorList([only_even]),
        stopping_criteria=[StopAfter()],
        return_logprobs=True,
    )
    for prompt, tokens, logprobs in zip(PROMPTS, output.tokens, output.logprobs, strict=True):
        assert not any(token % 2 for token in tokens)
        assert all(token % 32 for token in tokens[:-1]) and (len(tokens) == 24 or tokens[-1] % 32 == 0)
        assert all(prompt + tokens[:i] in seen for i in range(len(tokens)))
        # processors work on a copy: the log-probabilities are the model's own
        raw = model.logits([prompt], [tokens])[0].log_softmax(-1)
        assert logprobs == pytest.approx(raw.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), abs=1e-4)


def test_rows_of_one_length_meet_a_processor_together(model):
    prompts, seen = make_prompts(9, 5, 9, 9), []

    def only_even(ids, scores):
        seen.append(ids.tolist())
        assert scores.shape == (len(ids), model.spec.vocab_size)
        scores[:, 1::2] = -torch.inf
        return scores

    settings = dict(max_new_tokens=6, logits_processor=[only_even], do_sample=True, top_k=50, repetition_penalty=1.3)
    together = model.generate(prompts, seed=1, **settings).tokens
    rows = [prompt + tokens for prompt, tokens in zip(prompts, together, strict=True)]
    steps = [[[rows[i][: 9 + n] for i in (0, 2, 3)], [rows[1][: 5 + n]]] for n in range(6)]
    assert seen == [group for step in steps for group in step]
    assert not any(token % 2 for row in together for token in row)
    assert together == [model.generate([prompt], seed=1 + i, **settings).tokens[0] for i, prompt in enumerate(prompts)]


def test_processors_of_a_prompt_see_their_own(model):
    """Prompts of one length are not taken for each other."""
    prompts, settings = make_prompts(9, 9), dict(encoder_repetition_penalty=1.7)
    together = model.generate(prompts, max_new_tokens=12, **settings).tokens
    assert together == [model.generate([prompt], max_new_tokens=12, **settings).tokens[0] for prompt in prompts]


def test_own_length_criterion_goes_before_the_setting(model):
    criteria = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(40)])
    output = model.generate(PROMPTS, stopping_criteria=criteria, max_new_tokens=3)
    assert [len(prompt) + len(tokens) for prompt, tokens in zip(PROMPTS, output.tokens, strict=True)] == [40] * 3


def test_max_time(model):
    start = time.perf_counter()
    output = model.generate(PROMPTS, max_new_tokens=900, max_time=0.05)
    assert time.perf_counter() - start < 5
    assert all(1 <= len(tokens) < 900 for tokens in output.tokens)


def test_logprobs(model):
    output = model.generate(PROMPTS, max_new_tokens=10, return_logprobs=True)
    logits = model.logits(PROMPTS, output.tokens)
    for raw, tokens, logprobs in zip(logits, output.tokens, output.logprobs, strict=True):
        wanted = raw.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("prefill_depth", [None, 3, 0.5, 1.0])
def test_prefill_depth_is_passed_on(model, prefill_depth):
    output = model.generate(PROMPTS, max_new_tokens=12, prefill_depth=prefill_depth)
    logits = model.logits(PROMPTS, output.tokens, prefill_depth=prefill_depth)
    assert output.tokens == [row.argmax(-1).tolist() for row in logits]


def test_times(model):
    start = time.perf_counter()
    times = model.generate(PROMPTS, max_new_tokens=20, prefill_depth=3).times
    elapsed = time.perf_counter() - start
    stages = (times.truncated_prefill, times.projection, times.boundary)
    assert all(seconds > 0 for seconds in stages)
    assert sum(stages) <= times.time_to_first_token
    assert times.time_to_first_token + times.decode <= elapsed
    assert times.decode_tokens == 3 * 19
    assert times.decode_tokens_per_second == pytest.approx(3 * 19 / times.decode)
    assert model.generate(PROMPTS, max_new_tokens=1).times.decode_tokens_per_second is None
