"""POP: prefill-only pruning. `load` a model and `generate`; the operations are `torch.ops.pop.*`, described in
`pop_ext.ops`.
"""

from importlib import import_module

from .ops import build_info, cpu_isa, cpu_isas, set_cpu_isa

# What brings transformers along is imported when it is asked for, so that `torch.ops.pop` and `pop --help` do not wait
# for it.
_LAZY = {
    "CacheFullError": "runtime.kv_cache",
    "CalibrationError": "checkpoints.calibration",
    "CheckpointError": "checkpoints.files",
    "Model": "runtime.generation",
    "StageTimes": "runtime.model",
    "load": "runtime.loading",
}

__all__ = [
    "CacheFullError",
    "CalibrationError",
    "CheckpointError",
    "Model",
    "StageTimes",
    "build_info",
    "cpu_isa",
    "cpu_isas",
    "load",
    "set_cpu_isa",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'pop_ext' has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
