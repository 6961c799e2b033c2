"""Checks of launches, the order that they run in, and what was found."""

import dataclasses
import json

from .library import message, runtime


@dataclasses.dataclass(frozen=True)
class Spot:
    """A place in a running kernel: PTX line and text, source line where -lineinfo gave it (0: not), block, thread."""

    kernel: str
    line: int
    text: str
    source: str
    source_line: int
    block: tuple[int, int, int]
    thread: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Finding(Spot):
    """A broken rule (the README lists them), where, and in which allocation; `second` is the other party,
    `second_role` what it did; `count`: how often it was found at these lines."""

    rule: str
    message: str
    address: int
    space: str
    allocation: str
    count: int
    second: Spot | None
    second_role: str


def checks(*names: str) -> None:
    """What later launches are checked for: any of "memory", "init", "race", "barrier", or "all"; nothing: no checks.

    Memory that is known when checks are switched on counts as written.
    """
    if runtime().ptx_emulator_checks(",".join(names).encode()):
        raise ValueError(message())


def schedule(name: str = "roundrobin", seed: int = 0) -> None:
    """The order of warps, blocks and pending copies in later launches: "roundrobin", "random" or "adversarial"."""
    if runtime().ptx_emulator_schedule(name.encode(), seed):
        raise ValueError(message())


def findings() -> list[Finding]:
    """What was found since `clear`."""
    result = []
    for row in json.loads(runtime().ptx_emulator_findings()):
        second = row.pop("second")
        role = second.pop("role") if second else ""
        for spot in (row, second or {}):
            spot.update({key: tuple(spot[key]) for key in ("block", "thread") if key in spot})
        result.append(Finding(**row, second=Spot(**second) if second else None, second_role=role))
    return result


def expect_stream(stream: int | None) -> None:
    """Launches through the runtime on another stream than this (a cudaStream_t) become findings; None ends that."""
    runtime().ptx_emulator_expect_stream(int(stream is not None), stream)
