"""Model families as data: what a `config.json` says of an architecture, in the few fields that the runner needs.

A family is one row of `MODEL_FAMILIES`. It says which terms the architecture has and how transformers spells them in
config and tensor names; `ModelSpec.from_config` reads a config through that row. Whatever a config asks for that the
runner does not compute is an error that names it, never a term left out.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from .bounds import (
    PLACEHOLDERS,
    ROPE_NUMBERS,
    check_number,
    check_numbers,
    check_supported,
    check_vision_numbers,
    truncated_repr,
)

logger = logging.getLogger(__name__)
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """One row: the terms of an architecture. A bias is True, False, or the config's key that decides."""

    prefix: str = "model."  # of the decoder's tensors in the checkpoint
    lm_head: str = "lm_head.weight"  # of untied checkpoints
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    qk_norm: bool = False
    sandwich_norms: bool = False  # a norm after attention and MLP too, before the residual addition
    norm_offset: float = 0.0  # gain = offset + weight
    scaled_embedding: bool = False  # embeddings times sqrt(hidden size)
    activation: str = "hidden_act"  # the config's key
    windows: str = "none"  # which layers have the config's sliding_window: "none", "all", or those "listed" as sliding
    rope_per_layer_type: bool = False  # rope_parameters nested by layer type, a rotary embedding for each
    query_scalar: str | None = None  # key of what replaces the head size in the scale of q.k
    mrope: bool = False  # positions have three axes: time, height, width (they differ in images only)
    bidirectional_images: bool = False  # tokens of an image see one another in both directions


