"""What the metadata of a GGUF file says of a model, as the values of a config.json.

A key of the architecture is either read here, or known not to change what the model computes, or refused by its name.
The meaning of each is llama.cpp's, which defines the format.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .bounds import truncated_repr

# GGUF architecture -> model_type
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# Keys of the architecture that say how a file was made, or what the tensors say too.
HARMLESS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon"}
# Keys whose value says that the term is absent. Any other value is refused.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scale_linear": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "use_parallel_residual": False,
}
# Tokens that end an answer, as llama.cpp knows them by their text where no key names them.
END_TOKENS = {"<|eot_id|>", "<|im_end|>", "<end_of_turn>"}
CONTROL = 3  # token_type of a token that is no text
GEMMA_27B_LAYERS = 62


class Metadata:
    """The fields of a GGUF file, and which of the architecture's were read."""

    def __init__(self, fields: dict):
        self.fields = fields
        self.architecture = self.general("general.architecture")
        if self.general("general.type", "model") != "model":
            raise ValueError(f"general.type is {truncated_repr(self.general('general.type'))}, expected model")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"general.architecture is {truncated_repr(self.architecture)}; supported: {', '.join(ARCHITECTURES)}"
            )
        self.prefix = f"{self.architecture}."
        self.unread = {key.removeprefix(self.prefix) for key in fields if key.startswith(self.prefix)}

    def general(self, key: str, default=None) -> Any:
        return self.fields[key].contents() if key in self.fields else default

    def take(self, key: str, kinds: type | tuple, default=None) -> Any:
        """The value of one of the architecture's keys; one that holds the same for every layer is that."""
        self.unread.discard(key)
        value = self.general(self.prefix + key, default)
        if isinstance(value, list) and kinds is not list:
            if not value or any(item != value[0] for item in value):
                raise ValueError(f"{self.prefix}{key} is {truncated_repr(value)}: layers that differ are not supported")
            value = value[0]
        if value is None:
            raise ValueError(f"{self.prefix}{key} is missing")
        if isinstance(value, bool) != (kinds is bool) or not isinstance(value, kinds):
            raise ValueError(f"{self.prefix}{key} is {truncated_repr(value)}, of the wrong type")
        return value

    def has(self, key: str) -> bool:
        return self.prefix + key in self.fields

    def finish(self) -> None:
        """ValueError unless every key of the architecture was read or says nothing."""
        for key in sorted(self.unread - HARMLESS):
            value = self.general(self.prefix + key)
            if key not in NEUTRAL or value != NEUTRAL[key]:
                raise ValueError(f"{self.prefix}{key} is {truncated_repr(value)}; only models without it are supported")


