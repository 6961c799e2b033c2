"""What the layers need to know of the tokens of one forward pass, and how prompts are cut into passes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from .kv_cache import BLOCK_SIZE, Sequence
from .rope import RotaryEmbedding
from .selection import Selection


@dataclass
class SequenceChunk:
    """Tokens [start, end) of one sequence in a forward pass; those in [shallow_start, shallow_end) are not deep."""

    sequence: Sequence
    start: int
    end: int
    shallow_start: int
    shallow_end: int
    logits_start: int  # logits are wanted from this position on
    selection: Selection | None = None  # of a turn that chooses deep tokens at its end, its boundary among them

    def deep_runs(self) -> list[tuple[int, int]]:
        last = self.shallow_end if self.selection is None else self.end
        low, high = (min(max(p, self.start), self.end) for p in (self.shallow_start, last))
        runs = [(self.start, low), (high, self.end)] if low < high else [(self.start, self.end)]
        return [(start, end) for start, end in runs if start < end]

    def early_logits(self) -> range:
        """The tokens that logits are wanted of though they end at the prefill depth: the last of a prompt without a
        boundary.
        """
        return range(max(self.start, self.shallow_start, self.logits_start), min(self.end, self.shallow_end))


class ForwardBatch:
    """What the layers need to know of the tokens in a forward pass: how they turn (RoPE), where they are written, what
    they may see. Made on the host; `ready` takes what was copied to the device.
    """

    INTEGERS = ("block_tables", "cu_seqlens_q", "seqlens_k", "slot_mapping", "positions", "spans", "visual_rows")

    cos: Tensor  # [ropes, T, E / 2]
    sin: Tensor
    angles: list[tuple[Tensor, Tensor]]  # of each rope

    def __init__(self, runs: list[tuple[Sequence, int, int]], multimodal_rope: bool, bidirectional_images: bool):
        """runs: sequence, first and last + 1 index of tokens that follow one another."""
        self.max_seqlen_q = max(end - start for _, start, end in runs)
        self.max_seqlen_k = max(end for _, _, end in runs)
        sequences = {sequence: index for index, sequence in enumerate(dict.fromkeys(s for s, _, _ in runs))}
        tables = [sequence.blocks[: -(-self.max_seqlen_k // BLOCK_SIZE)] for sequence in sequences]
        width = max(map(len, tables))
        table = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
        self.block_tables = table[[sequences[sequence] for sequence, _, _ in runs]]
        starts, ends = torch.tensor([run[1:] for run in runs]).T
        self.cu_seqlens_q = torch.tensor([0, *accumulate(end - start for _, start, end in runs)], dtype=torch.int32)
        self.seqlens_k = ends.int()
        run = torch.repeat_interleave(self.cu_seqlens_q.diff())
        positions = torch.arange(len(run)) + (starts - self.cu_seqlens_q[:-1])[run]
        slots = self.block_tables[run, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        cached = torch.tensor([sequence.num_cached for sequence, _, _ in runs])
        self.slot_mapping = torch.where(positions < cached[run], -1, slots)  # what is in the cache is not written again
        if multimodal_rope and any(sequence.visuals for sequence, _, _ in runs):
            positions = torch.cat([sequence.positions(start, end) for sequence, start, end in runs], dim=1)
        self.positions = positions  # [T], or [3, T]
        self.spans = _spans(runs, self.max_seqlen_k) if bidirectional_images else None
        self.visual_rows, self.visual_features = _visual_rows(runs)

    def integers(self, prefix: str = "") -> dict[str, Tensor]:
        """What there is to upload, by its name."""
        values = {prefix + name: getattr(self, name) for name in self.INTEGERS}
        return {name: value for name, value in values.items() if value is not None}

    def ready(self, values: dict[str, Tensor], rope: RotaryEmbedding, prefix: str = "") -> None:
        """Takes `integers` as they are on the device, and turns the positions."""
        for name in self.INTEGERS:
            if prefix + name in values:
                setattr(self, name, values[prefix + name])
        self.turn(rope(self.positions))

    def turn(self, angles: tuple[Tensor, Tensor] | Tensor) -> None:
        """Takes cos and sin, each [ropes, T, E / 2]."""
        self.cos, self.sin = angles[0], angles[1]
        self.angles = [(self.cos[rope], self.sin[rope]) for rope in range(len(self.cos))]

    @classmethod
    def of_step(
        cls, block_tables: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, slot_mapping: Tensor, context: int
    ) -> ForwardBatch:
        """A decode step's, of one token a sequence and at most `context` of each; all of it is on the device."""
        batch = cls.__new__(cls)
        batch.block_tables, batch.cu_seqlens_q, batch.seqlens_k = block_tables, cu_seqlens_q, seqlens_k
        batch.slot_mapping, batch.max_seqlen_q, batch.max_seqlen_k, batch.spans = slot_mapping, 1, context, None
        return batch


