"""The device that a model runs on: its choice, its memory, and the times of what runs there."""

from __future__ import annotations

import logging
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..checkpoints.families import ModelSpec

logger = logging.getLogger("pop_ext")

ACCELERATORS = {"cuda"}  # device types whose kernels `torch.ops.pop` has
HEAD_SIZES = (32, 64, 128, 256)
LEAST_CAPABILITY = (8, 0)
CACHE_SHARE = 0.85  # of the memory that weights leave free goes to the cache; activations and graphs take the rest


class DeviceMemoryError(RuntimeError):
    """A model that does not fit; the message has what it needs and what is free."""


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device to run on. "auto" is CUDA where this machine and this build have it, else the CPU; the log says which.

    ValueError for a device of another kind, RuntimeError where CUDA is asked for and cannot be had, in one sentence.
    """
    if isinstance(device, str) and device == "auto":
        reason = why_no_cuda()
        chosen = torch.device("cpu") if reason else torch.device("cuda", torch.cuda.current_device())
        logger.info("running on %s%s", chosen, f": {reason}" if reason else "")
        return chosen
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device is {device!r:.80}, expected 'auto', 'cpu', 'cuda', 'cuda:N' or a torch.device"
        ) from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type not in ACCELERATORS:
        raise ValueError(f"device is {str(chosen)!r}, expected 'auto', 'cpu', 'cuda', 'cuda:N' or a torch.device")
    if chosen.type == "cuda" and (reason := why_no_cuda(chosen.index)):
        raise RuntimeError(f"device is {str(chosen)!r}, but {reason}")
    module = torch.get_device_module(chosen)
    return torch.device(chosen.type, module.current_device() if chosen.index is None else chosen.index)


def why_no_cuda(index: int | None = None) -> str | None:
    """Why no model can run on this CUDA device (None: the current one); None where one can."""
    if ops.why_no_cuda is not None:
        return ops.why_no_cuda
    if not str(torch.version.cuda).startswith("13."):
        return f"this torch is built for CUDA {torch.version.cuda}, expected CUDA 13"
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
        index = torch.cuda.current_device() if index is None else index
    except (RuntimeError, AssertionError) as error:  # no GPU, or a driver too old for this torch: torch says which
        return f"torch finds no GPU that it can use ({str(error).splitlines()[0]})"
    if index >= count:
        return f"this machine has {count} GPUs, cuda:0 to cuda:{count - 1}"
    capability = torch.cuda.get_device_capability(index)
    if capability < LEAST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, expected "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later"
        )
    return None


def check_kernels(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
    """ValueError unless the device has kernels for a model of `spec` in `dtype`."""
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16, torch.float16)
    if dtype not in dtypes:
        raise ValueError(f"dtype is {dtype}, expected {dtypes[0]} or {dtypes[1]} on {device}")
    if device.type == "cpu":
        return
    if spec.head_dim not in HEAD_SIZES:
        raise ValueError(
            f"the model's head size is {spec.head_dim}, expected 32, 64, 128 or 256 on {device}; load it with "
            'device="cpu"'
        )
    for name in ("hidden_size", "intermediate_size"):
        if getattr(spec, name) % 8:
            raise ValueError(
                f"the model's {name} is {getattr(spec, name)}, expected a multiple of 8 on {device}; load it with "
                'device="cpu"'
            )


def weight_bytes(spec: ModelSpec, itemsize: int, first_projected: int, extra: int = 0) -> int:
    """Of a model's weights on a GPU, with the projections of the layers from `first_projected` on."""
    kv = spec.num_kv_heads * spec.head_dim
    layer = spec.hidden_size * (2 * spec.num_heads * spec.head_dim + 2 * kv + 3 * spec.intermediate_size)
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    projections = max(0, spec.num_layers - first_projected) * 2 * kv * spec.hidden_size
    return itemsize * (spec.num_layers * layer + embeddings + projections) + extra


def cache_capacity(
    spec: ModelSpec, itemsize: int, device: torch.device, needed: int, block_size: int, asked: int | None
) -> int:
    """How many tokens the cache holds, before anything is allocated: `asked`, or CACHE_SHARE of what `needed` bytes of
    weights leave free. DeviceMemoryError names both figures where that is too little.
    """
    free, _ = torch.get_device_module(device).mem_get_info(device)
    token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * itemsize
    tokens = asked if asked is not None else int(CACHE_SHARE * (free - needed)) // token
    if tokens < (1 if asked is not None else block_size) or needed + tokens * token > free:
        least = needed + token * (block_size if asked is None else asked)
        raise DeviceMemoryError(
            f"the model needs {gib(least)} on {device} ({gib(needed)} of weights, the rest for keys and values of "
            f"{block_size if asked is None else asked} tokens), but {gib(free)} are free"
        )
    return tokens if asked is not None else tokens // block_size * block_size


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """`peak_memory` counts from here."""
    if device.type == "cpu":
        with suppress(OSError):  # other systems than Linux
            Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that the process, or on a GPU torch, held since `reset_peak_memory`; None where the system does
    not tell.
    """
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else 1024 * int(found[1])


# Times


class StageTimes:
    """Seconds of prefill's three stages, and of the choice of deep tokens; `boundary` includes anchors, the tokens that
    were chosen, and the vocabulary projection.

    On a GPU they are the device's, from events; reading them waits for it.
    """

    STAGES = ("truncated_prefill", "projection", "selection", "boundary")

    def __init__(self, device: torch.device | str = "cpu"):
        self._device = torch.device(device)
        self._seconds: dict[str, float] = dict.fromkeys(self.STAGES, 0.0)
        self._spans = []  # stage, first and last event
        self._last: Any = None

    def start(self) -> None:
        """A stage begins."""
        self._last = self._now()

    def end(self, stage: str) -> None:
        """What ran since the last `start` or `end` was this stage."""
        now = self._now()
        if self._device.type == "cpu":
            self._seconds[stage] += now - self._last
        else:
            self._spans.append((stage, self._last, now))
        self._last = now

    def _now(self):
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self._device).Event(enable_timing=True)
        event.record()
        return event

    def _of(self, stage: str) -> float:
        if self._spans:
            self._spans[-1][2].synchronize()
            for name, first, last in self._spans:
                self._seconds[name] += first.elapsed_time(last) / 1000
            self._spans = []
        return self._seconds[stage]

    @property
    def truncated_prefill(self) -> float:
        return self._of("truncated_prefill")

    @property
    def projection(self) -> float:
        return self._of("projection")

    @property
    def selection(self) -> float:
        return self._of("selection")

    @property
    def boundary(self) -> float:
        return self._of("boundary")

    @property
    def total(self) -> float:
        return sum(map(self._of, self.STAGES))
