"""Rotary position embeddings: each token's cos and sin, made once a forward pass for all layers."""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .families import head_size, rope_parameters


class RotaryEmbedding:
    """cos and sin of every rotary embedding that a model has; ModelSpec.rope_index says which one a layer uses.

    Frequencies come from transformers' own functions, so every fixed kind of RoPE (linear, Llama-3.1, YaRN) is here.
    ValueError where the config's parameters give no finite frequencies.
    """

    inv_freq: torch.Tensor  # [ropes, E/2] float32
    scaling: torch.Tensor  # [ropes, 1, 1] float32: YaRN multiplies cos and sin

    def __init__(self, config, device: torch.device | str = "cpu"):
        inv_freq, scaling = [], []
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
        self.inv_freq = torch.stack(inv_freq).to(device, torch.float32)
        self.scaling = torch.tensor(scaling, dtype=torch.float32, device=device)[:, None, None]

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64 -> cos, sin, each [ropes, T, E/2] float32."""
        angles = positions.float()[:, None] * self.inv_freq[:, None, :]
        return angles.cos() * self.scaling, angles.sin() * self.scaling
