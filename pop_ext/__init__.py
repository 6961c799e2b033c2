"""POP: prefill-only pruning. `load` a model and `generate`; the operations are `torch.ops.pop.*`, described in
`pop_ext.ops`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

# Names are imported when they are asked for: torch and transformers take seconds, which `pop --help` need not wait for.
_PUBLIC = {
    "CacheFullError": "runtime.kv_cache",
    "Calibration": "checkpoints.calibration",
    "CalibrationError": "checkpoints.calibration",
    "CheckpointError": "checkpoints.files",
    "Model": "runtime.generation",
    "StageTimes": "runtime.model",
    "build_info": "ops",
    "calibrate": "analysis.workflows",
    "cpu_isa": "ops",
    "cpu_isas": "ops",
    "evaluate": "analysis.workflows",
    "load": "runtime.loading",
    "measure_importance": "analysis.workflows",
    "set_cpu_isa": "ops",
    "suggest_depth": "analysis.workflows",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .analysis.workflows import calibrate, evaluate, measure_importance, suggest_depth
    from .checkpoints.calibration import Calibration, CalibrationError
    from .checkpoints.files import CheckpointError
    from .ops import build_info, cpu_isa, cpu_isas, set_cpu_isa
    from .runtime.generation import Model
    from .runtime.kv_cache import CacheFullError
    from .runtime.loading import load
    from .runtime.model import StageTimes


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("pop-ext")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pop_ext' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# `torch.ops.pop` is there once pop_ext is imported. The command line alone does without, and registers it when a command
# needs it.
if "pop_ext.cli" not in sys.modules and not _starting_the_command_line():
    from . import ops  # noqa: F401
