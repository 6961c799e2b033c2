"""Checkpoints: a Hugging Face folder (config.json, safetensors) becomes a config and the weights that the runner reads.

A folder is data from a stranger. Its JSON is checked before transformers builds anything from it, the headers of its
safetensors files before anything is allocated, and nothing is ever unpickled. Whatever is wrong with a folder is a
CheckpointError that names the file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..runtime.rope import RotaryEmbedding
from .families import (
    BOOLEANS,
    INTEGERS,
    MODEL_FAMILIES,
    NUMBERS,
    PLACEHOLDERS,
    VISION_FAMILIES,
    VISION_INTEGERS,
    ModelSpec,
    check_numbers,
    check_supported,
    check_vision_numbers,
    family_of,
    truncated_repr,
)

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_LIMIT = 8 << 20  # bytes; the largest real ones stay below a tenth of these
INDEX_LIMIT = 64 << 20
HEADER_LIMIT = 64 << 20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = ("F64", "F32", "F16", "BF16")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]

# What config.json may hand to transformers, besides the numbers that are checked; all else in it is not read.
CONFIG_KEYS = (
    *INTEGERS, *NUMBERS, *BOOLEANS, "hidden_act", "hidden_activation", "layer_types", "rope_parameters", "rope_scaling",
    "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
VISION_KEYS = ("model_type", "hidden_act", "layer_norm_eps", "deepstack_visual_indexes", "rope_parameters")

# Names of a vision-language checkpoint's tensors, as they are published and as transformers saves them -> ours: the
# decoder's like those of a decoder alone, the vision tower's like those of transformers' modules.
VISION_NAMES = (
    (r"^(model\.language_model|language_model\.model)\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.(visual|vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
)
VISION_MODULES = {"gemma3": ("vision_tower", "multi_modal_projector"), "qwen3_vl": ("visual",)}


class CheckpointError(ValueError):
    """Something is wrong with a checkpoint's folder or files. The message begins with the path."""


@dataclass
class LayerWeights:
    """One layer. Weights and biases are in the dtype asked for; gains are float32, the family's offset added."""

    input_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(Hq + 2 Hkv) E, D]: the rows of Q, then K, then V
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [E]
    k_norm: torch.Tensor | None  # [E]
    output: torch.Tensor  # [D, Hq E]
    output_bias: torch.Tensor | None
    post_attention_norm: torch.Tensor | None  # [D], sandwich norms only
    mlp_norm: torch.Tensor  # [D]
    gate_up: torch.Tensor  # [2 F, D]: the rows of the gate, then of up
    down: torch.Tensor  # [D, F]
    post_mlp_norm: torch.Tensor | None  # [D], sandwich norms only


@dataclass
class ModelWeights:
    """A model. `embedding`, `lm_head`, `output` and `down` may be views of their file: leave that as it is."""

    embedding: torch.Tensor  # [V, D]
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # [D] float32
    lm_head: torch.Tensor  # [V, D]; the embedding itself where the two are tied
    projection: torch.Tensor  # [L, 2 Hkv E, D]: the K and V rows of qkv times the input norm's gain
    projection_bias: torch.Tensor | None  # [L, 2 Hkv E]


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """The folder of a checkpoint: a folder as it is, a hub id (owner/name) downloaded.

    FileNotFoundError says what was tried where it is neither; CheckpointError for a file.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        hint = "; convert it with `pop convert`" if path.suffix == ".gguf" else ""
        raise CheckpointError(f"{path}: a file, expected a checkpoint's folder{hint}")
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII):
        raise FileNotFoundError(f"{name}: no such folder, and not a hub id (owner/name) either")
    from huggingface_hub import snapshot_download

    try:
        # Weights in another layout (original/, consolidated.safetensors) would double the download.
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:
        raise FileNotFoundError(f"{name}: no such folder, and not to be had from the hub: {error}") from error


def load_config(folder: str | Path):
    """The transformers config of a folder, from what the runner reads of config.json; of a vision-language checkpoint
    the whole one.

    Every number is checked before transformers sees it (a config class makes lists of num_hidden_layers entries), and
    the result is known to give a ModelSpec and a RotaryEmbedding. CheckpointError names the key.
    """
    path = _file(Path(folder), "config.json")
    raw = _read_json(path, CONFIG_LIMIT)
    try:
        family_of(raw.get("model_type"))
        check_supported(raw)
        values = _text_values(raw) if raw["model_type"] not in VISION_FAMILIES else _vision_language_values(raw)
        from transformers import CONFIG_MAPPING

        config = CONFIG_MAPPING[raw["model_type"]](**values)
        ModelSpec.from_config(config)
        RotaryEmbedding(config)
    except Exception as error:  # transformers' validation raises many kinds
        raise CheckpointError(f"{path}: {_one_line(error)}") from error
    return config


def _text_values(raw: dict) -> dict:
    """What a decoder's config hands to transformers."""
    check_numbers(raw)
    check_supported(raw)
    for key in ("rope_parameters", "rope_scaling"):
        value = raw.get(key)
        if isinstance(value, dict):
            value = {name: item for name, item in value.items() if name != "mrope_section"}
        _check_scalars(key, value, depth=2)
    return {key: raw[key] for key in CONFIG_KEYS if key in raw}


