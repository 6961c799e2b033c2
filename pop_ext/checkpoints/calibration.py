"""Calibration files: the projections that `pop calibrate` and `pop tune` fitted for one model."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .files import atomic_write
from .fingerprint import checkpoint_fingerprint
from .tensors import open_safetensors

FORMAT = "pop-calibration-2"


class CalibrationError(ValueError):
    """A calibration file is damaged, of another model, or without the depth asked for."""


@dataclass(eq=False)
class Calibration:
    """Projections of one model for some prefill depths.

    projections: prefill depth P -> [L - P, 2 Hkv E, D + rank], the input norm's gain folded in, as `project_kv` takes
        them for rows [x_t, z_t].
    features: P -> A [rank, D], z_t = A x_(t-1); rank may be 0.
    provenance: fingerprint of the model, tokens, window and, by depth, penalty and errors; of `pop tune` also what it
        measured, and the depth that it recommends.
    """

    projections: dict[int, Tensor]
    features: dict[int, Tensor]
    provenance: dict

    @property
    def depths(self) -> list[int]:
        return sorted(self.projections)

    def at(self, depth: int) -> tuple[Tensor, Tensor]:
        """Projections [L - P, 2 Hkv E, D + rank] and features [rank, D] of a prefill depth; CalibrationError if it is
        none of these.
        """
        if depth not in self.projections:
            depths = ", ".join(map(str, self.depths))
            raise CalibrationError(f"prefill_depth is {depth} layers, but the calibration was made for {depths}")
        return self.projections[depth], self.features[depth]

    @property
    def recommended(self) -> int | None:
        """The prefill depth that `pop tune` recommends; None in a file of `pop calibrate`, and where none would do."""
        return self.provenance.get("recommended")

    def __repr__(self) -> str:
        depths = ", ".join(
            f"{depth} (recommended)" if depth == self.recommended else str(depth) for depth in self.depths
        )
        tokens, rank = (self.provenance.get(name, "?") for name in ("tokens", "rank"))
        return f"<Calibration of prefill depths {depths}; {tokens} tokens, rank {rank}>"

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for table in (self.projections, self.features) for t in table.values())

    def to(self, device: torch.device) -> Calibration:
        """The same on a device."""

        def moved(table):
            return {depth: tensor.to(device) for depth, tensor in table.items()}

        return Calibration(moved(self.projections), moved(self.features), self.provenance)

    def check(self, folder: Path) -> None:
        """CalibrationError unless it was made for the weights of this checkpoint folder, of which none are loaded."""
        if self.provenance["fingerprint"] != checkpoint_fingerprint(folder):
            raise CalibrationError("the calibration was made for another model: its fingerprint differs")

    def save(self, path: str | Path) -> None:
        tensors = {f"projection.{depth}": tensor.contiguous() for depth, tensor in self.projections.items()}
        tensors |= {f"features.{depth}": tensor.contiguous() for depth, tensor in self.features.items()}
        metadata = {"format": FORMAT, "provenance": json.dumps(self.provenance)}
        atomic_write(Path(path), lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path, spec, dtype: torch.dtype) -> Calibration:
        """Reads a file for a model of `spec`, in `dtype`. CalibrationError says what is wrong with it."""
        path = Path(path)
        with _opened(path) as (file, depths, provenance):
            projections, features = (
                {depth: file.get_tensor(f"{kind}.{depth}") for depth in depths} for kind in ("projection", "features")
            )
            rows = 2 * spec.num_kv_heads * spec.head_dim
            for depth in depths:
                rank = len(features[depth])
                shapes = [rank, spec.hidden_size], [spec.num_layers - depth, rows, spec.hidden_size + rank]
                for tensor, shape in zip((features[depth], projections[depth]), shapes, strict=True):
                    if list(tensor.shape) != shape:
                        raise ValueError(
                            f"made for another model: depth {depth} has a tensor {list(tensor.shape)}, this one "
                            f"expected {shape}"
                        )
                    if not tensor.isfinite().all():
                        raise ValueError(f"depth {depth} has a tensor with NaN or infinity, expected finite values")
        for table in (projections, features):
            table.update({depth: tensor.to(dtype) for depth, tensor in table.items()})
        return cls(projections, features, provenance)


@contextmanager
def _opened(path: Path):
    """A calibration file, its depths and its provenance; CalibrationError says what is wrong with it, also of what its
    reader raises.
    """
    if path.is_dir():
        raise CalibrationError(f"{path} is a folder, expected a calibration file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such calibration file")
    try:
        opened = open_safetensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CalibrationError(f"{path}: not a calibration file, or a damaged one: {reason}") from None
    try:
        with opened as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"not a calibration of this version ({FORMAT}), which `pop calibrate` writes")
            provenance = json.loads(metadata["provenance"])
            names = [name.split(".") for name in file.keys()]  # noqa: SIM118
            depths = sorted(int(depth) for kind, depth in names if kind == "projection")
            if not isinstance(provenance.get("fingerprint"), str):
                raise ValueError("its provenance has no fingerprint")
            if provenance.get("recommended") not in (None, *depths):
                raise ValueError(f"it recommends {provenance['recommended']!r:.40}, expected one of its depths")
            yield file, depths, provenance
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CalibrationError(f"{path}: {error}") from None


def calibrated_depths(path: str | Path) -> list[int]:
    """The prefill depths that a calibration file holds, from its header alone."""
    with _opened(Path(path)) as (_, depths, _):
        return depths


def default_depth(path: str | Path) -> int:
    """The prefill depth that a calibration file recommends, or its only one, from its header alone. CalibrationError
    lists the depths where there are several and none is recommended.
    """
    with _opened(Path(path)) as (_, depths, provenance):
        recommended = provenance.get("recommended")
    if recommended is None and len(depths) != 1:
        raise CalibrationError(
            f"prefill_depth is not given, and {path} holds several and recommends none: expected one of "
            f"{', '.join(map(str, depths))}"
        )
    return depths[0] if recommended is None else recommended
