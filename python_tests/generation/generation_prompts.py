"""Prompts, and what transformers makes of them."""

from __future__ import annotations

import torch


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = make_prompts(7, 1, 33)


def expected(peer, prompt: list[int], **settings) -> list[int]:
    """The new tokens of transformers' generate for one prompt."""
    ids = torch.tensor([prompt])
    return peer.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
