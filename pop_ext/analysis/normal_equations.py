"""Sums over a stream of inputs and targets that ridge regression needs, and how far a pass over the stream has come."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.files import atomic_write
from ..checkpoints.tensors import open_safetensors

PENALTIES = tuple(10.0 ** (-k / 2) for k in range(2, 17))  # relative to the mean of the diagonal of X^T X
SAVE_SECONDS = 20  # between states of a pass
SAVE_SHARE = 0.05  # of the time, at most, that saving them takes
FORMAT = "pop-pass-1"
logger = logging.getLogger(__name__)


class NormalEquations:
    """X^T X, X^T Y and Y^T Y's diagonal of a stream, in float64; products of one block of rows are float32. X [n, in];
    Y [n, out] for each of `layers`.
    """

    def __init__(self, layers: range, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        like = {"dtype": torch.float64, "device": device}
        self.xx = torch.zeros(inputs, inputs, **like)
        self.xy = {layer: torch.zeros(inputs, outputs, **like) for layer in layers}
        self.yy = {layer: torch.zeros(outputs, **like) for layer in layers}
        self.count = 0

    def to_host(self) -> None:
        """What follows is small, and in float64, which GPUs are slow at."""
        self.xx = self.xx.cpu()
        self.xy = {layer: xy.cpu() for layer, xy in self.xy.items()}
        self.yy = {layer: yy.cpu() for layer, yy in self.yy.items()}

    def add_inputs(self, x: Tensor) -> None:
        self.xx += x.T @ x
        self.count += len(x)

    def add_targets(self, layer: int, x: Tensor, y: Tensor) -> None:
        self.xy[layer] += x.T @ y
        self.yy[layer] += y.double().square().sum(0)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        total = NormalEquations(range(0), 0, 0)
        total.xx, total.count = self.xx + other.xx, self.count + other.count
        total.xy = {layer: self.xy[layer] + other.xy[layer] for layer in self.xy}
        total.yy = {layer: self.yy[layer] + other.yy[layer] for layer in self.yy}
        return total

    def of(self, matrix: Tensor) -> NormalEquations:
        """The moments of inputs `matrix` x, matrix [m, in]."""
        result = NormalEquations(range(0), 0, 0)
        result.xx, result.count = matrix @ self.xx @ matrix.T, self.count
        result.xy, result.yy = {layer: matrix @ xy for layer, xy in self.xy.items()}, self.yy
        return result

    def solve(self, layer: int, own: Tensor, penalty: float, spectrum: tuple[Tensor, Tensor]) -> Tensor:
        """The ridge solution [in, out] float64 with `spectrum`, the eigenvalues and eigenvectors of X^T X: sound
        however nearly singular that is, as a negative eigenvalue can only be rounding."""
        values, vectors = spectrum
        damped = values.clamp_min(0) + penalty * values.mean()
        return own + vectors @ ((vectors.T @ (self.xy[layer] - self.xx @ own)) / damped[:, None])

    def penalty_errors(
        self, layer: int, own: Tensor, spectrum: tuple[Tensor, Tensor], other: NormalEquations
    ) -> Tensor:
        """[PENALTIES] float64: of each penalty's `solve`, the squared error over another stream, relative to the sum of
        its targets' squares. other: that stream's moments in the basis of the eigenvectors, `of(vectors.T)`.

        In the basis of the eigenvectors, a solution is `own + D R` with a diagonal D that alone has the penalty, so
        that its error is a quadratic form of D: three products for all penalties, and not three for each.
        """
        values, vectors = spectrum
        rest = vectors.T @ (self.xy[layer] - self.xx @ own)  # R
        own = vectors.T @ own
        xx, xy = other.xx, other.xy[layer]
        linear = 2 * ((xx @ own - xy) * rest).sum(1)
        quadratic = xx * (rest @ rest.T)
        constant = (own * (xx @ own - 2 * xy)).sum() + other.yy[layer].sum()
        damped = values.clamp_min(0) + torch.tensor(PENALTIES, dtype=torch.float64)[:, None] * values.mean()
        scale = 1 / damped  # [PENALTIES, in]
        return (((scale @ quadratic) * scale).sum(1) + scale @ linear + constant) / other.yy[layer].sum()

    def errors(self, layer: int, weight: Tensor) -> Tensor:
        """The squared error of `weight` [in, out] in each output, summed over the stream: [out]."""
        return (weight * (self.xx @ weight - 2 * self.xy[layer])).sum(0) + self.yy[layer]

    def tensors(self) -> dict[str, Tensor]:
        """All sums, by name."""
        tables = {"xy": self.xy, "yy": self.yy}
        named = {f"{name}.{layer}": tensor for name, table in tables.items() for layer, tensor in table.items()}
        return {"xx": self.xx} | named


class UnfinishedPass:
    """A file that keeps the sums of a pass over a stream, from which a pass of the same `key` goes on.

    It is written between batches, never in the middle of one. A disk that is full costs the file, not the pass.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key, self.continued = path, key, False
        self.saved, self.cost, self.broken = time.perf_counter(), 0.0, False

    def load(self, tables: list[NormalEquations]) -> int:
        """Adds up in `tables`, which are empty, what the file holds. Returns how many windows that are; 0 if it is none
        of this key.
        """
        if not self.is_at(self.path):
            return 0
        try:
            with open_safetensors(self.path) as file:
                about = file.metadata()
                if about["key"] != self.key:
                    return 0
                counts, done = list(map(int, about["counts"].split())), int(about["done"])
                found = [
                    {name: file.get_tensor(f"{i}.{name}") for name in table.tensors()} if count else {}
                    for i, (table, count) in enumerate(zip(tables, counts, strict=True))
                ]
            for table, count, tensors in zip(tables, counts, found, strict=True):
                table.count = count
                for name, tensor in tensors.items():
                    table.tensors()[name].add_(tensor.to(table.xx.device))
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            logger.warning("%s cannot be gone on from, so all is done anew: %s", self.path, error)
            return 0
        self.continued = True
        return done

    def save_now_and_then(self, tables: list[NormalEquations], done: int) -> None:
        start = time.perf_counter()
        if self.broken or start - self.saved < max(SAVE_SECONDS, self.cost / SAVE_SHARE):
            return
        tensors = {
            f"{i}.{name}": tensor.cpu()
            for i, table in enumerate(tables)
            if table.count
            for name, tensor in table.tensors().items()
        }
        counts = " ".join(str(table.count) for table in tables)
        about = {"format": FORMAT, "key": self.key, "done": str(done), "counts": counts}
        try:
            atomic_write(self.path, lambda temporary: save_file(tensors, temporary, about))
        except (OSError, SafetensorError) as error:
            logger.warning("%s cannot be written, so an interrupted run would begin anew: %s", self.path, error)
            self.broken = True
        self.saved = time.perf_counter()
        self.cost = self.saved - start

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a file is one of these."""
        try:
            with open_safetensors(path) as file:
                return (file.metadata() or {}).get("format") == FORMAT
        except (SafetensorError, OSError, ValueError):
            return False
