"""Windows of random tokens, and how far truncated prompts are from the full model on them."""

from __future__ import annotations

import torch


def random_windows(count: int, length: int, seed: int = 0, vocabulary: int = 293) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()


def mean_kl(model, windows, prompt: int, depth: int) -> float:
    total = 0.0
    for window in windows:
        full, cut = (
            model.logits([window[:prompt]], [window[prompt:]], prefill_depth=p)[0].log_softmax(-1) for p in (1.0, depth)
        )
        total += float((full.exp() * (full - cut)).sum(-1).mean())
    return total / len(windows)
