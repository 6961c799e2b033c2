"""The same tokens as transformers' `generate`: greedy, by settings, and sampled."""

from __future__ import annotations

import pytest
import torch
import transformers
from generation_prompts import PROMPTS, expected, make_prompts

from pop_ext.runtime.sampling import sample


def test_greedy_batch_is_transformers(model, peer):
    output = model.generate(PROMPTS, max_new_tokens=64)
    assert output.tokens == [expected(peer, prompt, max_new_tokens=64) for prompt in PROMPTS]
    assert output.text == [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in output.tokens]
    assert output.logprobs is None and output.sequences is None


def frequent(peer, count: int) -> list[int]:
    """Tokens that greedy decoding of PROMPTS makes late in the row: what a setting has to act on."""
    return [expected(peer, prompt, max_new_tokens=32)[11] for prompt in PROMPTS][:count]


SETTINGS = {
    "repetition_penalty": lambda peer: dict(repetition_penalty=1.7),
    "encoder_repetition_penalty": lambda peer: dict(encoder_repetition_penalty=2.5),
    "no_repeat_ngram_size": lambda peer: dict(no_repeat_ngram_size=2),
    "bad_words_ids": lambda peer: dict(bad_words_ids=[[token] for token in frequent(peer, 3)] + [[5, 6]]),
    "suppress_tokens": lambda peer: dict(suppress_tokens=frequent(peer, 3)),
    "begin_suppress_tokens": lambda peer: dict(
        begin_suppress_tokens=[expected(peer, prompt, max_new_tokens=1)[0] for prompt in PROMPTS]
    ),
    "sequence_bias": lambda peer: dict(sequence_bias=[[[token], -8.0] for token in frequent(peer, 2)]),
    "eos": lambda peer: dict(eos_token_id=frequent(peer, 1)[0]),
    "eos list": lambda peer: dict(eos_token_id=frequent(peer, 3)),
    "min_new_tokens": lambda peer: dict(eos_token_id=frequent(peer, 3), min_new_tokens=20),
    "min_length": lambda peer: dict(eos_token_id=frequent(peer, 3), min_length=25),
    "forced_eos_token_id": lambda peer: dict(forced_eos_token_id=9),
    "exponential_decay": lambda peer: dict(eos_token_id=3, exponential_decay_length_penalty=(4, 1.4)),
    "renormalize_logits": lambda peer: dict(renormalize_logits=True, remove_invalid_values=True),
    "watermarking": lambda peer: dict(watermarking_config={"bias": 4.0, "seeding_scheme": "selfhash"}),
    "several": lambda peer: dict(repetition_penalty=1.3, no_repeat_ngram_size=3, eos_token_id=frequent(peer, 3)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_transformers(model, peer, name):
    settings = SETTINGS[name](peer) | dict(max_new_tokens=32, pad_token_id=0)
    wanted = [expected(peer, prompt, **settings) for prompt in PROMPTS]
    if name != "renormalize_logits":
        assert wanted != [expected(peer, prompt, max_new_tokens=32) for prompt in PROMPTS], "the setting does nothing"
    assert model.generate(PROMPTS, **settings).tokens == wanted
    config = transformers.GenerationConfig(**settings)
    assert model.generate(PROMPTS, generation_config=config).tokens == wanted
    model.generation_config = config
    assert model.generate(PROMPTS).tokens == wanted


def test_max_length(model, peer):
    output = model.generate(PROMPTS, max_length=40)
    assert [len(prompt) + len(tokens) for prompt, tokens in zip(PROMPTS, output.tokens, strict=True)] == [40] * 3
    assert output.tokens == [expected(peer, prompt, max_length=40) for prompt in PROMPTS]
    with pytest.raises(ValueError, match=r"max_length=33 leaves nothing to generate.* 33 tokens"):
        model.generate(PROMPTS, max_length=33)


def test_the_context_ends_a_row(model):
    (prompt,) = make_prompts(1020)
    assert len(model.generate([prompt], max_new_tokens=50).tokens[0]) == 4
    with pytest.raises(ValueError, match=r"leaves nothing to generate.*context is 1024"):
        model.generate([prompt + [1] * 4], max_new_tokens=50)


def test_default_length_is_transformers(model, peer):
    with pytest.warns(UserWarning, match="neither max_new_tokens nor max_length"):
        output = model.generate(PROMPTS)
    assert output.tokens == [expected(peer, prompt, max_new_tokens=20) for prompt in PROMPTS]


def test_stop_strings(model, peer):
    tokens = expected(peer, PROMPTS[0], max_new_tokens=32)
    ascii_pairs = [
        model.tokenizer.decode(tokens[i : i + 2]) for i in range(8, 30) if max(tokens[i : i + 2]) < 94
    ]  # byte-level ids 0 .. 93 are the printable ASCII characters
    stop = ascii_pairs[0] if ascii_pairs else model.tokenizer.decode(tokens[9:10])
    settings = dict(max_new_tokens=32, stop_strings=[stop, "never this"])
    wanted = [expected(peer, prompt, tokenizer=model.tokenizer, **settings) for prompt in PROMPTS]
    assert len(wanted[0]) < 32
    assert model.generate(PROMPTS, **settings).tokens == wanted


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(temperature=0.7, top_k=0),
        dict(top_k=5),
        dict(top_k=0, top_p=0.8),
        dict(min_p=0.1, temperature=1.5),
        dict(top_k=0, typical_p=0.9),
        dict(top_k=0, epsilon_cutoff=0.01),
        dict(top_k=0, eta_cutoff=0.02),
        dict(top_p=0.9, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_sampling_is_transformers(model, peer, settings, monkeypatch):
    """The same tokens, when transformers draws from its probabilities as we do."""
    settings = dict(max_new_tokens=24, do_sample=True) | settings
    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(torch, "multinomial", lambda p, num_samples, g=generator: torch.tensor([[sample(p[0], g)]]))
        assert model.generate([prompt], seed=seed, **settings).tokens == [expected(peer, prompt, **settings)]


def test_sample_follows_the_probabilities():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(probabilities, generator) for _ in range(20000)]), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    # five standard deviations
    torch.testing.assert_close(counts / 20000, probabilities, atol=5 * (0.25 / 20000) ** 0.5, rtol=0)
    with pytest.raises(ValueError, match="no token can be sampled"):
        sample(torch.full((6,), torch.nan), generator)