def _vision_language_values(raw: dict) -> dict:
    """What a vision-language config hands to transformers: that of the decoder and of the vision tower, and the ids of
    the tokens that stand for images.
    """
    kind = raw["model_type"]
    tables = {}
    for key in ("text_config", "vision_config"):
        tables[key] = raw.get(key)
        if not isinstance(tables[key], dict):
            raise ValueError(f"{key} is {truncated_repr(tables[key])}, expected a table")
    text, vision = tables["text_config"], tables["vision_config"]
    if text.get("model_type", VISION_FAMILIES[kind]) != VISION_FAMILIES[kind]:
        raise ValueError(
            f"text_config: model_type is {truncated_repr(text['model_type'])}, expected {VISION_FAMILIES[kind]}"
        )
    if not isinstance(raw.get("tie_word_embeddings", False), bool):
        raise ValueError(f"tie_word_embeddings is {truncated_repr(raw['tie_word_embeddings'])}, expected true or false")
    check_vision_numbers(kind, raw, vision)
    _check_scalars("rope_parameters", vision.get("rope_parameters"), depth=1)
    for key in ("model_type", "hidden_act"):
        if not isinstance(vision.get(key, ""), str):
            raise ValueError(f"vision_config: {key} is {truncated_repr(vision[key])}, expected a name")
    towers = {"gemma3": ("siglip_vision_model",), "qwen3_vl": ("qwen3_vl_vision", "qwen3_vl")}[kind]
    if vision.get("model_type", towers[0]) not in towers:
        raise ValueError(f"vision_config: model_type is {truncated_repr(vision['model_type'])}, expected {towers[0]}")
    special = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in raw}
    values = {
        "text_config": special | _text_values(text),
        "vision_config": {key: vision[key] for key in (*VISION_INTEGERS[kind], *VISION_KEYS) if key in vision}
        | {"model_type": towers[0]}
        | ({"vision_use_head": False} if kind == "gemma3" else {}),
    }
    return values | {
        key: raw[key] for key in (*PLACEHOLDERS[kind], "mm_tokens_per_image", "tie_word_embeddings") if key in raw
    }


