"""The paged key/value cache: one pool of blocks for all layers, and the sequences that own them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..vision.spans import ImageSpan

BLOCK_SIZE = 64  # tokens


class CacheFullError(RuntimeError):
    """The cache has no room for the tokens asked for; the message says how much is needed."""


@dataclass(eq=False)
class Sequence:
    """One conversation: all its tokens, the blocks with keys and values of the first `num_cached` of them, and which of
    them are images.
    """

    cache: KVCache | None  # None once it is freed
    token_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)
    visuals: list[ImageSpan] = field(default_factory=list)  # in order
    last_hidden: torch.Tensor | None = None  # h[P] of the last token, while a turn takes several forward passes

    def add(self, visual: ImageSpan) -> None:
        visual.position = visual.start + (self.visuals[-1].shift if self.visuals else 0)
        self.visuals.append(visual)

    def positions(self, start: int, end: int) -> torch.Tensor:
        """Positions [3, end - start] int64 of tokens [start, end): time, height, width (Qwen3-VL, arXiv 2511.21631).

        Text counts on in all three; an image stands at one time, its rows and columns count from there.
        """
        positions = torch.arange(start, end).repeat(3, 1)
        for index, visual in enumerate(self.visuals):
            following = self.visuals[index + 1].start if index + 1 < len(self.visuals) else end
            low, high = max(visual.end, start), min(following, end)
            if low < high:
                positions[:, low - start : high - start] += visual.shift
            low, high = max(visual.start, start), min(visual.end, end)
            if low < high:
                token = torch.arange(low, high) - visual.start
                grid = torch.stack([0 * token, token // visual.grid[1], token % visual.grid[1]])
                positions[:, low - start : high - start] = visual.position + grid
        return positions


class KVCache:
    """Keys and values of up to `max_cache_tokens` tokens, rounded up to whole blocks, shared by all sequences.

    data: [layers, 2, blocks, BLOCK_SIZE, kv_heads, head_dim]. A sequence takes blocks as it grows and gives them back
    when it is freed. On the CPU the operating system backs the pool with memory only where it is written.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, max_cache_tokens: int, dtype: torch.dtype):
        num_blocks = -(-max_cache_tokens // BLOCK_SIZE)
        self.data = torch.empty(num_layers, 2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, dtype=dtype)
        self.keys, self.values = self.data.unbind(1)  # [layers, blocks, BLOCK_SIZE, kv_heads, head_dim]
        self.layers = list(zip(self.keys, self.values, strict=True))
        self.free_blocks = list(range(num_blocks - 1, -1, -1))
        self.num_blocks = num_blocks

    def grow(self, sequences: list[Sequence], lengths: list[int]) -> None:
        """Gives every sequence the blocks for `lengths[i]` tokens, or, if they are too many, raises and changes
        nothing.
        """
        counts = [max(0, -(-n // BLOCK_SIZE) - len(s.blocks)) for s, n in zip(sequences, lengths, strict=True)]
        if sum(counts) > len(self.free_blocks):
            raise CacheFullError(
                f"the key/value cache is full: {sum(counts)} more blocks of {BLOCK_SIZE} tokens are needed, "
                f"{len(self.free_blocks)} of {self.num_blocks} are free; free a conversation, or load the model with "
                f"max_cache_tokens of at least {(self.num_blocks - len(self.free_blocks) + sum(counts)) * BLOCK_SIZE}"
            )
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.blocks += [self.free_blocks.pop() for _ in range(count)]

    def free(self, sequence: Sequence) -> None:
        self.free_blocks += reversed(sequence.blocks)
        sequence.blocks, sequence.num_cached, sequence.cache = [], 0, None
