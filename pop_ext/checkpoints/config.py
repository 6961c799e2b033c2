"""A folder's config.json: checked before transformers builds a config from it."""

from __future__ import annotations

from pathlib import Path

from .bounds import (
    BOOLEANS,
    INTEGERS,
    NUMBERS,
    PLACEHOLDERS,
    VISION_INTEGERS,
    check_numbers,
    check_supported,
    check_vision_numbers,
    truncated_repr,
)
from .families import VISION_FAMILIES, ModelSpec, family_of
from .files import CONFIG_LIMIT, CheckpointError, one_line, read_json, regular_file
from .rope_frequencies import rope_frequencies

# What config.json may hand to transformers, besides the numbers that are checked; all else in it is not read.
CONFIG_KEYS = (
    *INTEGERS, *NUMBERS, *BOOLEANS, "hidden_act", "hidden_activation", "layer_types", "rope_parameters", "rope_scaling",
    "rope_theta", "rope_local_base_freq", "partial_rotary_factor", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
VISION_KEYS = ("model_type", "hidden_act", "layer_norm_eps", "deepstack_visual_indexes", "rope_parameters")


def load_config(folder: str | Path):
    """The transformers config of a folder, from what the runner reads of config.json; of a vision-language checkpoint
    the whole one.

    Every number is checked before transformers sees it (a config class makes lists of num_hidden_layers entries), and
    the result is known to give a ModelSpec and frequencies of RoPE. CheckpointError names the key.
    """
    path = regular_file(Path(folder), "config.json")
    raw = read_json(path, CONFIG_LIMIT)
    try:
        family_of(raw.get("model_type"))
        check_supported(raw)
        values = _text_values(raw) if raw["model_type"] not in VISION_FAMILIES else _vision_language_values(raw)
        from transformers import CONFIG_MAPPING

        config = CONFIG_MAPPING[raw["model_type"]](**values)
        ModelSpec.from_config(config)
        rope_frequencies(config)
    except Exception as error:  # transformers' validation raises many kinds
        raise CheckpointError(f"{path}: {one_line(error)}") from error
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


def _check_scalars(name: str, value, depth: int) -> None:
    """Tables at most `depth` deep, of strings, numbers, booleans and nulls: what RoPE parameters are made of."""
    if isinstance(value, dict) and depth > 0 and len(value) <= 64:
        for key, item in value.items():
            _check_scalars(f"{name}[{truncated_repr(key)}]", item, depth - 1)
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{name} is {truncated_repr(value)}, expected a plain value")
