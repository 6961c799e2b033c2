"""GGUF files become checkpoint folders."""

from __future__ import annotations

import json
import re
import struct
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .config import load_config
from .families import MODEL_FAMILIES, ModelSpec
from .files import INDEX, SINGLE_FILE, CheckpointError, check_no_pointer, one_line, some_of
from .gguf_config import read_config
from .tensors import TensorEntry
from .weights import tensor_names

SHARD_BYTES = 4 << 30  # of a safetensors file, and with it of memory
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
# GGUF's names of tensors, without .weight or .bias -> our keys (`tensor_names`).
MODEL_TENSORS = {"token_embd": "embedding", "output_norm": "final_norm", "output": "lm_head"}
LAYER_TENSORS = {
    "attn_norm": "input_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "output",
    "attn_q_norm": "q_norm", "attn_k_norm": "k_norm", "post_attention_norm": "post_attention_norm",
    "ffn_norm": "mlp_norm", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down", "post_ffw_norm": "post_mlp_norm",
}  # fmt: skip
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> bytes
STRING, ARRAY = 8, 9


def convert_gguf(gguf_file: str | Path, output_folder: str | Path) -> Path:
    """Writes the model of a GGUF file as a checkpoint folder (config, tokenizer, bfloat16 safetensors); returns it.

    Of a model in several files (-00001-of-00003.gguf, ...), any of which may be given, all are read.
    bfloat16, as GGUF files are made of models published so: what they leave unquantised comes back exactly, the
    rounding of the rest is far below the quantisation's own, and the runner maps the file as it is, without a copy.
    The folder appears whole or not at all, with every tensor of the file and no other. FileNotFoundError,
    FileExistsError if the folder holds anything, ImportError without `gguf`, CheckpointError if the file is no GGUF, of
    no supported model, or says anything of it that a config.json of that model cannot.
    """
    gguf_file, output_folder = Path(gguf_file), Path(output_folder)
    if not gguf_file.is_file():
        raise FileNotFoundError(f"{gguf_file}: no such file")
    if output_folder.exists() and (not output_folder.is_dir() or any(output_folder.iterdir())):
        raise FileExistsError(f"{output_folder}: exists already")
    if find_spec("gguf") is None:
        raise ImportError("reading a GGUF file needs the package gguf: pip install gguf")
    output_folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_folder.parent, prefix=f".{output_folder.name}-") as temporary:
        folder = Path(temporary) / "checkpoint"
        folder.mkdir()
        with _read_once():
            first, fields, tensors = read_parts(gguf_file)
            try:
                config = read_config(fields, tensors)
            except (ValueError, TypeError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{first}: {one_line(error)}") from error
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            try:
                spec = ModelSpec.from_config(load_config(folder))
            except CheckpointError as error:
                raise CheckpointError(f"{first}: {str(error).partition('config.json: ')[2]}") from error
            _write_tensors(folder, first, spec, tensors)
            _write_tokenizer(folder, first, load_config(folder))
        for path in folder.iterdir():  # safetensors are written for their owner only
            path.chmod((folder / "config.json").stat().st_mode)
        folder.rename(output_folder)
    return output_folder


def read_parts(gguf_file: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The first file of a model, its fields, and the tensors of all its files by name. CheckpointError if a part is
    missing or damaged.
    """
    import gguf

    files, match = [gguf_file], PART.fullmatch(gguf_file.name)
    if match:
        name, _, count = match.groups()
        files = [gguf_file.with_name(f"{name}-{part + 1:05d}-of-{count}.gguf") for part in range(min(int(count), 1000))]
    fields: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for number, file in enumerate(files):
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, expected beside {gguf_file.name}, a part of {len(files)}")
        check_whole(file)
        try:
            reader = gguf.GGUFReader(file)
            own = {key: field.contents() for key, field in reader.fields.items() if key.startswith("split.")}
        except Exception as error:  # whatever a damaged file makes of it
            raise CheckpointError(f"{file}: {one_line(error)}") from error
        if own.get("split.count", 1) != len(files) or own.get("split.no", 0) != number:
            raise CheckpointError(
                f"{file}: is part {own.get('split.no', 0) + 1} of {own.get('split.count', 1)} by its own account, "
                f"expected part {number + 1} of {len(files)}, named -{number + 1:05d}-of-{len(files):05d}.gguf"
            )
        fields = fields or reader.fields
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise CheckpointError(f"{file}: {tensor.name} is in another part, too")
            tensors[tensor.name] = tensor
        total = own.get("split.tensors.count")
    if len(files) > 1 and total not in (None, 0, len(tensors)):
        raise CheckpointError(f"{files[0]}: its parts have {len(tensors)} tensors, expected {total}")
    return files[0], fields, tensors


class _Header:
    """Walks over a GGUF header. CheckpointError where it needs more bytes than the file has."""

    def __init__(self, path: Path, data, size: int):
        self.path, self.data, self.size = path, data, size
        self.offset = 4

    def skip(self, count: int) -> int:
        self.require(count)
        self.offset += count
        return self.offset - count

    def require(self, count: int) -> None:
        if count > self.size - self.offset:
            raise CheckpointError(
                f"{self.path}: cut short: its header needs {count} bytes at {self.offset}, the file has {self.size}"
            )

    def number(self, code: str) -> int:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(code)))[0]

    def string(self) -> bytes:
        length = self.number("Q")
        begin = self.skip(length)
        return self.data[begin : begin + length]

    def skip_value(self, kind: int, depth: int = 0) -> None:
        if kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == STRING:
            self.skip(self.number("Q"))
        elif kind == ARRAY and depth < 2:
            item, count = self.number("I"), self.number("Q")
            if item in SCALARS:
                self.skip(SCALARS[item] * count)
            else:
                self.require(8 * count)  # each takes that at least
                for _ in range(count):
                    self.skip_value(item, depth + 1)
        else:
            raise CheckpointError(f"{self.path}: has a value of unknown type {kind}")

    def skip_fields(self, count: int) -> int:
        """Past all fields; returns the alignment of the tensors' data."""
        alignment = 32
        for _ in range(count):
            key, kind = self.string(), self.number("I")
            if key == b"general.alignment" and kind == 4:
                alignment = self.number("I") or alignment
            else:
                self.skip_value(kind)
        return alignment

    def tensor(self) -> tuple[int, str]:
        """Where the next tensor's data end, from the start of all data; and its name."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = one_line(self.string().decode("utf-8", "replace"))
        elements = 1
        for _ in range(self.number("I")):
            elements *= self.number("Q")
        kind, begin = self.number("I"), self.number("Q")
        if kind not in set(GGMLQuantizationType):
            raise CheckpointError(f"{self.path}: {name} has an unknown type, {kind}")
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return begin + elements // block * width, name


def check_whole(path: Path) -> None:
    """CheckpointError unless a file is a GGUF and holds all that its header lists: a download may have been cut short,
    and a hostile count must not be trusted.
    """
    import mmap

    with path.open("rb") as file:
        start, size = file.read(64), path.stat().st_size
        check_no_pointer(path, start)
        if start[:4] != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file")
        header = _Header(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), size)
    if (version := header.number("I")) not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version}, expected 2 or 3")
    count, fields = header.number("Q"), header.number("Q")
    alignment = header.skip_fields(fields)
    end, name = max((header.tensor() for _ in range(count)), default=(0, ""))
    data_start = header.offset + -header.offset % alignment
    if data_start + end > size:
        raise CheckpointError(f"{path}: cut short: {name} ends at {data_start + end} bytes, the file has {size}")


def _write_tensors(folder: Path, source: Path, spec: ModelSpec, tensors: dict) -> None:
    """Every tensor, in bfloat16, in safetensors files of a few GiB. CheckpointError if the file has one too many, too
    few, or of another shape; before anything is written.
    """
    from safetensors.torch import save_file

    wanted = _expected(spec)
    harmless = {name for name in tensors if name == "rope_freqs.weight" or name.endswith("attn_rot_embd.weight")}
    if missing := wanted.keys() - tensors.keys():
        raise CheckpointError(f"{source}: lacks {some_of(missing)}")
    if unknown := tensors.keys() - wanted.keys() - harmless:
        raise CheckpointError(f"{source}: has {some_of(unknown)}, unknown to this model")
    shards, sizes = [{}], [0]
    for name, (key, entry) in wanted.items():
        shape = tuple(int(size) for size in reversed(tensors[name].shape))
        if shape != entry.shape:
            raise CheckpointError(f"{source}: {name} is {list(shape)}, expected {list(entry.shape)}")
        size = 2 * tensors[name].n_elements
        if sizes[-1] and sizes[-1] + size > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][entry.name] = (key, tensors[name])
        sizes[-1] += size
    files = [SINGLE_FILE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]  # fmt: skip
    for file, shard in zip(files, shards, strict=True):
        save_file({name: _values(spec, *item) for name, item in shard.items()}, folder / file, {"format": "pt"})
    if len(files) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _expected(spec: ModelSpec) -> dict[str, tuple[str, TensorEntry]]:
    """GGUF's name of each tensor of a model -> our key and its entry in a checkpoint."""
    model, layers = tensor_names(spec)
    tables = [("", {ours: theirs for theirs, ours in MODEL_TENSORS.items()}, model)]
    ours = {ours: theirs for theirs, ours in LAYER_TENSORS.items()}
    tables += [(f"blk.{index}.", ours, layer) for index, layer in enumerate(layers)]
    return {
        f"{prefix}{names[key.removesuffix('_bias')]}.{'bias' if key.endswith('_bias') else 'weight'}": (key, entry)
        for prefix, names, table in tables
        for key, entry in table.items()
    }


def _values(spec: ModelSpec, key: str, tensor) -> torch.Tensor:
    """A tensor dequantised, as transformers' modules hold it."""
    import gguf
    import numpy as np

    values = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    heads = {"q": spec.num_heads, "k": spec.num_kv_heads}.get(key.removesuffix("_bias"))
    if spec.model_type in ("llama", "mistral") and heads:
        # llama.cpp turns neighbours of a head together, transformers the two halves.
        values = values.view(heads, spec.head_dim // 2, 2, -1).transpose(1, 2).reshape(values.shape)
    if MODEL_FAMILIES[spec.model_type].norm_offset and key.endswith("norm"):
        values = values - MODEL_FAMILIES[spec.model_type].norm_offset  # GGUF holds the whole gain
    return values.bfloat16().contiguous()


def _write_tokenizer(folder: Path, source: Path, config) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{source}: the tokenizer cannot be read: {one_line(error)}") from error
    ids = {f"{kind}_token_id": getattr(config, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    GenerationConfig(**{key: value for key, value in ids.items() if value is not None}).save_pretrained(folder)


@contextmanager
def _read_once():
    """Within it, transformers does not parse again, for the tokenizer, a GGUF that was parsed for the weights."""
    import gguf

    original = gguf.GGUFReader
    cached = lru_cache(maxsize=4)(original)
    try:
        gguf.GGUFReader = lambda path, mode="r": cached(str(path), mode)
        yield
    finally:
        gguf.GGUFReader = original
