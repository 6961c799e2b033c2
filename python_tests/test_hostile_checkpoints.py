"""2,000 spoiled checkpoints: each gives a model that is what its config says, or a CheckpointError. Nothing else."""

import json
import os
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from vision_models import TINY_VISION, TinyVision

from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.families import ModelSpec
from pop_ext.checkpoints.files import CheckpointError
from pop_ext.checkpoints.weights import LayerWeights, load_weights
from pop_ext.runtime.rope import RotaryEmbedding
from pop_ext.vision.encoder import Vision

SEED, CASES = 20260203, 2000
SECONDS = 20  # a case may take; thousands of times what it does take, as the machine may be busy
MEBIBYTES = 256  # that all cases together may add to the largest resident memory

SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
CONFIGS = [
    transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True, attention_bias=True),
    transformers.MistralConfig(**SIZES, sliding_window=5),
    transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    transformers.Qwen3Config(**SIZES, head_dim=12),
    transformers.Gemma3TextConfig(**SIZES, head_dim=8, layer_types=["sliding_attention", "full_attention"]),
    TINY_VISION["qwen3_vl_tied"],
    TINY_VISION["gemma3_pan"],
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> list[dict[str, bytes]]:
    """Checkpoints to start from, as file contents: every family in one file and in shards, float32 and bfloat16."""
    checkpoints = []
    for index, config in enumerate(CONFIGS):
        torch.manual_seed(index)
        if isinstance(config, TinyVision):
            folder = config.make(tmp_path_factory.mktemp("sound"), index)
            checkpoints.append({path.name: path.read_bytes() for path in folder.iterdir()})
            continue
        model = transformers.AutoModelForCausalLM.from_config(config)
        for dtype, limit in ((torch.float32, "5GB"), (torch.bfloat16, "3KB")):
            folder = tmp_path_factory.mktemp("sound")
            model.to(dtype).save_pretrained(folder, max_shard_size=limit)
            checkpoints.append({path.name: path.read_bytes() for path in folder.iterdir()})
    return checkpoints


# What happens to one file. Each takes the random generator and the folder, and changes the folder.


ABSURD = [
    0, -1, 1, 3, 2**31, 2**63, 10**12, 10**100, -(10**18), 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), None,
    True, False, "", "16", "silu", "\ud800", "\x1b[2J", "x" * 100_000, [], [1], {}, {"a": 1}, [[]], [None] * 50_000,
    ["full_attention"] * 2, ["sliding_attention", "full_attention"], ["mamba", "moe"], "../../etc/passwd",
    {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 0}, {"rope_type": "longrope"}, {"full_attention": None},
    {"full_attention": {"rope_type": "default", "rope_theta": 0}},
]  # fmt: skip
KEYS = [
    "num_labels", "id2label", "layer_types", "sliding_window", "sliding_window_pattern", "max_window_layers",
    "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "query_pre_attn_scalar", "head_dim",
    "per_layer_config", "quantization_config", "torch_dtype", "use_sliding_window", "to_dict", "__class__", "auto_map",
    "original_max_position_embeddings", "_rope_type_labels", "attribute_map", "__post_init__",
]  # fmt: skip
SHARDS = [
    "/dev/zero", "/proc/self/mem", "..", ".", "", "a\0.safetensors", "config.json", 3, None, [], "\ud800.safetensors",
    "\x1b[2J.safetensors", "y" * 5000 + ".safetensors", ".safetensors",
]  # fmt: skip
DTYPES = ["F64", "F16", "I32", "BOOL", "F8_E4M3", "F4", "U8", "C64", "BF16", "F32", "X", "", None, 3]


