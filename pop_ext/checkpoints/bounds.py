"""Bounds of what a config may say: the type and range of every number that is read, and what is not supported."""

from __future__ import annotations

import math

# Smallest and largest value of every number that is read; far beyond any model, well before anything overflows.
INTEGERS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**18),
    "intermediate_size": (1, 2**20),
    "num_hidden_layers": (1, 2**12),
    "num_attention_heads": (1, 2**12),
    "num_key_value_heads": (1, 2**12),
    "head_dim": (2, 2**12),
    "max_position_embeddings": (1, 2**31),
    "original_max_position_embeddings": (1, 2**31),
    "sliding_window": (1, 2**31),
    "max_window_layers": (0, 2**31),
    "sliding_window_pattern": (1, 2**12),
}
NUMBERS = {
    "rms_norm_eps": (1e-30, 1.0),
    "query_pre_attn_scalar": (1e-6, 1e12),
}
ROPE_NUMBERS = {
    "rope_theta": (1.0, 1e15),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, 2**31),
    "attention_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (1e-6, 1e6),
    "mscale_all_dim": (0, 1e6),
}
# Of a vision-language config: what stands beside text_config and vision_config, and what stands in vision_config.
PLACEHOLDERS = {
    "gemma3": ("image_token_index", "boi_token_index", "eoi_token_index"),
    "qwen3_vl": ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
}
VISION_INTEGERS = {
    "gemma3": {
        "hidden_size": (1, 2**16),
        "intermediate_size": (1, 2**18),
        "num_hidden_layers": (1, 2**10),
        "num_attention_heads": (1, 2**10),
        "num_channels": (3, 3),
        "image_size": (1, 2**13),
        "patch_size": (1, 2**10),
    },
    "qwen3_vl": {
        "hidden_size": (1, 2**16),
        "intermediate_size": (1, 2**18),
        "depth": (1, 2**10),
        "num_heads": (1, 2**10),
        "in_channels": (3, 3),
        "patch_size": (1, 2**10),
        "spatial_merge_size": (1, 2**4),
        "temporal_patch_size": (1, 2**4),
        "out_hidden_size": (1, 2**18),
        "num_position_embeddings": (1, 2**20),
    },
}
BOOLEANS = ("tie_word_embeddings", "attention_bias", "use_sliding_window")
# Terms of other architectures. Set to anything but null, false or 0, they change what the model computes.
UNSUPPORTED = (
    "mlp_bias",
    "quantization_config",
    "compression_config",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "use_mrope",
    "is_encoder_decoder",
    "per_layer_config",
    "_heterogeneity_spec",  # what per_layer_config becomes in a transformers config
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)


def check_vision_numbers(model_type: str, config: dict, vision: dict) -> None:
    """Type and bounds of the numbers that a vision-language config has beside text_config, and in vision_config."""
    integers = dict.fromkeys(PLACEHOLDERS[model_type], INTEGERS["vocab_size"]) | {"mm_tokens_per_image": (1, 2**14)}
    for key, bounds in integers.items():
        if config.get(key) is not None:
            check_number(key, config[key], bounds, integer=True)
    for key, bounds in VISION_INTEGERS[model_type].items():
        if vision.get(key) is not None:
            check_number(f"vision_config: {key}", vision[key], bounds, integer=True)
    if vision.get("layer_norm_eps") is not None:
        check_number("vision_config: layer_norm_eps", vision["layer_norm_eps"], NUMBERS["rms_norm_eps"])


def check_numbers(config: dict) -> None:
    """Type and bounds of every number of a config that is read. What is absent or None is left to others."""
    for key, bounds in (INTEGERS | NUMBERS).items():
        if config.get(key) is not None:
            check_number(key, config[key], bounds, integer=key in INTEGERS)
    for key in BOOLEANS:
        if config.get(key) is not None and not isinstance(config[key], bool):
            raise ValueError(f"{key} is {truncated_repr(config[key])}, expected true or false")


def check_supported(config: dict) -> None:
    for key in UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{key} is {truncated_repr(config[key])}; only models without it are supported")


def check_number(name: str, value, bounds: tuple[float, float], integer: bool = False) -> None:
    low, high = bounds
    kinds = (int,) if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} is {truncated_repr(value)}, expected {'an integer' if integer else 'a number'}")
    if (isinstance(value, float) and not math.isfinite(value)) or not low <= value <= high:
        raise ValueError(f"{name} is {truncated_repr(value)}, expected {low} to {high}")


def truncated_repr(value) -> str:
    """A value for an error message, cut where a hostile file would fill the screen."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list nested as deep
        text = type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
