"""Prompts of all kinds, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch


def test_kinds_of_prompts(model):
    ids = model.tokenizer("Hello, world").input_ids
    wanted = model.generate(ids, max_new_tokens=5).tokens
    assert len(wanted) == 1
    for prompts in ("Hello, world", ["Hello, world"], [ids], tuple(ids), [tuple(ids)]):
        assert model.generate(prompts, max_new_tokens=5).tokens == wanted
    chat = [{"role": "user", "content": "Hello"}]
    rendered = "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHello<|end|>\n<|start|>assistant\n"
    wanted_chat = model.generate(rendered, max_new_tokens=5).tokens
    assert model.generate(chat, max_new_tokens=5).tokens == wanted_chat
    assert model.generate([ids, chat, "Hello, world"], max_new_tokens=5).tokens == wanted + wanted_chat + wanted


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ([], ValueError, "prompts is empty"),
        ([[]], ValueError, r"prompts\[0\] is empty"),
        ("", ValueError, r"prompts\[0\] is empty"),
        (None, TypeError, "prompts is of type NoneType, expected a string"),
        (7, TypeError, "prompts is of type int, expected a string"),
        (torch.tensor(1), TypeError, "prompts is of type int, expected a string"),
        ([1, "a"], TypeError, r"prompts\[0\]\[1\] is of type str, expected a token id \(int\)"),
        ([1, True], TypeError, "is of type bool, expected a token id"),
        ([[1, 2.0]], TypeError, r"prompts\[0\]\[1\] is of type float, expected a token id"),
        ([[1], None], TypeError, r"prompts\[1\] is of type NoneType, expected a string"),
        ([[1], [2, 293]], ValueError, r"prompts\[1\] has token id 293 at position 1, outside .* \[0, 293\)"),
        ([-1], ValueError, r"prompts\[0\] has token id -1"),
        ([2**70], ValueError, "token id"),
        (
            [{"role": "user"}],
            TypeError,
            r"prompts\[0\]\[0\] is {'role': 'user'}, expected a message with 'role' and 'content'",
        ),
        ([{"role": "user", "content": "a"}, "b"], TypeError, r"prompts\[0\]\[1\] is 'b', expected a message"),
    ],
    ids=str,
)
def test_bad_prompts(model, live, prompts, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompts, max_new_tokens=2)
    assert live == []


def test_text_needs_a_tokenizer(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        model.generate([{"role": "user", "content": "a"}], max_new_tokens=2)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate("a", max_new_tokens=2)
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate([1], max_new_tokens=2, stop_strings="a")
    assert model.generate([1], max_new_tokens=2).text is None


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(num_beams=2), ValueError, "num_beams=2 is not supported"),
        (dict(num_return_sequences=2, do_sample=True), ValueError, "num_return_sequences=2 is not supported"),
        (dict(num_beam_groups=2), ValueError, "num_beam_groups"),
        (dict(guidance_scale=1.5), ValueError, "guidance_scale=1.5"),
        (dict(prompt_lookup_num_tokens=3), ValueError, "prompt_lookup_num_tokens"),
        (dict(assistant_early_exit=2), ValueError, "assistant_early_exit"),
        (dict(assistant_model=object()), ValueError, "assistant_model"),
        (dict(penalty_alpha=0.6), ValueError, "penalty_alpha"),
        (dict(dola_layers="low"), ValueError, "dola_layers"),
        (dict(force_words_ids=[[1]]), ValueError, "force_words_ids"),
        (dict(constraints=[1]), ValueError, "constraints"),
        (dict(token_healing=True), ValueError, "token_healing"),
        (dict(use_mtp=True), ValueError, "use_mtp"),
        (dict(output_scores=True), ValueError, "output_scores"),
        (dict(return_dict_in_generate=True), ValueError, "return_dict_in_generate"),
        (dict(custom_generate="somebody/something"), ValueError, "custom_generate"),
        (dict(attention_mask=torch.ones(1, 1)), ValueError, "attention_mask"),
        (dict(max_new_token=3), ValueError, "does not know or support max_new_token$"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        (dict(max_new_tokens="3"), TypeError, "max_new_tokens is of type str, expected an int"),
        (dict(min_new_tokens=1.0), TypeError, "min_new_tokens is of type float, expected an int"),
        (dict(seed="x"), TypeError, "seed is of type str, expected an int"),
        (dict(do_sample=True, temperature=0.0), ValueError, "temperature"),
        (
            dict(generation_config={"max_length": 3}),
            TypeError,
            "generation_config is of type dict, expected a GenerationConfig",
        ),
        (
            dict(logits_processor=lambda ids, scores: scores),
            TypeError,
            "logits_processor is of type function, expected a list of callables",
        ),
        (dict(stopping_criteria=[3]), TypeError, "stopping_criteria is of type list, expected a list of callables"),
        (dict(sequences=3), TypeError, "sequences is 3, expected a list of conversations"),
        (dict(sequences=[]), ValueError, "sequences has 0 conversations for 1 prompts"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)),  # the same in every process
)
def test_unsupported_settings(model, live, settings, error, message):
    with pytest.raises(error, match=message):
        model.generate([1, 2, 3], **(dict(max_new_tokens=2) | settings))
    assert live == []


def test_unsupported_setting_of_the_checkpoint(model):
    model.generation_config.num_beams = 4
    with pytest.raises(ValueError, match="num_beams=4 is not supported"):
        model.generate([1, 2, 3], max_new_tokens=2)
    assert model.generate([1, 2, 3], max_new_tokens=2, num_beams=1).tokens