def absurd_config(rng: random.Random, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        table = config
        inner = [value for value in config.values() if isinstance(value, dict)]
        if inner and rng.random() < 0.25:
            table = rng.choice(inner)
            inner = [value for value in table.values() if isinstance(value, dict)]
            table = rng.choice(inner) if inner else table
        key = rng.choice(
            [*table, *KEYS] if table is config else [*table, "factor", "type", "truncate", "mrope_section"]
        )
        if rng.random() < 0.2:
            table.pop(key, None)
        else:
            table[key] = rng.choice(ABSURD)
    path.write_bytes(json.dumps(config).encode())


def spoil_json(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.json")))
    data = bytearray(path.read_bytes())
    kind = rng.randrange(6)
    if kind == 0:
        data = data[: rng.randrange(len(data))]
    elif kind == 1:
        for _ in range(rng.choice([1, 2, 10])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data = rng.choice([b"[", b'{"weight_map":', b'[{"a":']) * rng.choice([10, 1000, 100_000])
    elif kind == 3:
        data = rng.choice([b"", b"null", b"[]", b"{}", b"1e999", b"\xff\xfe{}", b'"x"', b"\x00" * 100, b"9" * 9000])
    elif kind == 4:
        data = data.replace(b":", rng.choice([b"::", b": -", b": 1e", b': "']), rng.choice([1, 3, -1]))
    else:
        data = rng.randbytes(rng.randrange(1, 3000))
    path.write_bytes(data)


def spoil_index(rng: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        names = ["model.norm.weight", "lm_head.weight"]
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    name, shard = rng.choice(sorted(weight_map.items()))
    outside = folder.parent / "outside"
    kind = rng.randrange(6)
    if kind == 0:  # the very shard, out of the folder
        outside.mkdir(exist_ok=True)
        shutil.move(folder / shard, outside / shard)
        (folder / "link").symlink_to(outside)
        way = rng.choice([str(outside / shard), f"../outside/{shard}", f"link/{shard}", f"./x/../../outside/{shard}"])
        index["weight_map"] = {key: way if value == shard else value for key, value in weight_map.items()}
    elif kind == 1:
        weight_map[name] = rng.choice(SHARDS)
    elif kind == 2:
        del weight_map[name]
    elif kind == 3:
        weight_map[name] = rng.choice(sorted(set(weight_map.values())))
    elif kind == 4:
        weight_map[rng.choice(["", "model.layers.99.mlp.up_proj.weight", "lm_head.weight", "\ud800"])] = shard
    else:
        index["weight_map"] = rng.choice([None, [], 5, "model.safetensors", {}, {"": ""}])
    path.write_bytes(json.dumps(index).encode())


def spoil_files(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    kind = rng.randrange(7)
    data = path.read_bytes()
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(rng.choice([path, Path("/dev/zero"), Path("/etc/passwd"), Path("/no/such/file"), Path("..")]))
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.")
    elif kind == 4:  # a sound link within the folder
        (folder / "elsewhere").write_bytes(data)
        path.symlink_to("elsewhere")
    elif kind == 5:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        (outside / path.name).write_bytes(data)
        path.symlink_to(outside / path.name)


def spoil_bytes(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack_from("<Q", data)[0]
    kind = rng.randrange(8)
    if kind == 0:
        data = data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(header), rng.randrange(len(data)), len(data) - 1])]
    elif kind in (1, 2, 3):  # bits of the header
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(8, header)] ^= 1 << rng.randrange(8)
    elif kind == 4:
        data[rng.randrange(8)] ^= 1 << rng.randrange(8)
    elif kind == 5:
        length = rng.choice([0, 1, header - 9, header, len(data), 2**31, 2**32, 2**63, 2**64 - 1, 100_000_000])
        data[:8] = struct.pack("<Q", length)
    elif kind == 6:  # values: any bits are a number
        for _ in range(rng.choice([1, 30])):
            data[rng.randrange(header, len(data))] ^= 1 << rng.randrange(8)
    else:
        data += rng.randbytes(rng.choice([1, 8, 1000]))
    path.write_bytes(data)


def spoil_header(rng: random.Random, folder: Path) -> None:
    """A header that is sound JSON, and lies."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    name = rng.choice(sorted(key for key in header if key != "__metadata__"))
    entry = header[name]
    kind = rng.randrange(10)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        rows, *columns = entry["shape"]
        shapes = [[*columns, rows], [rows, *columns, 1], [rows + 1, *columns], [rows * 2, *columns], [-1], [0], [1], []]
        entry["shape"] = rng.choice([*shapes, [2**63], [2**64], [2**32, 2**32], "a", None, [1.5]])
    elif kind == 2:
        start, stop = entry["data_offsets"]
        ranges = [[stop, start], [0, stop], [start + 1, stop + 1], [start, start], [start], [start, stop, 9]]
        entry["data_offsets"] = rng.choice([*ranges, [0, 2**63], [-1, stop], [2**64, 2**64], None])
    elif kind == 3:
        del header[name]
    elif kind == 4:
        header[rng.choice(["model.layers.2.mlp.up_proj.weight", "x", "", "lm_head.weight", name + "\0"])] = header.pop(
            name
        )
    elif kind == 5:  # two tensors change places
        other = rng.choice(sorted(key for key in header if key != "__metadata__"))
        header[name], header[other] = header[other], header[name]
    elif kind == 6:  # an unaligned body: one byte before everything
        for key, value in header.items():
            if key != "__metadata__":
                value["data_offsets"] = [offset + 1 for offset in value["data_offsets"]]
        header["x.rotary_emb.inv_freq"] = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        body = b"\0" + body
    elif kind == 7:
        header["__metadata__"] = rng.choice([None, 3, {"format": 3}, {"format": "x" * 100_000}, [], {"a": {"b": "c"}}])
    elif kind == 8:
        header = rng.choice([[], {}, None, 5, {name: {}}, {name: []}, {name: [entry] * 10}])
    else:
        header[name] = {**entry, "x": "y"}
    text = json.dumps(header).encode()
    if rng.random() < 0.5:
        text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


MUTATIONS: list[tuple[Callable, int]] = [
    (absurd_config, 6), (spoil_json, 3), (spoil_index, 3), (spoil_files, 2), (spoil_bytes, 4), (spoil_header, 5),
]  # fmt: skip


def load(folder: Path) -> None:
    """Loads it all, and checks that what came is what the config says."""
    config = load_config(folder)
    spec = ModelSpec.from_config(config)
    weights = load_weights(folder, spec, torch.bfloat16)
    kv, hidden = spec.num_kv_heads * spec.head_dim, spec.hidden_size
    assert weights.embedding.shape == weights.lm_head.shape == (spec.vocab_size, hidden)
    assert weights.projection.shape == (spec.num_layers, 2 * kv, hidden)
    assert len(weights.layers) == len(spec.windows) == len(spec.rope_index) == spec.num_layers
    for layer in weights.layers:
        assert layer.qkv.shape == (spec.num_heads * spec.head_dim + 2 * kv, hidden)
        assert layer.gate_up.shape == (2 * spec.intermediate_size, hidden)
        assert (layer.k_norm is not None) == spec.qk_norm and (layer.qkv_bias is not None) == spec.qkv_bias
        for field in fields(LayerWeights):
            if (tensor := getattr(layer, field.name)) is not None:
                assert tensor.data_ptr() % tensor.element_size() == 0
                tensor.double().sum()  # reads every byte that it says it has
    if spec.vision_type:
        vision = Vision(folder, config, spec, torch.bfloat16)
        for module in vision.modules.values():
            for weight in module.parameters():
                weight.double().sum()
    rope = RotaryEmbedding(config)
    for table in rope(torch.tensor([0, 1, spec.max_position_embeddings - 1])):
        assert table.shape == (max(spec.rope_index) + 1, 3, spec.head_dim // 2)
        assert table.isfinite().all()


def test_sound_ones_load(sound, tmp_path):
    for index, files in enumerate(sound):
        folder = tmp_path / str(index)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        load(folder)


def test_mutated_checkpoints(sound, tmp_path):
    transformers.logging.set_verbosity_error()
    rng = random.Random(SEED)
    outcomes, slowest = Counter(), 0.0
    functions, weights = zip(*MUTATIONS, strict=True)
    folder = tmp_path / "model"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(CASES):
        mutation = rng.choices(functions, weights)[0]
        folder.mkdir()
        for name, data in rng.choice(sound).items():
            (folder / name).write_bytes(data)
        mutation(rng, folder)
        start = time.monotonic()
        try:
            load(folder)
            outcomes[mutation.__name__, "loads"] += 1
        except CheckpointError as error:
            message = str(error)
            assert message.startswith(str(folder)) and message.isprintable() and len(message) < 1000, (case, message)
            outcomes[mutation.__name__, "raises"] += 1
        except BaseException as error:
            shutil.copytree(folder, tmp_path / "failed", symlinks=True, ignore=lambda *_: [])
            error.add_note(f"case {case}, {mutation.__name__}; the folder is {tmp_path / 'failed'}")
            raise
        slowest = max(slowest, time.monotonic() - start)
        assert slowest < SECONDS, f"case {case}, {mutation.__name__}: {slowest:.1f} s"
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "outside", ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{CASES} spoiled checkpoints, the slowest in {slowest:.2f} s, {grown:.0f} MiB more memory")
    for mutation in functions:
        loads, raises = outcomes[mutation.__name__, "loads"], outcomes[mutation.__name__, "raises"]
        print(f"  {mutation.__name__}: {loads} load, {raises} raise")
        assert raises > loads / 10, f"{mutation.__name__} spoils nothing"
    assert grown < MEBIBYTES
