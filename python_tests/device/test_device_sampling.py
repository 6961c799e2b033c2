"""The choice of tokens on a device: the CPU's, and transformers' own rules."""

from __future__ import annotations

import pytest
import torch
from on_device import (
    CACHE,
    DEVICE,
    draw_prompts,
    generate,
    load_both,
)
from reference_ops import distribution

import pop_ext

SAMPLED = [
    dict(),
    dict(temperature=0.7, top_k=20, top_p=0.9),
    dict(min_p=0.05, repetition_penalty=1.5),
    dict(do_sample=False, repetition_penalty=1.5),
    dict(min_new_tokens=3, eos_token_id=5, pad_token_id=0),  # a processor that only transformers has
    dict(no_repeat_ngram_size=2, do_sample=False),
    dict(encoder_repetition_penalty=1.5, do_sample=False),
]


@pytest.mark.parametrize("settings", SAMPLED, ids=lambda s: "-".join(s) or "plain")
def test_sampling_is_the_cpus(llama, small_buckets, settings):
    """Each token is where the CPU's running sum of probabilities passes the seed's next number, but for the little that
    bfloat16's order of sums moves it; on the device, captured or not, and after it transformers' own rules hold.
    """
    cpu, ours = load_both(llama, prefill_depth=3)
    prompts = draw_prompts(30, 61, 7, 20)
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": 10, "seed": 3, **settings}
    replayed = generate(ours, prompts, **arguments).tokens
    assert replayed == generate(ours, prompts, graphs=False, **arguments).tokens
    if settings.get("min_new_tokens"):
        assert all(5 not in row[:2] for row in replayed)
    if not arguments["do_sample"] or settings.get("min_new_tokens"):
        return
    known = {key: value for key, value in settings.items() if key != "do_sample"}
    for i, (prompt, tokens) in enumerate(zip(prompts, replayed, strict=True)):
        numbers = torch.rand(10, generator=torch.Generator().manual_seed(3 + i), dtype=torch.float64)
        for k, logits in enumerate(cpu.logits([prompt], [tokens])[0]):
            sums = distribution(logits, torch.tensor(prompt + tokens[:k]), **known).cumsum(0)
            low, high = (torch.searchsorted(sums, numbers[k] * sums[-1] + e, right=True) for e in (-0.03, 0.03))
            assert low <= tokens[k] <= high


def test_processors_and_criteria_of_the_caller(llama):
    """Each row's own, on the device: of its ids and scores; criteria see what was read, no token more."""
    ours = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts, seen, shapes = draw_prompts(30, 7, 30), [], []

    def only_even(ids, scores):
        shapes.append(tuple(ids.shape))
        scores[:, 1::2] = float("-inf")
        return scores

    def stop(ids, scores):
        seen.append(ids.shape[1])
        return torch.tensor([ids.shape[1] == 12], device=ids.device)

    output = generate(ours, prompts, logits_processor=[only_even], stopping_criteria=[stop], max_new_tokens=9)
    assert all(token % 2 == 0 for row in output.tokens for token in row) and [*map(len, output.tokens)] == [9, 5, 9]
    assert shapes[:4] == [(2, 30), (1, 7), (2, 31), (1, 8)]  # rows of one length together
    assert [n for n in seen if n <= 12] == [8, 9, 10, 11, 12]