def load_weights(
    folder: str | Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> ModelWeights:
    """The weights of a folder in `dtype` on `device`.

    Files are mapped, not read: a tensor that is in `dtype` already and is used as it is stays a view of its file, and
    costs no memory of the process. The others are converted straight into their place, so that beside the result
    there is never more than one tensor. Values are taken as they are, NaN included.
    CheckpointError if any tensor is missing, unexpected, of another shape or not floating; nothing is allocated then.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}, expected a floating dtype")
    files = _Tensors(Path(folder), dtype, torch.device(device), spec.vision_type)
    tensors, layer_tensors = _tensor_names(spec)
    files.check([tensors, *layer_tensors], others=VISION_MODULES.get(spec.vision_type, ()))
    if spec.tie_word_embeddings:
        files.check_tied(tensors["embedding"], MODEL_FAMILIES[spec.model_type].lm_head)

    kv_rows = spec.num_kv_heads * spec.head_dim
    embedding = files.weight(tensors["embedding"])
    projection = torch.empty(spec.num_layers, 2 * kv_rows, spec.hidden_size, dtype=dtype, device=device)
    projection_bias = torch.empty(projection.shape[:2], dtype=dtype, device=device) if spec.qkv_bias else None
    layers = []
    for index, names in enumerate(layer_tensors):

        def weight(*keys: str, names=names) -> torch.Tensor | None:
            return files.weight(*(names[key] for key in keys)) if keys[0] in names else None

        def gain(key: str, names=names) -> torch.Tensor | None:
            return files.gain(names[key], spec.norm_offset) if key in names else None

        layer = LayerWeights(
            input_norm=gain("input_norm"),
            qkv=weight("q", "k", "v"),
            qkv_bias=weight("q_bias", "k_bias", "v_bias"),
            q_norm=gain("q_norm"),
            k_norm=gain("k_norm"),
            output=weight("output"),
            output_bias=weight("output_bias"),
            post_attention_norm=gain("post_attention_norm"),
            mlp_norm=gain("mlp_norm"),
            gate_up=weight("gate", "up"),
            down=weight("down"),
            post_mlp_norm=gain("post_mlp_norm"),
        )
        # The gain is folded into the values as they are stored, in float32, and the product rounded once.
        for rows, key in ((slice(0, kv_rows), "k"), (slice(kv_rows, None), "v")):
            projection[index, rows] = files.read(names[key]).to(device, torch.float32) * layer.input_norm
        if projection_bias is not None:
            projection_bias[index] = layer.qkv_bias[-2 * kv_rows :]
        layers.append(layer)
    return ModelWeights(
        embedding=embedding,
        layers=layers,
        final_norm=files.gain(tensors["final_norm"], spec.norm_offset),
        lm_head=embedding if spec.tie_word_embeddings else files.weight(tensors["lm_head"]),
        projection=projection,
        projection_bias=projection_bias,
    )


def load_vision_weights(
    folder: str | Path, spec: ModelSpec, modules: dict[str, torch.nn.Module], dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """The state of each of the vision modules (named as in VISION_MODULES, on the meta device) in `dtype`.

    CheckpointError as `load_weights`, for the vision tensors.
    """
    files = _Tensors(Path(folder), dtype, torch.device("cpu"), spec.vision_type)
    tables = [
        {key: _Name(f"{name}.{key}", tuple(value.shape)) for key, value in module.state_dict().items()}
        for name, module in modules.items()
    ]
    files.check(tables, others=("model", "lm_head"))
    return {
        name: {key: files.weight(entry) for key, entry in table.items()}
        for name, table in zip(modules, tables, strict=True)
    }


@dataclass(frozen=True)
class _Name:
    """A tensor that a checkpoint must have."""

    name: str
    shape: tuple[int, ...]


def _tensor_names(spec: ModelSpec) -> tuple[dict[str, _Name], list[dict[str, _Name]]]:
    """What the checkpoint of a spec must hold: for the model and for each layer, our key -> name and shape."""
    family = MODEL_FAMILIES[spec.model_type]
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    layer = {
        "input_norm": ("input_layernorm.weight", (hidden,)),
        "q": ("self_attn.q_proj.weight", (q, hidden)),
        "k": ("self_attn.k_proj.weight", (kv, hidden)),
        "v": ("self_attn.v_proj.weight", (kv, hidden)),
        "output": ("self_attn.o_proj.weight", (hidden, q)),
        "mlp_norm": ("post_attention_layernorm.weight", (hidden,)),  # before the MLP, in spite of the name
        "gate": ("mlp.gate_proj.weight", (inner, hidden)),
        "up": ("mlp.up_proj.weight", (inner, hidden)),
        "down": ("mlp.down_proj.weight", (hidden, inner)),
    }
    if spec.qkv_bias:
        for key, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"{key}_bias"] = (f"self_attn.{key}_proj.bias", (rows,))
    if spec.output_bias:
        layer["output_bias"] = ("self_attn.o_proj.bias", (hidden,))
    if spec.qk_norm:
        layer["q_norm"] = ("self_attn.q_norm.weight", (spec.head_dim,))
        layer["k_norm"] = ("self_attn.k_norm.weight", (spec.head_dim,))
    if spec.sandwich_norms:
        layer["post_attention_norm"] = ("post_attention_layernorm.weight", (hidden,))
        layer["mlp_norm"] = ("pre_feedforward_layernorm.weight", (hidden,))
        layer["post_mlp_norm"] = ("post_feedforward_layernorm.weight", (hidden,))
    model = {
        "embedding": _Name(f"{family.prefix}embed_tokens.weight", (spec.vocab_size, hidden)),
        "final_norm": _Name(f"{family.prefix}norm.weight", (hidden,)),
    }
    if not spec.tie_word_embeddings:
        model["lm_head"] = _Name(family.lm_head, (spec.vocab_size, hidden))
    return model, [
        {key: _Name(f"{family.prefix}layers.{index}.{name}", shape) for key, (name, shape) in layer.items()}
        for index in range(spec.num_layers)
    ]


class _Tensors:
    """The tensors of a folder's safetensors files, by name. Opening reads headers only; the files stay mapped."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, vision_type: str | None = None):
        self.folder, self.dtype, self.device = folder, dtype, device
        self.files = {}  # tensor name -> (path, open file)
        self.stored = {}  # tensor name -> its name in the file
        for path, names in _weight_files(folder):
            file = open_safetensors(path)
            found = set(file.keys())
            if names is not None and found != names:
                which = f"has {_some(found - names)}" if found - names else f"lacks {_some(names - found)}"
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

    def check(self, tables: list[dict[str, _Name]], others: tuple[str, ...] = ()) -> None:
        """Every name is there in its shape and a floating dtype, and nothing else is but what `others` begin."""
        expected = {entry.name: entry.shape for table in tables for entry in table.values()}
        if missing := expected.keys() - self.files.keys():
            raise CheckpointError(f"{self.folder}: lacks {_some(missing)}")
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
            raise CheckpointError(f"{self.folder}: has {_some(unexpected)}, unknown to this model")
        for name, shape in expected.items():
            path, file = self.files[name]
            header = file.get_slice(self.stored[name])
            if tuple(header.get_shape()) != shape:
                raise CheckpointError(f"{path}: {name} is {header.get_shape()}, expected {list(shape)} by config.json")
            if header.get_dtype() not in DTYPES:
                raise CheckpointError(f"{path}: {name} is {header.get_dtype()}, expected {', '.join(DTYPES)}")

    def check_tied(self, embedding: _Name, lm_head: str) -> None:
        """A tied checkpoint that holds lm_head all the same must hold the embedding in it."""
        if lm_head not in self.files:
            return
        first, second = self.read(embedding), self.read(_Name(lm_head, ()))
        if first.dtype != second.dtype or not torch.equal(first, second):
            raise CheckpointError(
                f"{self.folder}: {lm_head} differs from {embedding.name}, but config.json sets tie_word_embeddings"
            )

    def read(self, tensor: _Name) -> torch.Tensor:
        """A tensor as it is stored: a view of the file, if the file keeps it at a multiple of its elements' size."""
        path, file = self.files[tensor.name]
        try:
            view = file.get_tensor(self.stored[tensor.name])
            return view if view.data_ptr() % view.element_size() == 0 else view.clone()
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path}: {tensor.name}: {_one_line(error)}") from error

    def weight(self, *tensors: _Name) -> torch.Tensor:
        """In the target dtype and on the device; several are stacked by rows."""
        if len(tensors) == 1:
            return self.read(tensors[0]).to(self.device, self.dtype)
        rows = [tensor.shape[0] for tensor in tensors]
        weight = torch.empty(sum(rows), *tensors[0].shape[1:], dtype=self.dtype, device=self.device)
        for part, tensor in zip(weight.split(rows), tensors, strict=True):
            part.copy_(self.read(tensor))
        return weight

    def gain(self, tensor: _Name, offset: float) -> torch.Tensor:
        return self.read(tensor).to(self.device, torch.float32) + offset


