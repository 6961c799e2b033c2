"""Matrices as tensor cores take them: their elements' bits, and the registers that hold them."""

import numpy as np
import torch


def fragment(matrix: np.ndarray, down: int) -> np.ndarray:
    """The registers of a matrix with k along its rows, each of 32 lanes by 4 bytes (8 for doubles)."""
    per = max(1, 4 // matrix.itemsize)
    rows, depth = matrix.shape
    tiles = [matrix[r * 8 : r * 8 + 8, k : k + 4 * per] for k in range(0, depth, 4 * per) for r in range(rows // 8)]
    return np.stack([np.ascontiguousarray(t).reshape(32, per) for t in tiles])


def bf16(x):
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def e4m3(x):
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def nibbles(x):
    low, high = (np.ascontiguousarray(x[:, k::2]) & 15 for k in range(2))
    return (low | high << 4).astype(np.uint8)


def e5m2(x):
    return (np.ascontiguousarray(x, np.float16).view(np.uint16) >> 8).astype(np.uint8)
