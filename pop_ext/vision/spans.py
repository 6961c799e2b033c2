"""Where the tokens of an image stand in a prompt, and their features."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class ImageSpan:
    """The tokens [start, end) of an image, of one of its crops, or of one temporal patch of a video.

    grid: rows and columns of the tokens, where positions have three axes (multimodal RoPE); else None.
    features: [1 + d, tokens, D], what stands for the tokens' embeddings, then what DeepStack adds to the hidden state
        after each of the first d layers; None once the tokens are in the cache.
    position: of the first token, which `Sequence.add` sets.
    """

    start: int
    end: int
    grid: tuple[int, int] | None
    features: torch.Tensor | None
    position: int = 0

    @property
    def shift(self) -> int:
        """The position of every later token less its index: an image takes as many positions as its longer side."""
        return self.position - self.start if self.grid is None else self.position + max(self.grid) - self.end

    def digest(self) -> bytes:
        """SHA-256 of the features. Waits for the device."""
        if self.features is None:
            raise ValueError("the image's tokens are in the cache, expected its features")
        return hashlib.sha256(self.features.contiguous().view(torch.uint8).cpu().numpy().tobytes()).digest()
