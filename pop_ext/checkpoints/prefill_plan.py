"""Prefill plans: which branches (attention, MLP) of which layers a prompt's truncated tokens run through.

P = 1 + the last layer with a branch that runs. From P up all keys and values are projected from h[P], as at a prefill
depth of P. A layer below P writes them from its own input, whether its attention runs or not. So a prefill depth is the
plan whose first P layers run whole: the suffix is skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from .families import ModelSpec
from .files import CheckpointError, atomic_write, read_json
from .fingerprint import checkpoint_fingerprint

FORMAT = "pop-prefill-plan-1"
KEYS = {"format", "fingerprint", "layers", "found_with"}
BRANCHES = ("attention", "mlp")
SIZE_LIMIT = 4 << 20  # bytes of a file


@dataclass(frozen=True)
class PrefillPlan:
    """Which branches of each of L layers run for truncated prompt tokens.

    attention, mlp: L booleans each. fingerprint: of the model that it was found for. found_with: how, for people. Plans
    are equal that run the same. ValueError unless the two are as long, and something runs.
    """

    attention: tuple[bool, ...]
    mlp: tuple[bool, ...]
    fingerprint: str = field(default="", compare=False)
    found_with: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if len(self.attention) != len(self.mlp):
            raise ValueError(
                f"prefill_plan has {len(self.attention)} attentions and {len(self.mlp)} MLPs, expected as many of both"
            )
        if not any(self.attention + self.mlp):
            raise ValueError("prefill_plan runs no branch of any layer, expected at least one attention or MLP")

    @classmethod
    def suffix(cls, depth: int, layers: int, fingerprint: str = "") -> PrefillPlan:
        """The plan of a prefill depth in [1, layers]: the first `depth` layers whole, no more."""
        runs = (True,) * depth + (False,) * (layers - depth)
        return cls(runs, runs, fingerprint)

    @property
    def depth(self) -> int:
        """P, in layers: keys and values of those from P up are projected from h[P]."""
        return max(layer for layer, runs in enumerate(zip(self.attention, self.mlp, strict=True)) if any(runs)) + 1

    @property
    def first_projected(self) -> int:
        """The first layer whose attention does not run; L if all run."""
        return (*self.attention, False).index(False)

    @property
    def partial(self) -> dict[int, tuple[bool, bool]]:
        """The layers below P that do not run whole, and whether attention and MLP run; empty for a suffix."""
        runs = list(zip(self.attention, self.mlp, strict=True))[: self.depth]
        return {layer: pair for layer, pair in enumerate(runs) if not all(pair)}

    def runs(self, layer: int, branch: str) -> bool:
        return getattr(self, branch)[layer]

    def switched(self, layer: int, branch: str, runs: bool) -> PrefillPlan:
        """The plan with one branch, "attention" or "mlp", that runs or not."""
        flags = getattr(self, branch)
        return replace(self, **{branch: (*flags[:layer], runs, *flags[layer + 1 :])})

    def __str__(self) -> str:
        attention, mlp = (_ranges(getattr(self, branch)) for branch in BRANCHES)
        return f"attention of layers {attention}; MLPs of layers {mlp}"

    # Files

    def to_json(self) -> dict:
        layers = [{"attention": a, "mlp": m} for a, m in zip(self.attention, self.mlp, strict=True)]
        return {"format": FORMAT, "fingerprint": self.fingerprint, "layers": layers, "found_with": self.found_with}

    def save(self, path: str | Path) -> None:
        """Writes a file for `load`, whole or not at all."""
        data = {name: json.dumps(value) for name, value in self.to_json().items()}
        data["layers"] = data["layers"].replace("[{", "[\n  {").replace("}, {", "},\n  {").replace("}]", "}\n ]")
        text = ",\n".join(f' "{name}": {value}' for name, value in data.items())
        atomic_write(Path(path), lambda file: Path(file).write_text(f"{{\n{text}\n}}\n"))

    @classmethod
    def load(cls, path: str | Path, spec: ModelSpec) -> PrefillPlan:
        """Reads a file for a model of `spec`. FileNotFoundError, or ValueError that says what is wrong with it; whose
        weights it is for, `check` says.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"prefill_plan is {path}: no such file, expected one of `pop plan`")
        try:
            return cls._read(read_json(path, SIZE_LIMIT), spec)
        except (CheckpointError, ValueError) as error:
            reason = str(error).removeprefix(f"{path}: ").removeprefix("prefill_plan ")
            raise ValueError(f"prefill_plan is {path}: {reason}") from None

    @classmethod
    def _read(cls, data: dict, spec: ModelSpec) -> PrefillPlan:
        if data.get("format") != FORMAT:
            raise ValueError(f"its format is {data.get('format')!r:.40}, expected {FORMAT!r}, which `pop plan` writes")
        _check_keys("it", data, KEYS, optional=("found_with",))
        layers, fingerprint, found_with = data["layers"], data["fingerprint"], data.get("found_with", {})
        if not isinstance(fingerprint, str) or not isinstance(found_with, dict) or not isinstance(layers, list):
            raise ValueError("expected a string as fingerprint, a list as layers and a table as found_with")
        if len(layers) != spec.num_layers:
            raise ValueError(f"it has {len(layers)} layers, expected {spec.num_layers}, as many as the model")
        for index, layer in enumerate(layers):
            if not isinstance(layer, dict):
                raise ValueError(f"layers[{index}] is {layer!r:.40}, expected a table of {' and '.join(BRANCHES)}")
            _check_keys(f"layers[{index}]", layer, set(BRANCHES))
            for branch, runs in layer.items():
                if type(runs) is not bool:
                    raise ValueError(f"layers[{index}].{branch} is {runs!r:.40}, expected true or false")
        attention, mlp = (tuple(layer[branch] for layer in layers) for branch in BRANCHES)
        return cls(attention, mlp, fingerprint, found_with)

    def check(self, folder: Path) -> None:
        """ValueError unless it was found for the weights of this checkpoint folder, of which none are loaded."""
        if self.fingerprint != checkpoint_fingerprint(folder):
            raise ValueError("prefill_plan was found for another model: its fingerprint differs")


def _check_keys(name: str, table: dict, keys: set[str], optional: tuple[str, ...] = ()) -> None:
    if unknown := sorted(table.keys() - keys):
        raise ValueError(f"{name} has {', '.join(map(repr, unknown)):.80}, expected {', '.join(sorted(keys))} only")
    if missing := sorted(keys - set(optional) - table.keys()):
        raise ValueError(f"{name} has no {' and no '.join(missing)}")


def _ranges(flags: tuple[bool, ...]) -> str:
    """The indices that are set, as "0-19, 24"; "none"."""
    found = []
    for runs, group in groupby(enumerate(flags), key=lambda pair: pair[1]):
        indices = [index for index, _ in group]
        if runs:
            found.append(str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}")
    return ", ".join(found) or "none"
