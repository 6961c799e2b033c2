"""The paged key/value cache: one pool of blocks for all layers, and the sequences that own them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

BLOCK_SIZE = 64  # tokens


class CacheFullError(RuntimeError):
    """The cache has no room for the tokens asked for; the message says how much is needed."""


@dataclass(eq=False)
class Sequence:
    """One conversation: all its tokens, and the blocks with keys and values of the first `num_cached` of them."""

    cache: KVCache | None  # None once it is freed
    token_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)


class KVCache:
    """Keys and values of up to `max_tokens` tokens, rounded up to blocks of `BLOCK_SIZE`, shared by all sequences.

    data: [layers, 2, blocks, BLOCK_SIZE, kv_heads, head_dim]. A sequence takes blocks as it grows and gives them back
    when it is freed. On the CPU the operating system backs the pool with memory only where it is written.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, max_tokens: int, dtype: torch.dtype):
        num_blocks = -(-max_tokens // BLOCK_SIZE)
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
                f"max_tokens of at least {(self.num_blocks - len(self.free_blocks) + sum(counts)) * BLOCK_SIZE}"
            )
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.blocks += [self.free_blocks.pop() for _ in range(count)]

    def free(self, sequence: Sequence) -> None:
        self.free_blocks += reversed(sequence.blocks)
        sequence.blocks, sequence.num_cached, sequence.cache = [], 0, None