def _weight_files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """The folder's safetensors files, each with the tensors that the index puts there (None without an index)."""
    if (folder / SINGLE_FILE).exists() or not (folder / INDEX).exists():
        yield _file(folder, SINGLE_FILE), None
        return
    path = _file(folder, INDEX)
    weight_map = _read_json(path, INDEX_LIMIT).get("weight_map")
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
        yield _file(folder, shard), names


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
        raise CheckpointError(f"{path}: {_one_line(error)}") from error


def _file(folder: Path, name: str) -> Path:
    """A regular file of the folder. Links may lead elsewhere in the folder, or to the blobs of the hub's cache."""
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
        if home.parent.name == "snapshots":  # the hub's cache: models--owner--name/snapshots/revision, and blobs
            home = home.parent.parent
        if real.is_file() and real.is_relative_to(home):
            return path
        problem = "leads out of the folder" if real.is_file() else "is not a file" if path.exists() else "no such file"
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name that no file can have
        problem = _one_line(error)
    if name == SINGLE_FILE and folder.is_dir():
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (*PICKLES, ".gguf"))
        if any(name.endswith(PICKLES) for name in others):
            problem += f"; pickled files ({_some(others)}) are never read: save the model as safetensors"
        elif others:
            problem += f"; {_some(others)} can be converted with `pop convert`"
    raise CheckpointError(f"{path}: {problem}")


