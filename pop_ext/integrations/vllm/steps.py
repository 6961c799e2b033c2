"""Which tokens of a step are deep. A step's tokens lie one after the other, request by request; a request's are those
at positions [start, end) of its sequence.

A token is deep, and runs through all layers, if it is one of the sequence's first `anchors`, of the prompt's last
`boundary`, or generated. Only its position decides, and not where a step happens to cut the prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Runs(NamedTuple):
    """The deep tokens of a step as runs of positions, at most two a request, and the rows of the step's tokens."""

    request: np.ndarray  # [runs] int64
    start: np.ndarray  # [runs] int64, positions
    end: np.ndarray  # [runs] int64
    deep: np.ndarray  # rows, int64, in the order of the runs
    shallow: np.ndarray  # the other rows, int64

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.start

    @property
    def query_starts(self) -> np.ndarray:
        """[runs + 1] int32"""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)


def split(query_starts: np.ndarray, ends: np.ndarray, prompts: np.ndarray, anchors: int, boundary: int) -> Runs | None:
    """The deep runs of a step; None where every token is deep, as in decoding.

    query_starts [requests + 1]: rows of each request; ends [requests]: one more than the position of its last token in
    this step; prompts [requests]: tokens of its prompt.
    """
    query_starts, ends, prompts = (np.asarray(array).astype(np.int64) for array in (query_starts, ends, prompts))
    lengths = np.diff(query_starts)
    starts = ends - lengths
    low = np.clip(anchors, starts, ends)  # shallow are the positions [low, high)
    high = np.clip(prompts - boundary, low, ends)
    if (low == high).all():
        return None
    whole = low == high
    first, second = np.stack([starts, np.where(whole, ends, low)], 1), np.stack([np.where(whole, ends, high), ends], 1)
    runs = np.stack([first, second], 1).reshape(-1, 2)
    request = np.repeat(np.arange(len(ends)), 2)
    kept = runs[:, 0] < runs[:, 1]
    runs, request = runs[kept], request[kept]
    position = np.arange(query_starts[-1]) - np.repeat(query_starts[:-1] - starts, lengths)
    shallow = (position >= np.repeat(low, lengths)) & (position < np.repeat(high, lengths))
    return Runs(request, runs[:, 0], runs[:, 1], np.flatnonzero(~shallow), np.flatnonzero(shallow))
