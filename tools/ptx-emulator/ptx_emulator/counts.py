"""Counts of launches."""

import json

from .library import runtime


def count(on: bool = True) -> None:
    """Whether later launches are counted."""
    runtime().ptx_emulator_count(int(on))


def counts() -> list[dict]:
    """The launches counted since `clear`, each with totals and lists of `allocations`, `loops` and `instructions`."""
    return json.loads(runtime().ptx_emulator_counts(0))


def module_text(number: int) -> str:
    """The PTX of a counted launch's module (its "module")."""
    text = runtime().ptx_emulator_counted_module(number)
    if text is None:
        raise ValueError(f"no counted launch has module {number}")
    return text.decode()


def report(annotate: bool = False) -> str:
    """The counted launches as text; `annotate` adds the PTX with counts beside each line."""
    return runtime().ptx_emulator_counts(2 if annotate else 1).decode()
