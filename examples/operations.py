"""Stage 2 by hand: one multiplication writes the keys and values of three skipped layers into a paged cache."""

import torch

import pop_ext  # noqa: F401, registers torch.ops.pop

tokens, hidden_size, layers, kv_heads, head_size, block_size = 100, 256, 3, 2, 64, 16
hidden = torch.randn(tokens, hidden_size)
weight = torch.randn(layers, 2 * kv_heads * head_size, hidden_size) / hidden_size**0.5
angles = torch.arange(tokens)[:, None] * 10000.0 ** -torch.linspace(0, 1, head_size // 2)
cos, sin = angles.cos()[None], angles.sin()[None]  # one RoPE, shared by all layers
rope_index = torch.zeros(layers, dtype=torch.int32)
slot_mapping = torch.arange(tokens)
cache = torch.zeros(layers, 2, 7, block_size, kv_heads, head_size)  # 7 blocks of 16 tokens

torch.ops.pop.project_kv(hidden, weight, None, None, 1e-6, cos, sin, rope_index, slot_mapping, cache[:, 0], cache[:, 1])
values = cache[:, 1].flatten(1, 2)[:, :tokens]
x = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
expected = torch.einsum("ti,loi->lto", x, weight[:, kv_heads * head_size :]).unflatten(-1, (kv_heads, head_size))
print(f"largest difference of the values: {(values - expected).abs().max():.1e}")
