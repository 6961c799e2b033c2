"""Checkpoints: every tensor against transformers' own loading, memory, and what each defect of a folder says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_helpers import assert_same, flat, load
from helpers import TINY, model_gguf, real_model, transformers_model
from vision_models import TINY_VISION

import pop_ext
from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import MODEL_FAMILIES, VISION_FAMILIES, ModelSpec
from pop_ext.checkpoints.files import CheckpointError
from pop_ext.checkpoints.gguf import convert_gguf


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
    with_images = {VISION_FAMILIES[name] for name in ("qwen3_vl", "gemma3")}  # python_tests/vision
    assert alone | with_images == set(MODEL_FAMILIES)
    assert set(VISION_FAMILIES) == {"gemma3" if tiny.gemma else "qwen3_vl" for tiny in TINY_VISION.values()}
    assert CheckpointError is pop_ext.CheckpointError
