"""Defects of a checkpoint's files, each with its message; and where a checkpoint comes from."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import assert_same, edit, edit_config, edit_tensors, flat, load

from pop_ext.checkpoints.config import load_config
from pop_ext.checkpoints.files import CheckpointError, resolve_folder


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