def read_config(fields: dict, tensors: dict) -> dict:
    """The config.json of a GGUF file's fields and tensors; ValueError names the key that cannot be followed."""
    data = Metadata(fields)
    model_type = ARCHITECTURES[data.architecture]
    heads, hidden = data.take("attention.head_count", int), data.take("embedding_length", int)
    head_dim = data.take("attention.key_length", int, hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if data.take(key, int, head_dim) != head_dim:
            raise ValueError(f"{data.prefix}{key} is {data.take(key, int)}, expected the head size, {head_dim}")
    if "token_embd.weight" not in tensors:
        raise ValueError("has no tensor token_embd.weight")
    config = {
        "model_type": model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),  # GGUF lists sizes from the innermost
        "hidden_size": hidden,
        "intermediate_size": data.take("feed_forward_length", int),
        "num_hidden_layers": data.take("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": data.take("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": data.take("context_length", int),
        "rms_norm_eps": data.take("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    rope = _rope_parameters(data, head_dim, tensors)
    if model_type == "gemma3_text":
        config |= _gemma(data, config, rope)
    else:
        config |= {"hidden_act": "silu", "rope_parameters": rope}
        config |= _window(data)
        if data.has("attention.scale") and not math.isclose(
            scale := data.take("attention.scale", float), head_dim**-0.5, rel_tol=1e-5
        ):
            raise ValueError(f"{data.prefix}attention.scale is {scale}, expected {head_dim**-0.5}, of the head size")
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    data.finish()
    return config | special_tokens(data)


def special_tokens(data: Metadata) -> dict:
    """Token ids of beginning, padding and end; several ends where the file knows the end of a turn too."""
    found = {f"{ours}_token_id": data.general(f"tokenizer.ggml.{theirs}_token_id")
             for ours, theirs in (("bos", "bos"), ("pad", "padding"))}  # fmt: skip
    ends = [data.general(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    kinds = data.general("tokenizer.ggml.token_type", [])
    for index, text in enumerate(data.general("tokenizer.ggml.tokens", [])):
        if text in END_TOKENS and index < len(kinds) and kinds[index] == CONTROL:
            ends.append(index)
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return found | {"eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}


def _window(data: Metadata) -> dict:
    """A window on every layer makes a Llama file a Mistral; other architectures have none in GGUF."""
    window = data.take("attention.sliding_window", int, 0)
    if window and data.architecture != "llama":
        raise ValueError(f"{data.prefix}attention.sliding_window is {window}; only models without it are supported")
    return {"model_type": "mistral", "sliding_window": window} if window else {}


def _gemma(data: Metadata, config: dict, rope: dict) -> dict:
    """What Gemma-3 files leave to the reader: five windows to a full layer, and the 27B's attention scale."""
    layers = config["num_hidden_layers"]
    pattern = data.general(f"{data.prefix}attention.sliding_window_pattern", 6)
    data.unread.discard("attention.sliding_window_pattern")
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        pattern = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if not isinstance(pattern, list) or len(pattern) != layers:
        raise ValueError(f"{data.prefix}attention.sliding_window_pattern is {truncated_repr(pattern)}")
    scalar = config["head_dim"]
    if layers == GEMMA_27B_LAYERS:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    if data.has("attention.scale"):
        scalar = data.take("attention.scale", float) ** -2
        scalar = round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-5) else scalar
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": data.take("attention.sliding_window", int),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
        "query_pre_attn_scalar": scalar,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": data.take("rope.freq_base_swa", float, 10000.0),
            },
        },
    }


def _rope_parameters(data: Metadata, head_dim: int, tensors: dict) -> dict:
    kind = data.take("rope.scaling.type", str, "none")
    theta = data.take("rope.freq_base", float, 10000.0)
    factor = data.take("rope.scaling.factor", float, 0.0)
    original = data.take("rope.scaling.original_context_length", int, 0)
    if "rope_freqs.weight" in tensors:
        if kind != "none":
            raise ValueError(f"{data.prefix}rope.scaling.type is {kind}, beside a tensor rope_freqs.weight")
        factors = np.asarray(tensors["rope_freqs.weight"].data, dtype=np.float64).ravel()
        if len(factors) != head_dim // 2:
            raise ValueError(f"rope_freqs.weight has {len(factors)} values, expected {head_dim // 2}")
        if (factors != 1).any():
            return llama3_parameters(factors, theta)
    if kind == "none" and factor in (0.0, 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor or 1.0}
    if kind == "yarn":
        parameters = {"rope_type": "yarn", "rope_theta": theta, "factor": factor or 1.0}
        parameters["original_max_position_embeddings"] = original or data.take("context_length", int)
        for key in ("beta_fast", "beta_slow"):
            if data.has(f"rope.scaling.yarn_{key}"):
                parameters[key] = data.take(f"rope.scaling.yarn_{key}", float)
        return parameters
    raise ValueError(f"{data.prefix}rope.scaling.type is {truncated_repr(kind)} with the factor {factor}; "
                     "supported: none, linear, yarn")  # fmt: skip


def llama3_parameters(factors: np.ndarray, theta: float) -> dict:
    """The parameters of Llama-3.1's RoPE whose divisors of the frequencies, one each, are `factors`.

    With smoothing s, a divisor is 1 / ((1 - s) / factor + s), and s is linear in the frequency between the two bounds.
    Frequencies depend on the bounds' ratios to the original context only, so that the lower may be called 1. ValueError
    if no parameters give these divisors.
    """
    frequencies = theta ** -(np.arange(len(factors)) / len(factors)) / (2 * math.pi)  # turns a token
    factor = factors.max()
    candidates = [(8192, 4.0)]  # as published
    if factor > 1 and np.isfinite(factors).all() and (factors > 1 - 1e-5).all():
        smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
        between = (factors > 1 + 1e-5) & (factors < factor * (1 - 1e-5))
        if between.sum() > 1:
            slope, offset = np.polyfit(frequencies[between], smooth[between], 1)
            if slope > 0 > offset:
                candidates.append((round(slope / -offset), 1 + 1 / -offset))
        elif between.sum() == 1:
            candidates.append((round((1 + 3 * smooth[between][0]) / frequencies[between][0]), 4.0))
    for original, high in candidates:
        if not original > 0:
            continue
        smooth = ((original * frequencies - 1) / (high - 1)).clip(0, 1)
        if np.allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4, atol=0):
            high = round(high) if math.isclose(high, round(high), rel_tol=1e-3) else high
            return {"rope_type": "llama3", "rope_theta": theta, "factor": float(factor), "low_freq_factor": 1.0,
                    "high_freq_factor": float(high), "original_max_position_embeddings": original}  # fmt: skip
    raise ValueError(f"rope_freqs.weight is {truncated_repr(factors.tolist())}, not Llama-3.1's scaling")
