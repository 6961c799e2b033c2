"""POP: prefill-only pruning. `load` a model and `generate`; the operations are `torch.ops.pop.*`, described in
`pop_ext.ops`.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING

# Names are imported when they are asked for: torch and transformers take seconds, which `pop --help` need not wait for.
_PUBLIC = {
    "CacheFullError": "runtime.kv_cache",
    "Calibration": "checkpoints.calibration",
    "CalibrationError": "checkpoints.calibration",
    "CheckpointError": "checkpoints.files",
    "DeviceMemoryError": "runtime.device",
    "Model": "runtime.generation",
    "NonFiniteError": "runtime.finite",
    "PrefillPlan": "checkpoints.prefill_plan",
    "StageTimes": "runtime.device",
    "attach": "integrations.transformers",
    "build_info": "ops",
    "calibrate": "analysis.workflows",
    "cpu_isa": "ops",
    "cpu_isas": "ops",
    "detach": "integrations.transformers",
    "evaluate": "analysis.workflows",
    "load": "runtime.loading",
    "measure_importance": "analysis.workflows",
    "set_cpu_isa": "ops",
    "suggest_depth": "analysis.workflows",
    "tune": "analysis.workflows",
    "verify": "analysis.verification",
}

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from .analysis.verification import verify
    from .analysis.workflows import calibrate, evaluate, measure_importance, suggest_depth, tune
    from .checkpoints.calibration import Calibration, CalibrationError
    from .checkpoints.files import CheckpointError
    from .checkpoints.prefill_plan import PrefillPlan
    from .integrations.transformers import attach, detach
    from .ops import build_info, cpu_isa, cpu_isas, set_cpu_isa
    from .runtime.device import DeviceMemoryError, StageTimes
    from .runtime.finite import NonFiniteError
    from .runtime.generation import Model
    from .runtime.kv_cache import CacheFullError
    from .runtime.loading import load


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("pop-ext")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pop_ext' has no attribute {name!r}")
    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")}.union(__all__))


class _RegisterWithTorch(MetaPathFinder):
    """Registers `torch.ops.pop` as soon as torch is imported, so that whoever imports both has the operations."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec("torch")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                import_module("pop_ext.ops")

            spec.loader.exec_module = exec_module
        return spec


if "torch" in sys.modules:
    from . import ops
else:
    sys.meta_path.insert(0, _RegisterWithTorch())
