"""config.json: what is read as transformers reads it, published ones, and defects, each with its message."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from checkpoint_helpers import edit, edit_config

from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import MODEL_FAMILIES, ModelSpec
from pop_ext.checkpoints.files import CheckpointError


def test_config_is_what_transformers_reads(tiny, tmp_path):
    """The same spec from what AutoConfig makes of the file, with keys of older versions and unknown ones in it."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))

    def age(config):
        rope = config.pop("rope_parameters")
        if config["model_type"] == "gemma3_text":
            config["rope_theta"] = rope["full_attention"].pop("rope_theta")
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        else:
            config["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] != "default":
            config["rope_scaling"] = rope
        config |= {"torch_dtype": "bfloat16", "num_labels": 10**12, "to_dict": 1, "auto_map": {"AutoConfig": "x.y"}}
        config["id2label"] = {"a": "b"}

    spec = ModelSpec.from_config(load_config(folder))
    edit(folder / "config.json", age)
    config = load_config(folder)
    assert ModelSpec.from_config(config) == spec
    reference = transformers.AutoConfig.from_pretrained(tiny)
    assert config.rope_parameters == reference.rope_parameters
    assert config.eos_token_id == reference.eos_token_id
    assert callable(config.to_dict)


LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PUBLISHED = {
    # config.json as published, without what does not matter here; and what the spec must say
    "Llama-3.1-8B": (
        dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", max_position_embeddings=131072,
             rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=LLAMA31 | {"rope_type": "llama3"}, mlp_bias=False,
             attention_bias=False, pretraining_tp=1, tie_word_embeddings=False, torch_dtype="bfloat16",
             eos_token_id=[128001, 128008, 128009], architectures=["LlamaForCausalLM"], use_cache=True),
        dict(head_dim=128, windows=(0,) * 32, qkv_bias=False, attention_scale=128**-0.5),
    ),
    "Mistral-7B-v0.1": (
        dict(model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=8, hidden_act="silu", max_position_embeddings=32768,
             rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False),
        dict(windows=(4096,) * 32, tie_word_embeddings=False),
    ),
    "Qwen2.5-0.5B, YaRN": (
        dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
             num_attention_heads=14, num_key_value_heads=2, hidden_act="silu", max_position_embeddings=32768,
             rms_norm_eps=1e-6, rope_theta=1000000.0, sliding_window=32768, max_window_layers=24, use_mrope=False,
             use_sliding_window=False, tie_word_embeddings=True, attention_dropout=0.0,
             rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}),
        dict(head_dim=64, windows=(0,) * 24, qkv_bias=True, output_bias=False, tie_word_embeddings=True),
    ),
    "Qwen3-0.6B": (
        dict(model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
             num_attention_heads=16, num_key_value_heads=8, head_dim=128, hidden_act="silu", rms_norm_eps=1e-6,
             max_position_embeddings=40960, max_window_layers=28, rope_scaling=None, rope_theta=1000000,
             sliding_window=None, use_sliding_window=False, attention_bias=False, tie_word_embeddings=True),
        dict(head_dim=128, qk_norm=True, qkv_bias=False, embedding_scale=1.0),
    ),
    "gemma-3-1b": (
        dict(model_type="gemma3_text", vocab_size=262144, hidden_size=1152, intermediate_size=6912,
             num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1, head_dim=256, rms_norm_eps=1e-6,
             hidden_activation="gelu_pytorch_tanh", max_position_embeddings=32768, query_pre_attn_scalar=256,
             rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None, sliding_window=512,
             sliding_window_pattern=6, attn_logit_softcapping=None, final_logit_softcapping=None,
             attention_bias=False, cache_implementation="hybrid", bos_token_id=2, eos_token_id=[1, 106]),
        dict(windows=((512,) * 5 + (0,)) * 4 + (512,) * 2, rope_index=((1,) * 5 + (0,)) * 4 + (1,) * 2,
             embedding_scale=1152**0.5, norm_offset=1.0, attention_scale=1 / 16, activation="gelu_tanh",
             tie_word_embeddings=True, sandwich_norms=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name, tmp_path):
    values, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    spec = ModelSpec.from_config(config)
    assert {key: getattr(spec, key) for key in expected} == expected
    assert spec == ModelSpec.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert config.eos_token_id == transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id


def test_gemma_layer_pattern(tiny_gemma, tmp_path):
    folder = Path(shutil.copytree(tiny_gemma, tmp_path / "model"))
    edit(folder / "config.json", lambda config: config.pop("layer_types"))
    edit_config(folder, sliding_window_pattern=3)
    assert ModelSpec.from_config(load_config(folder)).windows == (9, 9, 0, 9, 9, 0, 9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected 1 to 4096"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected an integer"),
        ({"vocab_size": -5}, "vocab_size is -5"),
        ({"vocab_size": 10**4000}, "vocab_size is 1000.*, expected 1 to"),
        ({"hidden_size": 1e3}, "hidden_size is 1000.0, expected an integer"),
        ({"hidden_size": "90"}, "hidden_size is '90', expected an integer"),
        ({"hidden_size": None}, "hidden_size|unsupported operand"),
        ({"head_dim": 33}, "head_dim|head_dim is 33"),
        ({"num_key_value_heads": 2}, "num_attention_heads is 9, not a multiple of num_key_value_heads, 2"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "multiple of the number of attention heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}}, "rope_theta is inf"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "a": {"b": {}}}}, "expected a plain value"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected one of silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is {'quant_method': 'gptq'}"),
        ({"per_layer_config": {"0": {"head_dim": 64}}}, "per_layer_config"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ({"layer_types": ["sliding_attention"] * 6}, "layer_types is .*; llama has full_attention in every layer"),
        ({"layer_types": ["full_attention"] * 5}, "number of `layer_types`"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported: llama, mistral, qwen2, qwen3, gemma3_text"),
        ({"model_type": None}, "model_type is None; supported: llama"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported: llama"),
    ],
)
def test_config_defects(folder, values, message):
    edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=message) as error:
        load_config(folder)
    assert str(error.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.GPT2Config(), "model_type is 'gpt2'; supported: " + ", ".join(MODEL_FAMILIES)),
        (transformers.Gemma3TextConfig(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
        (transformers.Gemma3TextConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping is 50.0"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        (transformers.Gemma3TextConfig(hidden_activation="gelu"), "hidden_activation is 'gelu'"),
        (transformers.Gemma3TextConfig(sliding_window=None), "sliding_window is not set"),
        (transformers.Gemma3TextConfig(sliding_window=0), "sliding_window is 0"),
        (transformers.LlamaConfig(mlp_bias=True), "mlp_bias is True"),
        (transformers.MistralConfig(layer_types=["full_attention"] * 32), "mistral has sliding_attention in every"),
        (transformers.Qwen2Config(layer_types=["sliding_attention"] * 32), "use_sliding_window is false"),
        (transformers.Qwen2Config(layer_types=["chunked_attention"] * 32), "layer_types has 'chunked_attention'"),
        (transformers.Qwen3Config(rope_parameters={"full_attention": {"rope_theta": 1e4}}), "rope_type is None"),
        (transformers.Gemma3TextConfig(rope_parameters={"rope_theta": 1e4, "rope_type": "linear"}), "has 'rope_theta'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else value.model_type,
)
def test_unsupported(config, message):
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 200_000, "not JSON"),
        ('{"a":' * 200_000, "not JSON"),
        ("[1]", "a list, expected a table"),
        ('{"vocab_size": ' + "9" * 10_000 + "}", "not JSON"),
        ("\x80\x81", "not JSON"),
        ('{"a": "' + "x" * (9 << 20) + '"}', "more than 8 MiB"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_config_is_no_json(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        load_config(folder)
