"""Tables and sentences for people, whole at 60 columns; where they are piped nothing is cut either."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..analysis.evaluation import NAMES, Fidelity
from .common import output_console

KL = "KL: how far the next-token distribution is from the full model's, in nats a token (0 is the full model itself)."
TOP1 = "top-1: tokens of the continuations whose likeliest token is the full model's, in per cent."
SPEEDUP = (
    "speed-up: the full model's prefill time over this one's, the median of rounds in which all take turns; "
    "± half the distance between its quartiles."
)
INTERVAL = "± of KL and top-1: half a 95% interval over the prompts."


def plain_table(console: Console, title: str, *columns: str) -> Table:
    """A table whose first column is text, and whose others are figures that are never broken."""
    narrow = console.width < 72
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1 - narrow))
    table.add_column(columns[0], overflow="fold")
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def plus_minus(value: float, interval: tuple[float, float], digits: int) -> str:
    half = (interval[1] - interval[0]) / 2
    return f"{value:.{digits}f} ± {half:.{digits}f}"


def kl_text(row: Fidelity) -> str:
    return "0" if row.method == "full" else plus_minus(row.kl, row.kl_ci95, 3 if row.kl >= 0.0995 else 4)


def top1_text(row: Fidelity) -> str:
    low, high = row.top1_ci95
    return "100" if row.method == "full" else plus_minus(100 * row.top1_agreement, (100 * low, 100 * high), 1)


def speedup_text(row: Fidelity) -> str:
    return "1" if row.method == "full" else plus_minus(row.speedup, row.speedup_quartiles, 2)


def print_evaluation(rows: list[Fidelity], title: str, exact: bool = False) -> None:
    """exact: the share of prompts whose whole continuation is the likeliest, in place of perplexity."""
    console = output_console()
    baselines = any(row.method not in ("full", "pop_uncalibrated", "pop_calibrated") for row in rows)
    columns = ["layers", "KL", *(["above best"] if baselines else []), "top-1", "exact" if exact else "ppl", "speed-up"]
    table = plain_table(console, title, *columns)
    for row in rows:
        low, high = row.excess_interval
        # a difference that its interval does not separate from nothing is none
        excess = f"{low:.3f} to {high:.3f}" if low > 0 else "best" if high == 0 else "no"
        deep = f", {row.deep_tokens:.0%} deep" if row.deep_tokens else ""
        table.add_row(
            f"{row.prefill_depth}{' by the plan' * row.prefill_plan}, {NAMES[row.method]}{deep}",
            kl_text(row),
            *(["" if row.method == "full" else excess] if baselines else []),
            top1_text(row),
            f"{row.exact_answers:.0%}" if exact else f"{row.perplexity:.{0 if row.perplexity >= 1000 else 2}f}",
            speedup_text(row),
        )
    if baselines and console.width < 90:
        for column in table.columns:
            column.no_wrap = False
    console.print(table)


def print_legend(*lines: str) -> None:
    console = output_console()
    for line in lines:
        console.print(line, style="dim", soft_wrap=not console.is_terminal)


def print_tuning(tuning, title: str) -> None:
    """A row for each candidate depth."""
    console = output_console()
    table = plain_table(console, title, "layers", "own KL", "calibrated KL", "top-1", "speed-up")
    full = tuning.rows[0]
    for depth in tuning.calibration.depths:
        own, row = tuning.row(depth, "pop_uncalibrated"), tuning.row(depth)
        mark = " *" if depth == tuning.recommended else ""
        table.add_row(f"{depth}{mark}", kl_text(own), kl_text(row), top1_text(row), speedup_text(row))
    table.add_row(f"{full.prefill_depth}, full", *["0"] * 2, "100", "1")
    console.print(table)


def print_sentences(*sentences: str) -> None:
    """Paragraphs, broken at words on a terminal."""
    console = output_console()
    for sentence in sentences:
        console.print(sentence, markup=False, soft_wrap=not console.is_terminal)


def print_command(command: str) -> None:
    """On one line however narrow the terminal, so that it can be copied."""
    output_console().print(f"\n  {command}", markup=False, soft_wrap=True)
