"""Checkpoints: every tensor against transformers' own loading, memory, and what each defect of a folder says."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import TINY, model_gguf, real_model, transformers_model
from safetensors.torch import load_file, save_file
from vision_models import TINY_VISION

import pop_ext
from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import MODEL_FAMILIES, VISION_FAMILIES, ModelSpec
from pop_ext.checkpoints.files import CheckpointError, resolve_folder
from pop_ext.checkpoints.gguf import convert_gguf
from pop_ext.checkpoints.weights import load_weights


def load(folder: Path, dtype: torch.dtype = torch.float32):
    spec = ModelSpec.from_config(load_config(folder))
    return spec, load_weights(folder, spec, dtype)


def expected(model, spec: ModelSpec, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
    """What load_weights must give for a transformers model in float32, spelled with its modules."""

    def norm(module):
        return None if module is None else module.weight.float() + (1.0 if "Gemma" in type(module).__name__ else 0.0)

    def cast(tensor):
        return None if tensor is None else tensor.to(dtype)

    def stack(*modules, name="weight"):
        parts = [getattr(module, name) for module in modules]
        return None if parts[0] is None else torch.cat(parts).to(dtype)

    decoder = model.model
    tensors = {
        "embedding": cast(decoder.embed_tokens.weight),
        "final_norm": norm(decoder.norm),
        "lm_head": cast(model.lm_head.weight),
    }
    projection, projection_bias = [], []
    for index, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        tensors |= {
            f"{index}.input_norm": norm(layer.input_layernorm),
            f"{index}.qkv": stack(attention.q_proj, attention.k_proj, attention.v_proj),
            f"{index}.qkv_bias": stack(attention.q_proj, attention.k_proj, attention.v_proj, name="bias"),
            f"{index}.q_norm": norm(getattr(attention, "q_norm", None)),
            f"{index}.k_norm": norm(getattr(attention, "k_norm", None)),
            f"{index}.output": cast(attention.o_proj.weight),
            f"{index}.output_bias": cast(attention.o_proj.bias),
            f"{index}.post_attention_norm": norm(layer.post_attention_layernorm) if sandwich else None,
            f"{index}.mlp_norm": norm(layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm),
            f"{index}.gate_up": stack(mlp.gate_proj, mlp.up_proj),
            f"{index}.down": cast(mlp.down_proj.weight),
            f"{index}.post_mlp_norm": norm(layer.post_feedforward_layernorm) if sandwich else None,
        }
        kv = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
        projection.append((kv * norm(layer.input_layernorm)).to(dtype))
        projection_bias.append(stack(attention.k_proj, attention.v_proj, name="bias"))
    tensors["projection"] = torch.stack(projection)
    tensors["projection_bias"] = None if projection_bias[0] is None else torch.stack(projection_bias)
    return tensors


def flat(weights) -> dict[str, torch.Tensor | None]:
    model = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    layers = model.pop("layers")
    assert model.pop("first_projection") == 0
    for index, layer in enumerate(layers):
        model |= {f"{index}.{key}": value for key, value in vars(layer).items()}
    return model


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor is None:
            assert ours[name] is None, name
        else:
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shards", [False, True], ids=["one_file", "sharded"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_every_tensor(tiny, tmp_path, dtype, shards, stored):
    model = transformers_model(tiny).to(stored)
    model.save_pretrained(tmp_path, **({"max_shard_size": "100KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == shards
    spec, weights = load(tmp_path, dtype)
    assert_same(flat(weights), expected(model.float(), spec, dtype))
    assert (weights.lm_head is weights.embedding) == model.config.tie_word_embeddings


def test_spec(tiny):
    """The fields that transformers' modules hold too."""
    model = transformers_model(tiny)
    config, layer = model.config, model.model.layers[0]
    spec = ModelSpec.from_config(load_config(tiny))
    assert spec == ModelSpec.from_config(config)
    assert (spec.model_type, spec.vocab_size, spec.num_layers) == (config.model_type, 293, config.num_hidden_layers)
    assert spec.attention_scale == layer.self_attn.scaling
    assert spec.head_dim == layer.self_attn.head_dim
    assert spec.rms_norm_eps == config.rms_norm_eps
    assert spec.qk_norm == hasattr(layer.self_attn, "q_norm")
    assert spec.qkv_bias == (layer.self_attn.k_proj.bias is not None)
    assert spec.output_bias == (layer.self_attn.o_proj.bias is not None)
    assert spec.activation == ("gelu_tanh" if config.model_type == "gemma3_text" else "silu")
    scale = getattr(model.model.embed_tokens, "embed_scale", torch.tensor(1.0))
    assert torch.tensor(spec.embedding_scale) == scale
    window = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    assert spec.windows == tuple(window if kind == "sliding_attention" else 0 for kind in types)