def _spans(runs: list[tuple[Sequence, int, int]], width: int) -> Tensor | None:
    """The image that each token of each run's context is part of, [runs, width] int32, -1 for text; None where no run
    has tokens of an image.
    """
    if not any(visual.end > start and visual.start < end for s, start, end in runs for visual in s.visuals):
        return None
    spans = torch.full((len(runs), width), -1, dtype=torch.int32)
    for row, (sequence, _, end) in zip(spans, runs, strict=True):
        for index, visual in enumerate(sequence.visuals):
            row[visual.start : min(visual.end, end)] = index
    return spans


def forward_passes(pieces: list[SequenceChunk], size: int, whole_images: bool) -> Iterator[list[SequenceChunk]]:
    """Cuts pieces into forward passes of at most `size` tokens, or with `whole_images` of one larger image."""
    chunk, room = [], size
    for piece in pieces:
        start = piece.start
        while start < piece.end:
            end = min(piece.end, start + room)
            for visual in piece.sequence.visuals if whole_images else ():
                if visual.start < end < visual.end:
                    end = max(start, visual.start)
                    if end == start and not chunk:
                        end = visual.end
                    room = end - start  # nothing more
                    break
            if start < end:
                chunk.append(replace(piece, start=start, end=end))
            room -= end - start
            start = end
            if room == 0:
                yield chunk
                chunk, room = [], size
    if chunk:
        yield chunk


def runs_of(positions: Tensor) -> list[tuple[int, int]]:
    """First and last + 1 of the runs of positions that follow one another; positions [n] are in order."""
    edges = (positions.diff() != 1).nonzero()[:, 0] + 1
    starts = positions[torch.cat([edges.new_zeros(1), edges])]
    ends = positions[torch.cat([edges - 1, edges.new_tensor([len(positions) - 1])])] + 1
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def selections(pieces: list[SequenceChunk]) -> Iterator[tuple[Selection, int, slice]]:
    """Of each piece of a pass whose turn chooses tokens at its end: its selection, its first position and its rows."""
    offset = 0
    for piece in pieces:
        rows = slice(offset, offset + piece.end - piece.start)
        offset = rows.stop
        if piece.selection is not None:
            yield piece.selection, piece.start, rows


def deep_rows(
    pieces: list[SequenceChunk],
) -> tuple[list[int], list[tuple[Sequence, int, int]], list[int], list[int]]:
    """Which rows of a forward pass are deep, the runs that they make, which rows have `early_logits`, and where what
    logits are wanted of is among the deep rows followed by those.
    """
    deep, runs, early, wanted, offset = [], [], [], [], 0
    for piece in pieces:
        for start, end in piece.deep_runs():
            wanted += range(len(deep) + max(piece.logits_start - start, 0), len(deep) + end - start)
            deep += range(offset + start - piece.start, offset + end - piece.start)
            runs.append((piece.sequence, start, end))
        for position in piece.early_logits():
            wanted.append(-1 - len(early))  # until it is known how many deep rows are before it
            early.append(offset + position - piece.start)
        offset += piece.end - piece.start
    return deep, runs, early, [row if row >= 0 else len(deep) - 1 - row for row in wanted]


def previous_rows(cu_seqlens_q: Tensor) -> Tensor:
    """For each token of a pass, where the token before it is among the tokens before the runs and then those of the
    pass: [T] int64.
    """
    runs, tokens = len(cu_seqlens_q) - 1, int(cu_seqlens_q[-1])
    previous = torch.arange(runs - 1, runs + tokens - 1)
    previous[cu_seqlens_q[:-1].long()] = torch.arange(runs)
    return previous


def _visual_rows(runs: list[tuple[Sequence, int, int]]) -> tuple[Tensor | None, Tensor | None]:
    """The rows of a forward pass that are tokens of images, and their features [1 + d, rows, D]; None without any."""
    rows, features, offset = [], [], 0
    for sequence, start, end in runs:
        for visual in sequence.visuals:
            low, high = max(visual.start, start), min(visual.end, end)
            if low < high:
                rows.append(torch.arange(low, high) + (offset - start))
                assert visual.features is not None  # it is in no cache yet
                features.append(visual.features[:, low - visual.start : high - visual.start])
        offset += end - start
    return (torch.cat(rows), torch.cat(features, dim=1)) if rows else (None, None)