MODEL_FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", output_bias="attention_bias"),
    "mistral": Family(windows="all"),
    "qwen2": Family(qkv_bias=True, windows="listed"),
    "qwen3": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True, windows="listed"),
    "gemma3_text": Family(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        sandwich_norms=True,
        norm_offset=1.0,
        scaled_embedding=True,
        activation="hidden_activation",
        windows="listed",
        rope_per_layer_type=True,
        query_scalar="query_pre_attn_scalar",
        bidirectional_images=True,
    ),
    "qwen3_vl_text": Family(qkv_bias="attention_bias", output_bias="attention_bias", qk_norm=True, mrope=True),
}
# Vision-language checkpoints: the family of their decoder, whose config is the table text_config.
VISION_FAMILIES = {"gemma3": "gemma3_text", "qwen3_vl": "qwen3_vl_text"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Kinds of RoPE whose frequencies are fixed at load time, with the keys that each must have.
ROPE_TYPES = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the runner needs to know of an architecture. Sizes are in elements."""

    model_type: str  # of the decoder
    vision_type: str | None  # of the vision-language checkpoint that the decoder is part of
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    activation: str  # "silu" | "gelu_tanh"
    attention_scale: float  # multiplies q.k
    embedding_scale: float  # 1, or sqrt(hidden size) for Gemma; not rounded to the embeddings' dtype
    tie_word_embeddings: bool
    norm_offset: float  # gain = offset + weight; 1 for Gemma
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    sandwich_norms: bool
    windows: tuple[int, ...]  # per layer: query i sees key j iff i - window < j <= i; 0 is full attention
    rope_index: tuple[int, ...]  # per layer: which of RotaryEmbedding's rotary embeddings
    bidirectional_images: bool

    @classmethod
    def from_config(cls, config) -> ModelSpec:
        """The spec of a transformers config. ValueError names what is out of bounds or not supported."""
        family_of(getattr(config, "model_type", None))
        vision_type, tied = None, None
        if config.model_type in VISION_FAMILIES:
            vision_type, tied = config.model_type, config.tie_word_embeddings
            check_vision(config)
            config = text_config(config)
        family = family_of(config.model_type)
        values = vars(config) | ({} if tied is None else {"tie_word_embeddings": tied})
        check_numbers(values)
        check_supported(values)
        for key in (*REQUIRED, *filter(None, [family.query_scalar])):
            if values.get(key) is None:
                raise ValueError(f"{key} is missing")

        def flag(value: bool | str) -> bool:
            return bool(getattr(config, value, False)) if isinstance(value, str) else value

        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, {kv_heads}")
        head_dim = head_size(config)
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary embeddings need an even number")
        activation = getattr(config, family.activation, None)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(
                f"{family.activation} is {truncated_repr(activation)}, expected one of {', '.join(ACTIVATIONS)}"
            )
        types = layer_types(config)
        ropes = rope_parameters(config)
        query_scalar = getattr(config, family.query_scalar) if family.query_scalar else head_dim
        return cls(
            model_type=config.model_type,
            vision_type=vision_type,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.rms_norm_eps),
            max_position_embeddings=config.max_position_embeddings,
            activation=ACTIVATIONS[activation],
            attention_scale=query_scalar**-0.5,
            embedding_scale=config.hidden_size**0.5 if family.scaled_embedding else 1.0,
            tie_word_embeddings=values["tie_word_embeddings"],
            norm_offset=family.norm_offset,
            qk_norm=family.qk_norm,
            qkv_bias=flag(family.qkv_bias),
            output_bias=flag(family.output_bias),
            sandwich_norms=family.sandwich_norms,
            windows=tuple(config.sliding_window if kind == SLIDING else 0 for kind in types),
            rope_index=tuple(list(ropes).index(kind) if len(ropes) > 1 else 0 for kind in types),
            bidirectional_images=family.bidirectional_images,
        )


def family_of(model_type: str | None) -> Family:
    """The row of a model_type, for a vision-language one that of its decoder; ValueError lists the supported ones."""
    rows = MODEL_FAMILIES | {name: MODEL_FAMILIES[decoder] for name, decoder in VISION_FAMILIES.items()}
    if not isinstance(model_type, str) or model_type not in rows:
        raise ValueError(f"model_type is {truncated_repr(model_type)}; supported: {', '.join(rows)}")
    return rows[model_type]


def text_config(config):
    """The decoder's config: of a vision-language config its part, of another itself."""
    return config.text_config if config.model_type in VISION_FAMILIES else config


def head_size(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(config) -> list[str]:
    """FULL or SLIDING for each layer. A list where the family has none is an error, unless it says the same."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    windows = MODEL_FAMILIES[config.model_type].windows
    if windows != "listed":
        one = SLIDING if windows == "all" and window is not None else FULL
        same = [one] * config.num_hidden_layers
        if types is not None and types != same:
            raise ValueError(f"layer_types is {truncated_repr(types)}; {config.model_type} has {one} in every layer")
        types = same
    if not isinstance(types, list) or len(types) != config.num_hidden_layers:
        raise ValueError(f"layer_types is {truncated_repr(types)}, expected a list of {config.num_hidden_layers} names")
    for kind in types:
        if kind not in (FULL, SLIDING):
            raise ValueError(f"layer_types has {truncated_repr(kind)}, expected {FULL} or {SLIDING}")
    if SLIDING in types and window is None:
        raise ValueError(f"layer_types has {SLIDING}, but sliding_window is not set (or use_sliding_window is false)")
    return list(types)


def rope_parameters(config) -> dict[str | None, dict]:
    """The parameters of each rotary embedding, checked, in the order of ModelSpec.rope_index.

    One entry under None, or for a family with RoPE per layer type, one for each type that the layers have.
    """
    family, given = MODEL_FAMILIES[config.model_type], getattr(config, "rope_parameters", None)
    if not isinstance(given, dict):
        raise ValueError(f"rope_parameters is {truncated_repr(given)}, expected a table")
    if family.rope_per_layer_type:
        for key in given:
            if key not in (FULL, SLIDING):
                raise ValueError(
                    f"rope_parameters has {truncated_repr(key)}, expected a table for each of {FULL}, {SLIDING}"
                )
        found: dict[str | None, Any] = {kind: given.get(kind) for kind in sorted(set(layer_types(config)))}
    else:
        found = {None: given}
    for kind, parameters in found.items():
        name = f"rope_parameters[{kind!r}]" if kind else "rope_parameters"
        if not isinstance(parameters, dict):
            raise ValueError(f"{name} is {truncated_repr(parameters)}, expected a table")
        rope_type: Any = parameters.get("rope_type")
        check_rope_type(name, rope_type)
        for key, value in parameters.items():
            # Checkpoints carry numbers of other types of RoPE along, and notes on how they came about.
            if key in ROPE_NUMBERS:
                if value is not None:
                    check_number(f"{name}: {key}", value, ROPE_NUMBERS[key])
            elif key == "partial_rotary_factor":
                if value is not None and value != 1:
                    raise ValueError(f"{name}: partial_rotary_factor is {truncated_repr(value)}, expected 1")
            elif key == "mrope_section" and family.mrope:
                check_mrope_section(f"{name}: {key}", value, head_size(config) // 2)
            elif key == "mrope_interleaved" and family.mrope:
                if value is not True:
                    raise ValueError(f"{name}: mrope_interleaved is {truncated_repr(value)}, expected true")
            elif key in ("mrope_section", "mrope_interleaved"):
                raise ValueError(f"{name}: {truncated_repr(key)} is not supported")
            elif key not in ("rope_type", "type", "truncate"):  # no function of RoPE reads it
                logger.debug("%s: %s is not used", name, truncated_repr(key))
        for key in ROPE_TYPES[rope_type]:
            if parameters.get(key) is None:
                raise ValueError(f"{name}: {key} is missing for rope_type {rope_type}")
    return found


def check_rope_type(name: str, rope_type) -> None:
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"{name}: rope_type is {truncated_repr(rope_type)}; supported: {', '.join(ROPE_TYPES)}")


def check_mrope_section(name: str, value, frequencies: int) -> None:
    """Three counts, of the frequencies that turn with time, height and width."""
    counts = isinstance(value, list) and len(value) == 3 and all(type(count) is int and count >= 0 for count in value)
    if not counts or sum(value) != frequencies:
        raise ValueError(
            f"{name} is {truncated_repr(value)}, expected three counts with the sum {frequencies}, head_dim / 2"
        )


def check_vision(config) -> None:
    """ValueError unless a vision-language config's parts fit one another. `check_vision_numbers` has the bounds."""
    text, vision = config.text_config, config.vision_config
    check_vision_numbers(config.model_type, vars(config), vars(vision))
    for key in PLACEHOLDERS[config.model_type]:
        if getattr(config, key) >= text.vocab_size:
            raise ValueError(f"{key} is {getattr(config, key)}, expected less than vocab_size, {text.vocab_size}")
    heads = vision.num_attention_heads
    if vision.hidden_size % heads:
        raise ValueError(f"vision_config: hidden_size is {vision.hidden_size}, not a multiple of its {heads} heads")
    if config.model_type == "gemma3":
        side, patches = math.isqrt(config.mm_tokens_per_image), vision.image_size // vision.patch_size
        if side**2 != config.mm_tokens_per_image or patches % side or patches == 0:
            raise ValueError(
                f"mm_tokens_per_image is {config.mm_tokens_per_image}, expected a square whose side divides the "
                f"image's {patches} patches"
            )
        return
    if vision.hidden_size // heads % 4:
        raise ValueError(f"vision_config: heads of {vision.hidden_size // heads}, expected a multiple of 4")
    if math.isqrt(vision.num_position_embeddings) ** 2 != vision.num_position_embeddings:
        raise ValueError(f"vision_config: num_position_embeddings is {vision.num_position_embeddings}, not a square")
    if vision.out_hidden_size != text.hidden_size:
        raise ValueError(f"out_hidden_size is {vision.out_hidden_size}, expected hidden_size, {text.hidden_size}")
    rope = vision.rope_parameters
    if not isinstance(rope, dict) or rope.get("rope_type") != "axial":
        raise ValueError(f"vision_config: rope_parameters is {truncated_repr(rope)}, expected rope_type axial")
    check_number("vision_config: rope_theta", rope.get("rope_theta"), ROPE_NUMBERS["rope_theta"])
    indexes = vision.deepstack_visual_indexes
    if (
        not isinstance(indexes, list | tuple)
        or not all(type(index) is int and 0 <= index < vision.depth for index in indexes)
        or sorted(set(indexes)) != list(indexes)
        or len(indexes) >= text.num_hidden_layers
    ):
        raise ValueError(
            f"deepstack_visual_indexes is {truncated_repr(indexes)}, expected ascending layers of the vision tower, "
            f"fewer than the decoder's {text.num_hidden_layers} layers"
        )
