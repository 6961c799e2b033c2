"""Rotary position embeddings: each token's cos and sin, made once a forward pass for all layers."""

from __future__ import annotations

import torch

from ..checkpoints.rope_frequencies import rope_frequencies


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
        inv_freq, scaling, axes = rope_frequencies(config)
        self.inv_freq, self.scaling = inv_freq.to(device), scaling.to(device)[:, None, None]
        self.axes = None if axes is None else axes.to(device)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64, with multimodal RoPE also [3, T] -> cos, sin, each [ropes, T, E/2] float32."""
        positions = positions[:, None] if positions.ndim == 1 else positions[self.axes].T.contiguous()
        angles = positions.float() * self.inv_freq[:, None, :]
        return angles.cos() * self.scaling, angles.sin() * self.scaling
