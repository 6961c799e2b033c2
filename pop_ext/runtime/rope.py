"""Rotary position embeddings: each token's cos and sin, made once a forward pass for all layers."""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..checkpoints.families import MODEL_FAMILIES, head_size, rope_parameters, text_config


class RotaryEmbedding:
    """cos and sin of every rotary embedding that a model has; ModelSpec.rope_index says which one a layer uses.

    Frequencies come from transformers' own functions, so every fixed kind of RoPE (linear, Llama-3.1, YaRN) is here.
    Multimodal RoPE gives each frequency one of a token's three positions (time, height, width), interleaved as in
    Qwen3-VL (arXiv 2511.21631): t h w t h w ..., and time where the shorter axes' share ends. ValueError where the
    config's parameters give no finite frequencies.
    """

    inv_freq: torch.Tensor  # [ropes, E/2] float32
    scaling: torch.Tensor  # [ropes, 1, 1] float32: YaRN multiplies cos and sin
    axes: torch.Tensor | None  # [E/2] int64, multimodal RoPE: the axis that each frequency turns with

    def __init__(self, config, device: torch.device | str = "cpu"):
        config = text_config(config)
        inv_freq, scaling, self.axes = [], [], None
        for layer_type, parameters in rope_parameters(config).items():
            name = f"rope_parameters[{layer_type!r}]" if layer_type else "rope_parameters"
            try:
                if parameters["rope_type"] == "default":
                    exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
                    frequencies, scale = 1.0 / parameters["rope_theta"] ** exponents, 1.0
                else:
                    init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
                    frequencies, scale = init(config, torch.device("cpu"), layer_type=layer_type)
            except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
            if not (frequencies.isfinite().all() and 0 < scale < float("inf")):
                raise ValueError(f"{name}: frequencies are not finite")
            inv_freq.append(frequencies)
            scaling.append(scale)
            if MODEL_FAMILIES[config.model_type].mrope:
                _, *shares = parameters.get("mrope_section") or (24, 20, 20)  # transformers' default
                self.axes = torch.zeros(len(frequencies), dtype=torch.int64, device=device)
                for axis, share in enumerate(shares, start=1):
                    self.axes[axis : 3 * share : 3] = axis
        self.inv_freq = torch.stack(inv_freq).to(device, torch.float32)
        self.scaling = torch.tensor(scaling, dtype=torch.float32, device=device)[:, None, None]

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64, with multimodal RoPE also [3, T] -> cos, sin, each [ropes, T, E/2] float32."""
        positions = positions[:, None] if positions.ndim == 1 else positions[self.axes].T.contiguous()
        angles = positions.float() * self.inv_freq[:, None, :]
        return angles.cos() * self.scaling, angles.sin() * self.scaling
