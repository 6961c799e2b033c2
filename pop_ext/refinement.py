"""Refinement of calibrated projections by gradient steps, from where the closed form ends.

What is minimised is what POP is judged by: the KL divergence of the next-token distribution after a truncated prompt
from the full model's. Only the projections move; the model stays as it is.

One window of T tokens is many prompts at once. It is cut into blocks; the tokens of a block are the boundary and the
continuation of the prompt that the earlier blocks are. So a token sees projected keys and values of the earlier blocks
(true ones of the anchors) and true ones within its own block, all in one pass of T tokens through the deep layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear


class DeepLayers:
    """The layers from `depth` up, differentiable: transformers' own modules with projected keys and values beside the
    true ones.

    They take a second copy of the model's weights, in the model's dtype.
    """

    def __init__(self, model, depth: int):
        from transformers import AutoModelForCausalLM

        self.model, self.depth = model, depth
        full = AutoModelForCausalLM.from_pretrained(model.folder, dtype=model.dtype, attn_implementation="sdpa")
        full.eval().requires_grad_(False)
        self.layers = full.model.layers[depth:]
        self.final_norm, self.lm_head = full.model.norm, full.lm_head

    def __call__(self, hidden: Tensor, projection: Tensor, starts: Tensor) -> Tensor:
        """hidden [B, T, D] before layer `depth`; projection [L - P, 2 Hkv E, D]; starts [T]: where the block of each
        token starts. Returns the hidden states [B, T, D] after the last layer.
        """
        model, spec = self.model, self.model.spec
        tokens = torch.arange(hidden.shape[1])
        x = hidden.float()
        x = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.rms_norm_eps)).to(hidden.dtype)
        cos, sin = model.rope(tokens)  # [ropes, T, E / 2]
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        shallow = (tokens < starts[:, None]) & (tokens >= model.anchor_tokens)  # [query, key]
        deep = (tokens <= tokens[:, None]) & ~shallow
        seen = torch.cat([shallow, deep], -1)
        distance = (tokens[:, None] - tokens).repeat(1, 2)
        for offset, layer in enumerate(self.layers):
            index = self.depth + offset
            rope = spec.rope_index[index]
            kv = linear(x, projection[offset].to(x.dtype))
            if model.weights.projection_bias is not None:
                kv = kv + model.weights.projection_bias[index]
            keys, values = kv.unflatten(-1, (2, spec.num_kv_heads, spec.head_dim)).transpose(1, 3).unbind(2)
            keys = keys.float()  # [B, Hkv, T, E]
            if model.k_norms is not None:
                keys = keys * torch.rsqrt(keys.square().mean(-1, keepdim=True) + spec.rms_norm_eps)
                keys = keys * model.k_norms[index]
            first, second = keys.chunk(2, -1)
            keys = (keys * cos[rope] + torch.cat([-second, first], -1) * sin[rope]).to(x.dtype)
            window = spec.windows[index]
            hidden = layer(
                hidden,
                attention_mask=(seen & (distance < window) if window else seen)[None, None],
                position_embeddings=(cos[rope][None].to(x.dtype), sin[rope][None].to(x.dtype)),
                past_key_values=_Projected(keys, values),
            )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] after the last layer -> [..., V] float32."""
        return self.lm_head(self.final_norm(hidden)).float()


class _Projected:
    """What a layer of transformers takes for its cache: puts the projected keys and values before its own."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


def divergence(deep: DeepLayers, hidden: Tensor, full: Tensor, rows: int = 128) -> tuple[float, Tensor]:
    """The sum over tokens of KL(full || truncated) in nats, and its gradient by `hidden`; `rows` tokens at a time, as
    a vocabulary's worth of numbers for each token is large. hidden, full [N, D] after the last layer.
    """
    total, gradient = 0.0, torch.empty_like(hidden)
    for part, target, out in zip(hidden.split(rows), full.split(rows), gradient.split(rows), strict=True):
        part = part.detach().requires_grad_()
        with torch.no_grad():
            target = deep.logits(target).log_softmax(-1)
        with torch.enable_grad():
            loss = kl_div(deep.logits(part).log_softmax(-1), target, log_target=True, reduction="sum")
        out.copy_(torch.autograd.grad(loss, part)[0])
        total += loss.item()
    return total, gradient