def _read_json(path: Path, limit: int) -> dict:
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
        if len(text) > limit:
            raise CheckpointError(f"{path}: more than {limit >> 20} MiB")
        value = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a {type(value).__name__}, expected a table")
    return value


def _check_scalars(name: str, value, depth: int) -> None:
    """Tables at most `depth` deep, of strings, numbers, booleans and nulls: what RoPE parameters are made of."""
    if isinstance(value, dict) and depth > 0 and len(value) <= 64:
        for key, item in value.items():
            _check_scalars(f"{name}[{truncated_repr(key)}]", item, depth - 1)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{name} is {truncated_repr(value)}, expected a plain value")


def _some(names: Iterable[str]) -> str:
    """The first names of many, for an error message."""
    names = sorted(names)
    return ", ".join(truncated_repr(name) for name in names[:3]) + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def _one_line(error: Exception) -> str:
    """What another library said of a stranger's data, fit for a terminal."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text)


def convert_gguf(gguf_file: str | Path, output_folder: str | Path) -> Path:
    """Writes the model of a GGUF file as a checkpoint folder (config, tokenizer, bfloat16 safetensors); returns it.

    bfloat16, as GGUF files are made of models published so: what they leave unquantised comes back exactly, the
    rounding of the rest is far below the quantisation's own, and the runner maps the file as it is, without a copy.
    The folder appears whole or not at all. FileNotFoundError, FileExistsError if the folder holds anything,
    ImportError without `accelerate` and `gguf`, CheckpointError if the file is no GGUF or of no supported model.
    """
    gguf_file, output_folder = Path(gguf_file), Path(output_folder)
    if not gguf_file.is_file():
        raise FileNotFoundError(f"{gguf_file}: no such file")
    if output_folder.exists() and (not output_folder.is_dir() or any(output_folder.iterdir())):
        raise FileExistsError(f"{output_folder}: exists already")
    for package in ("accelerate", "gguf"):
        if find_spec(package) is None:
            raise ImportError(f"reading a GGUF file needs the package {package}: pip install {package}")
    with gguf_file.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{gguf_file}: not a GGUF file")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    output_folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_folder.parent, prefix=f".{output_folder.name}-") as temporary:
        folder = Path(temporary) / "checkpoint"
        source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
        try:
            with _read_gguf_once():
                family_of(AutoConfig.from_pretrained(**source).model_type)
                model = AutoModelForCausalLM.from_pretrained(
                    **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
                )
                tokenizer = AutoTokenizer.from_pretrained(**source)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"{gguf_file}: {_one_line(error)}") from error
        load_config(folder)
        for path in folder.iterdir():  # safetensors are written for their owner only
            path.chmod((folder / "config.json").stat().st_mode)
        folder.rename(output_folder)
    return output_folder


@contextmanager
def _read_gguf_once():
    """Within it, transformers parses a GGUF once, not for config, weights and tokenizer each.

    It also builds the table of tensor names once, not for each of hundreds of modules. Halves the time of a conversion.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name in names:
            setattr(gguf, name, lru_cache(originals[name]))
        yield
    finally:
        for name in names:
            setattr(gguf, name, originals[name])
