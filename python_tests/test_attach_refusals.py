"""What `attach` refuses, by name and before the model is changed, and lm-eval on an attached model."""

from __future__ import annotations

import pytest
import torch
import transformers
from attach_cases import generate, left_padded, load_peer, load_runner, make_prompts
from helpers import make_chat_folder, tiny_folder

import pop_ext
from pop_ext.analysis.calibration import calibrate


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({}, ValueError, "prefill_depth is not given"),
        ({"prefill_depth": 7}, ValueError, r"prefill_depth is 7, expected 1 to 6 layers"),
        ({"prefill_depth": 0}, ValueError, "prefill_depth is 0"),
        ({"prefill_depth": 2.0}, ValueError, r"prefill_depth is 2.0, expected a share"),
        ({"prefill_depth": True}, TypeError, "prefill_depth is True"),
        ({"prefill_depth": "3"}, TypeError, "prefill_depth is '3'"),
        ({"prefill_depth": 3, "boundary_tokens": 0}, ValueError, "boundary_tokens is 0"),
        ({"prefill_depth": 3, "anchor_tokens": -1}, ValueError, "anchor_tokens is -1"),
        ({"prefill_depth": 3, "calibration": "none"}, FileNotFoundError, "none: no such calibration file"),
    ],
)
def test_settings(peer, settings, error, message):
    names = set(vars(peer))
    with pytest.raises(error, match=message):
        pop_ext.attach(peer, **settings)
    assert set(vars(peer)) == names


def test_other_models(peer):
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50)
    for model, name in (
        (transformers.GPT2LMHeadModel(config), "GPT2LMHeadModel"),
        (peer.model, "LlamaModel"),
        (3, "int"),
    ):
        with pytest.raises(ValueError, match=f"model is a {name}, expected one of LlamaForCausalLM, MistralFor"):
            pop_ext.attach(model, prefill_depth=1)
    config = peer.config.to_dict() | {"mlp_bias": True}
    with pytest.raises(ValueError, match="mlp_bias is True"):
        pop_ext.attach(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), prefill_depth=1)
    with pytest.raises(ValueError, match="model is a LlamaForCausalLM without POP, expected one given to"):
        pop_ext.detach(peer)


def test_weights_that_are_no_plain_linear(tiny_llama):
    class Adapted(torch.nn.Linear):
        pass

    peer = load_peer(tiny_llama)
    peer.model.layers[4].self_attn.v_proj.__class__ = Adapted
    with pytest.raises(ValueError, match="v_proj of layer 4 is a Adapted, expected a plain Linear: neither quantised"):
        pop_ext.attach(peer, prefill_depth=2)
    with torch.device("meta"):
        peer = transformers.LlamaForCausalLM(peer.config)
    with pytest.raises(ValueError, match="the decoder is on meta, expected one device that holds it"):
        pop_ext.attach(peer, prefill_depth=2)


def test_attention_without_masks(tiny_llama, peer):
    other = load_peer(tiny_llama, "flex_attention")
    with pytest.raises(ValueError, match="attn_implementation is flex_attention, expected sdpa or eager"):
        pop_ext.attach(other, prefill_depth=2)
    pop_ext.attach(peer, prefill_depth=2)
    peer.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="attn_implementation is flex_attention"):
        generate(peer, left_padded(make_prompts(9)))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_cache": False}, "use_cache is False, expected True"),
        ({"output_hidden_states": True}, "output_hidden_states is True, expected False"),
        ({"output_attentions": True}, "output_attentions is True, expected False"),
    ],
)
def test_generate(tiny_llama, settings, message):
    peer = pop_ext.attach(load_peer(tiny_llama, "eager"), prefill_depth=2)
    with pytest.raises(ValueError, match=message):
        generate(peer, left_padded(make_prompts(9)), **settings)


def test_masks(peer):
    pop_ext.attach(peer, prefill_depth=2)
    inputs = left_padded(make_prompts(9, 5))
    with pytest.raises(ValueError, match=r"attention_mask\[1\] ends with padding, expected it on the left"):
        generate(peer, {key: value.flip(1) for key, value in inputs.items()})
    output = generate(peer, inputs)
    short = {"input_ids": torch.tensor(make_prompts(4, 4)), "past_key_values": output.past_key_values}
    with pytest.raises(ValueError, match="attention_mask has 4 columns, expected more than the cache's 16"):
        generate(peer, short)  # generate takes a conversation's tokens from its beginning
    long = {"input_ids": torch.tensor(make_prompts(19, 19)), "attention_mask": torch.ones(2, 24).long()}
    with pytest.raises(ValueError, match="attention_mask has 24 columns, expected 35"):
        generate(peer, long | {"past_key_values": output.past_key_values})


@pytest.mark.parametrize("family", ["llama", "llama_untied_bias", "qwen3", "gemma3"])
def test_calibration_of_another_model(family, tmp_path_factory):
    folder, home = tiny_folder(family, tmp_path_factory), tmp_path_factory.mktemp("calibrations")
    path = home / "c.safetensors"
    calibration = calibrate(load_runner(folder, 1.0), make_prompts(*[40] * 6), [2, 3])
    calibration.save(path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # which round what is in the file
        pop_ext.attach(load_peer(folder).to(dtype), prefill_depth=2, calibration=path)
    peer = load_peer(folder)
    with pytest.raises(pop_ext.CalibrationError, match=r"prefill_depth is not given, and .*: expected one of 2, 3$"):
        pop_ext.attach(peer, calibration=path)
    calibration.provenance["recommended"] = 3
    calibration.save(home / "recommends.safetensors")
    assert pop_ext.attach(peer, calibration=home / "recommends.safetensors")._pop.depth == 3
    pop_ext.detach(peer)
    with pytest.raises(pop_ext.CalibrationError, match="prefill_depth is 1 layers, but the calibration was made"):
        pop_ext.attach(peer, prefill_depth=1, calibration=path)
    with torch.no_grad():
        peer.model.layers[3].mlp.up_proj.weight += 0.1
    with pytest.raises(pop_ext.CalibrationError, match="made for another model: its fingerprint differs"):
        pop_ext.attach(peer, prefill_depth=2, calibration=path)
    assert not hasattr(peer, "_pop")


def test_lm_eval(tiny_llama, tmp_path_factory):
    """`--model hf` with an attached model: a task's answers are the runner's."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lm-eval)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    chat = make_chat_folder(tiny_llama, tmp_path_factory)
    peer, tokenizer = load_peer(chat), transformers.AutoTokenizer.from_pretrained(chat)
    tokenizer.pad_token = tokenizer.eos_token = "<|end|>"
    model = HFLM(pretrained=pop_ext.attach(peer, prefill_depth=2), tokenizer=tokenizer, batch_size=2)
    texts = ["What does a lamp give?", "Where do fish live, and why do they do so?"]
    settings = {"until": ["\n"], "max_gen_toks": 6}
    asked = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(texts)]
    answers = model.generate_until(asked, disable_tqdm=True)
    runner = load_runner(chat, 2)
    expected = runner.generate([tokenizer(text).input_ids for text in texts], max_new_tokens=6).text
    assert answers == [text.split("\n")[0] for text in expected]
