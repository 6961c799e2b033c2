"""The paged key/value cache: one pool of blocks for all layers, and the sequences that own them."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from itertools import takewhile

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
    num_reused: int = 0  # of its first tokens, whose keys and values another conversation left in the cache

    def close(self) -> None:
        """Gives the blocks back; the conversation cannot be continued. Closing it again does nothing.

        Waits for a call of the model that runs in another thread. `with` a conversation closes it at the end.
        """
        if self.cache is not None:
            with self.cache.lock:
                if self.cache is not None:
                    self.cache.free(self)

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def fork(self) -> Sequence:
        """A second conversation that goes on from here. It costs no computing and, but for a block at most, no memory:
        what both have in common stays shared. Each is closed on its own. ValueError if this one is closed.

        Its results are those of a new conversation that was prefilled in the same turns.
        """
        cache = self.cache
        if cache is None:
            raise ValueError("the sequence was freed, expected a conversation that is open")
        with cache.lock:
            return cache.fork(self)

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
            if low < high and visual.grid is not None:
                token = torch.arange(low, high) - visual.start
                grid = torch.stack([0 * token, token // visual.grid[1], token % visual.grid[1]])
                positions[:, low - start : high - start] = visual.position + grid
        return positions


def block_count(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def prefix_keys(token_ids: list[int], visuals: list[ImageSpan], length: int, settings: tuple) -> list[Hashable]:
    """For each whole block of the first `length` tokens of a conversation, all that its keys and values depend on: the
    tokens and images from the start of the conversation to its end, and `settings`.
    """
    keys, digest = [], b""
    for end in range(BLOCK_SIZE, length + 1, BLOCK_SIZE):
        start = end - BLOCK_SIZE
        content = hashlib.sha256(digest + array("q", token_ids[start:end]).tobytes())
        for visual in visuals:
            if visual.start < end and visual.end > start:  # as a whole: its tokens may see one another
                content.update(f"{visual.start} {visual.end} {visual.grid} ".encode() + visual.digest())
        digest = content.digest()
        keys.append((digest, *settings))
    return keys


class KVCache:
    """Keys and values of up to `max_cache_tokens` tokens, rounded up to whole blocks, shared by all sequences.

    data: [layers, 2, blocks, BLOCK_SIZE, kv_heads, head_dim]. A sequence takes blocks as it grows and gives them back
    when it is freed. Forks, and sequences that begin alike, hold the same blocks; `references` counts who holds each.
    `prefixes` holds full blocks by `prefix_keys`, least recently used first, until they are needed for something else.
    `lock` is held by whoever calls the model or changes what sequences hold. On the CPU the operating system backs the
    pool with memory only where it is written.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_cache_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        num_blocks = -(-max_cache_tokens // BLOCK_SIZE)
        shape = (num_layers, 2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        self.data = torch.empty(shape, dtype=dtype, device=device)
        self.keys, self.values = self.data.unbind(1)  # [layers, blocks, BLOCK_SIZE, kv_heads, head_dim]
        self.layers = list(zip(self.keys, self.values, strict=True))
        self.free_blocks = list(range(num_blocks - 1, -1, -1))
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self.prefixes: dict[Hashable, int] = {}
        self.lock = threading.RLock()

    def grow(self, sequences: list[Sequence], lengths: list[int]) -> None:
        """Gives every sequence blocks of its own for tokens `num_cached` to `lengths[i]`, or, if they are too many,
        raises and changes nothing. A block there that others hold too is copied.
        """
        counts = [max(0, block_count(n) - len(s.blocks)) for s, n in zip(sequences, lengths, strict=True)]
        copies, left = [], Counter()
        for sequence, length in zip(sequences, lengths, strict=True):
            for index in range(sequence.num_cached // BLOCK_SIZE, min(len(sequence.blocks), block_count(length))):
                block = sequence.blocks[index]
                if self.references[block] - left[block] > 1:
                    left[block] += 1
                    copies.append((sequence, index))
        self._make_room(sum(counts) + len(copies))
        for sequence, index in copies:
            block, (copy,) = sequence.blocks[index], self._take(1)
            self.data[:, :, copy] = self.data[:, :, block]
            self.references[block] -= 1
            sequence.blocks[index] = copy
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.blocks += self._take(count)

    def shrink(self, sequence: Sequence, length: int) -> None:
        """Takes back the blocks that a sequence of `length` tokens has no use for."""
        count = block_count(length)
        self._release(sequence.blocks[count:])
        del sequence.blocks[count:]

    def fork(self, sequence: Sequence) -> Sequence:
        """Another sequence with the same tokens, which holds the same blocks."""
        blocks = sequence.blocks[: block_count(sequence.num_cached)]
        for block in blocks:
            self.references[block] += 1
        visuals = [replace(visual) for visual in sequence.visuals]
        return Sequence(self, list(sequence.token_ids), sequence.num_cached, blocks, visuals)

    def free(self, sequence: Sequence) -> None:
        self._release(sequence.blocks)
        sequence.blocks, sequence.num_cached, sequence.cache = [], 0, None

    # Prefixes

    def adopt(self, sequence: Sequence, keys: list[Hashable]) -> None:
        """Gives a new sequence the blocks of as many of its first `keys` as there are."""
        blocks = [self.prefixes[key] for key in takewhile(self.prefixes.__contains__, keys)]
        for block in blocks:
            self.references[block] += 1
        sequence.blocks, sequence.num_cached = blocks, len(blocks) * BLOCK_SIZE

    def keep(self, sequence: Sequence, keys: list[Hashable]) -> list[Hashable]:
        """Makes the first blocks of a sequence those of `keys`, the most recently used; returns the keys that are new.

        A new key's block must be full before anything but the forward pass that fills it sees it, and not change again.
        """
        new = [key for key in keys if key not in self.prefixes]
        for key, block in zip(reversed(keys), reversed(sequence.blocks[: len(keys)]), strict=True):
            if key in self.prefixes:
                block = self.prefixes.pop(key)
            else:
                self.references[block] += 1
            self.prefixes[key] = block  # a chain's end before its beginning, as it is of no use without
        return new

    def forget(self, keys: list[Hashable]) -> None:
        for key in keys:
            if key in self.prefixes:
                self._release([self.prefixes.pop(key)])

    # Blocks

    def _make_room(self, count: int) -> None:
        """Has `count` blocks free: forgets as many prefixes as that takes, or raises and changes nothing."""
        free = len(self.free_blocks)
        if count > free:
            unused = [key for key, block in self.prefixes.items() if self.references[block] == 1]
            if count > free + len(unused):
                free += len(unused)
                raise CacheFullError(
                    f"the key/value cache is full: {count} more blocks of {BLOCK_SIZE} tokens are needed, {free} of "
                    f"{self.num_blocks} are free; close a conversation that is kept (sequence.close()), or load the "
                    f"model with max_cache_tokens of at least {(self.num_blocks - free + count) * BLOCK_SIZE}"
                )
            self.forget(unused[: count - free])

    def _take(self, count: int) -> list[int]:
        blocks = [self.free_blocks.pop() for _ in range(count)]
        for block in blocks:
            self.references[block] = 1
        return blocks

    def _release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            if not self.references[block]:
                self.free_blocks.append(block)