def test_stored_in_the_target_dtype_is_a_view(tmp_path):
    """One file, two loads: what is not fused shares the file's pages, and writing to it is not seen by the file."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32,
    )).bfloat16()  # fmt: skip
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    _, weights = load(tmp_path, torch.bfloat16)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[0].split("-") for line in maps if line.endswith(str(tmp_path / "model.safetensors"))]

    def is_mapped(tensor):
        return any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in mapped)

    layer = weights.layers[0]
    assert all(map(is_mapped, [weights.embedding, weights.lm_head, layer.output, layer.down]))
    assert not any(map(is_mapped, [layer.qkv, layer.gate_up, layer.input_norm, weights.projection]))
    layer.down.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("padding", [1, 2, 3])
def test_unaligned_file(folder, padding):
    """Files of other writers may begin their values anywhere; what is loaded is aligned all the same."""
    path = folder / "model.safetensors"
    _, before = load(folder)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header += b" " * (-len(header) % 8 + padding)
    path.unlink()  # a new file, as the first one is still mapped
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    _, weights = load(folder)
    assert_same(flat(weights), flat(before))
    assert all(tensor.data_ptr() % 4 == 0 for tensor in flat(weights).values() if tensor is not None)


MEASURE = """
import sys, threading, torch, transformers
from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.weights import load_weights
from pop_ext.checkpoints.families import ModelSpec

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous"))

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
spec = ModelSpec.from_config(load_config(folder))  # with it, everything that is imported late
torch.ones(1 << 20).to(dtype)  # the thread pool
base = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
weights = load_weights(folder, spec, dtype)
done.set()
watcher.join()
tensors = [weights.embedding, weights.final_norm]
tensors += [t for layer in weights.layers for t in vars(layer).values() if t is not None]
size = sum(t.numel() for t in tensors) * dtype.itemsize
print((max(peak, anonymous()) - base) / size)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_memory(dtype):
    """Anonymous memory above the import baseline, at its highest, in weights' bytes."""
    folder = real_model("smollm2-135m")
    run = subprocess.run([sys.executable, "-c", MEASURE, folder, dtype], capture_output=True, text=True, check=True)
    share = float(run.stdout)
    print(f"\nanonymous memory of loading {folder.name} as {dtype}: {share:.2f} times the weights")
    assert share < 1.3


# Defects, each with the words that its message must have.


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    transformers_model(tiny_llama).save_pretrained(tmp_path / "model", max_shard_size="100KB")
    return tmp_path / "model"


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_config(folder: Path, **values) -> None:
    edit(folder / "config.json", lambda config: config.update(values))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.3.mlp.up_proj.weight"), "lacks 'model.layers.3.mlp.up_proj.weight'"),
        (lambda t: t.update({"model.layers.6.mlp.up_proj.weight": torch.ones(1)}), "has 'model.layers.6.*unknown to"),
        (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(90)}), "o_proj.bias', unknown to"),
        (lambda t: t.update({"model.norm.weight": torch.ones(91)}), r"norm.weight is \[91\], expected \[90\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(90, 1)}), r"norm.weight is \[90, 1\], expected \[90\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(90).int()}), "norm.weight is I32, expected F64, F32"),
        (lambda t: t.update({"model.norm.weight": torch.ones(90).to(torch.float8_e4m3fn)}), "norm.weight is F8_E4M3"),
        (lambda t: t.update({"lm_head.weight": torch.ones(293, 90)}), "lm_head.weight differs from model.embed_tokens"),
        (lambda t: t.update({"lm_head.weight": torch.ones(3)}), "lm_head.weight differs from model.embed_tokens"),
    ],
)
def test_tensor_defects(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_harmless_tensors(folder):
    _, before = load(folder)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)

    edit_tensors(folder, change)
    assert_same(flat(load(folder)[1]), flat(before))


def test_untied_without_a_head(folder):
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lacks 'lm_head\.weight'"):
        load(folder)


def test_values_are_taken_as_they_are(folder):
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert load(folder)[1].final_norm.isnan().all()


@pytest.mark.parametrize("size", [0, 4, 8, 5000, -1])
def test_truncated(folder, size):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        load(folder)


def test_header_longer_than_the_file(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.write((1 << 62).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="its header is 4611686018427387904 bytes long"):
        load(folder)


def test_nothing_is_unpickled(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file$"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"pickled files \('pytorch_model.bin'\) are never read"):
        load(folder)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "{outside}", "sub/../../outside.safetensors", "link/outside.safetensors", "..", "", ".",
     "model.bin", "a\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", 7, None, ["a"]],
    ids=repr,
)  # fmt: skip
def test_shard_names(sharded, shard):
    first = sharded / "model-00001-of-00002.safetensors"
    first = first if first.exists() else min(sharded.glob("*.safetensors"))
    outside = sharded.parent / "outside.safetensors"
    first.rename(outside)
    (sharded / "link").symlink_to(sharded.parent)
    shard = str(outside) if shard == "{outside}" else shard

    def change(index):
        index["weight_map"] = {
            name: shard if file == first.name else file for name, file in index["weight_map"].items()
        }

    edit(sharded / "model.safetensors.index.json", change)
    with pytest.raises(CheckpointError, match=r"expected the name of a shard beside it|surrogates|too long"):
        load(sharded)


