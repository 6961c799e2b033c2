"""The tensors of a folder's safetensors files: headers are checked before anything is allocated."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .bounds import truncated_repr
from .families import MODEL_FAMILIES
from .files import INDEX, SINGLE_FILE, CheckpointError, one_line, read_json, regular_file, some_of

INDEX_LIMIT = 64 << 20
HEADER_LIMIT = 64 << 20
DTYPES = ("F64", "F32", "F16", "BF16")
# Names of a vision-language checkpoint's tensors, as they are published and as transformers saves them -> ours: the
# decoder's like those of a decoder alone, the vision tower's like those of transformers' modules.
VISION_NAMES = (
    (r"^(model\.language_model|language_model\.model)\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.(visual|vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that a checkpoint must have."""

    name: str
    shape: tuple[int, ...]


class CheckpointTensors:
    """The tensors of a folder's safetensors files, by name. Opening reads headers only; the files stay mapped."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, vision_type: str | None = None):
        self.folder, self.dtype, self.device = folder, dtype, device
        self.files = {}  # tensor name -> (path, open file)
        self.stored = {}  # tensor name -> its name in the file
        for path, names in _weight_files(folder):
            file = open_safetensors(path)
            found = set(file.keys())
            if names is not None and found != names:
                which = f"has {some_of(found - names)}" if found - names else f"lacks {some_of(names - found)}"
                raise CheckpointError(f"{path}: {which}, against {INDEX}")
            for stored in found:
                name = stored
                for pattern, ours in VISION_NAMES if vision_type else ():
                    name = re.sub(pattern, ours, name)
                if self.stored.setdefault(name, stored) != stored:
                    raise CheckpointError(
                        f"{path}: {truncated_repr(stored)} is {truncated_repr(self.stored[name])} under another name"
                    )
                self.files[name] = (path, file)

    def check(self, tables: list[dict[str, TensorEntry]], others: tuple[str, ...] = ()) -> None:
        """Every name is there in its shape and a floating dtype, and nothing else is but what `others` begin."""
        expected = {entry.name: entry.shape for table in tables for entry in table.values()}
        if missing := expected.keys() - self.files.keys():
            raise CheckpointError(f"{self.folder}: lacks {some_of(missing)}")
        # Frequencies of RoPE, once saved as buffers, and a second copy of a tied embedding say nothing new.
        lm_heads = {family.lm_head for family in MODEL_FAMILIES.values()}
        unexpected = {
            name
            for name in self.files.keys() - expected.keys()
            if not name.endswith("rotary_emb.inv_freq")
            and name not in lm_heads
            and name.partition(".")[0] not in others
        }
        if unexpected:
            raise CheckpointError(f"{self.folder}: has {some_of(unexpected)}, unknown to this model")
        for name, shape in expected.items():
            path, file = self.files[name]
            header = file.get_slice(self.stored[name])
            if tuple(header.get_shape()) != shape:
                raise CheckpointError(f"{path}: {name} is {header.get_shape()}, expected {list(shape)} by config.json")
            if header.get_dtype() not in DTYPES:
                raise CheckpointError(f"{path}: {name} is {header.get_dtype()}, expected {', '.join(DTYPES)}")

    def check_tied(self, embedding: TensorEntry, lm_head: str) -> None:
        """A tied checkpoint that holds lm_head all the same must hold the embedding in it."""
        if lm_head not in self.files:
            return
        first, second = self.read(embedding), self.read(TensorEntry(lm_head, ()))
        if first.dtype != second.dtype or not torch.equal(first, second):
            raise CheckpointError(
                f"{self.folder}: {lm_head} differs from {embedding.name}, but config.json sets tie_word_embeddings"
            )

    def read(self, tensor: TensorEntry) -> torch.Tensor:
        """A tensor as it is stored: a view of the file, if the file keeps it at a multiple of its elements' size."""
        path, file = self.files[tensor.name]
        try:
            view = file.get_tensor(self.stored[tensor.name])
            return view if view.data_ptr() % view.element_size() == 0 else view.clone()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: {tensor.name}: {one_line(error)}") from error

    def weight(self, *tensors: TensorEntry) -> torch.Tensor:
        """In the target dtype and on the device; several are stacked by rows."""
        if len(tensors) == 1:
            return self.read(tensors[0]).to(self.device, self.dtype)
        rows = [tensor.shape[0] for tensor in tensors]
        weight = torch.empty(sum(rows), *tensors[0].shape[1:], dtype=self.dtype, device=self.device)
        for part, tensor in zip(weight.split(rows), tensors, strict=True):
            part.copy_(self.read(tensor))
        return weight

    def gain(self, tensor: TensorEntry, offset: float) -> torch.Tensor:
        return self.read(tensor).to(self.device, torch.float32) + offset


def _weight_files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The folder's safetensors files, each with the tensors that the index puts there (None without an index)."""
    if (folder / SINGLE_FILE).exists() or not (folder / INDEX).exists():
        yield regular_file(folder, SINGLE_FILE), None
        return
    path = regular_file(folder, INDEX)
    weight_map = read_json(path, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: weight_map is {truncated_repr(weight_map)}, expected a table")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # A name and nothing else: no folder, no way out of this one.
        plain = isinstance(shard, str) and len(shard) < 200 and shard.isprintable() and not {"/", "\\"} & set(shard)
        if not plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {truncated_repr(tensor)} is in {truncated_repr(shard)}, "
                "expected the name of a shard beside it"
            )
        shards.setdefault(shard, set()).add(tensor)
    for shard, names in shards.items():
        yield regular_file(folder, shard), names


def open_safetensors(path: Path):
    """safe_open, which checks that the header is sound and agrees with the file's size, after a look at its length."""
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
        if header > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(f"{path}: its header is {header} bytes long, the file {size}")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {one_line(error)}") from error