def test_links(sharded, tmp_path):
    """Out of a download in the hub's cache: refused, but for that model's blobs, which it is made of."""
    name = min(file.name for file in sharded.glob("*.safetensors"))
    _, weights = load(sharded)
    hub = tmp_path / "models--a--b"
    (hub / "snapshots").mkdir(parents=True)
    (hub / "blobs").mkdir()
    (sharded / name).rename(hub / "blobs" / "0123")
    (sharded / name).symlink_to(hub / "blobs" / "0123")
    assert_same(flat(load(sharded)[1]), flat(weights))
    other = tmp_path / "models--c--d" / "snapshots" / "4567"
    other.parent.mkdir(parents=True)
    shutil.copytree(sharded, other, symlinks=True)
    with pytest.raises(CheckpointError, match=f"{name}: leads out of the folder"):
        load(other)
    snapshot = Path(shutil.copytree(sharded, hub / "snapshots" / "4567", symlinks=True))
    assert_same(flat(load(snapshot)[1]), flat(weights))
    (sharded / name).unlink()
    (sharded / name).symlink_to(sharded / name)
    with pytest.raises(CheckpointError, match=name):
        load(sharded)
    (sharded / name).unlink()
    (sharded / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{name}: is not a file"):
        load(sharded)


def test_missing_shard(sharded):
    name = min(file.name for file in sharded.glob("*.safetensors"))
    (sharded / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: no such file"):
        load(sharded)


def test_index_against_shards(sharded):
    def change(index):
        weight_map = index["weight_map"]
        names = sorted(weight_map)
        other = next(name for name in names if weight_map[name] != weight_map[names[0]])
        weight_map[names[0]] = weight_map[other]

    edit(sharded / "model.safetensors.index.json", change)
    with pytest.raises(CheckpointError, match=r"(has|lacks) '.*', against model.safetensors.index.json"):
        load(sharded)


# Where a checkpoint comes from.


def test_resolve_folder(folder, tmp_path, monkeypatch):
    assert resolve_folder(folder) == resolve_folder(str(folder)) == folder
    for name in ("/no/such/folder", "./models/x", "../a/b", "gpt2", "a/b/c", "~/models--x", ""):
        if name:
            with pytest.raises(FileNotFoundError, match="no such folder, and not a hub id"):
                resolve_folder(name)
    with pytest.raises(CheckpointError, match="a file, expected a checkpoint's folder"):
        resolve_folder(folder / "config.json")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(CheckpointError, match="convert it with `pop convert`"):
        resolve_folder(tmp_path / "x.gguf")

    calls = []

    def download(name, **arguments):
        calls.append((name, arguments))
        if name == "a/missing":
            raise OSError("Repository not found")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_folder("HuggingFaceTB/SmolLM2-135M-Instruct") == folder
    with pytest.raises(FileNotFoundError, match=r"a/missing: no such folder, and .* the hub: Repository not found"):
        resolve_folder("a/missing")
    patterns = calls[0][1]["allow_patterns"]
    assert "*.safetensors" in patterns and not any("bin" in pattern or pattern == "*" for pattern in patterns)


# GGUF.


def test_gguf_values(tmp_path):
    """The folder holds the file's dequantised values in bfloat16, gains exactly, a tokenizer and its template."""
    folder = real_model("smollm2-135m")
    gguf = pytest.importorskip("gguf")
    spec, weights = load(folder, torch.bfloat16)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert weights.lm_head is weights.embedding
    found = {
        "blk.7.ffn_down.weight": weights.layers[7].down,
        "blk.7.ffn_gate.weight": weights.layers[7].gate_up[:1536],
        "blk.29.attn_output.weight": weights.layers[29].output,
        "blk.3.attn_v.weight": weights.layers[3].qkv[-192:],
        "blk.3.attn_norm.weight": weights.layers[3].input_norm,
        "output_norm.weight": weights.final_norm,
    }
    for tensor in gguf.GGUFReader(model_gguf("smollm2-135m", tmp_path)).tensors:
        if (ours := found.pop(tensor.name, None)) is not None:
            theirs = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(ours, theirs.to(ours.dtype)), tensor.name
    assert not found
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert all(
        path.stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777 for path in folder.iterdir()
    )


def test_gguf_whole_or_not_at_all(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf: no such file"):
        convert_gguf(tmp_path / "nothing.gguf", tmp_path / "out")
    broken = tmp_path / "broken.gguf"
    for content, message in ((b"PK\3\4", "not a GGUF file"), (b"GGUF" + bytes(100), "broken.gguf: ")):
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            convert_gguf(broken, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full: exists already"):
        convert_gguf(broken, tmp_path / "full")

    # an interruption half way
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pop_ext.checkpoints.gguf.read_parts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_gguf(broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf", "full"]


def test_every_family_is_tested():
    alone = {entry.config.model_type for entry in TINY.values()}
    assert alone | {VISION_FAMILIES[name] for name in ("qwen3_vl", "gemma3")} == set(MODEL_FAMILIES)  # test_vision.py
    assert set(VISION_FAMILIES) == {"gemma3" if tiny.gemma else "qwen3_vl" for tiny in TINY_VISION.values()}
    assert CheckpointError is pop_ext.CheckpointError
