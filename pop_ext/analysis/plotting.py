"""Figures, with matplotlib where it is installed (`pip install pop-ext[plot]`)."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.files import atomic_write


def figure(rows: int = 1):
    """A figure and its axes, without any window system."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install matplotlib") from None
    fig = Figure(figsize=(8, 1 + 4 * rows), layout="constrained")
    return fig, fig.subplots(rows)


def save(fig, path: str | Path) -> None:
    """Writes a figure whole or not at all; the suffix says the format. ValueError for one that is none."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind not in fig.canvas.get_supported_filetypes():
        raise ValueError(f"{path}: no format for plots, expected a name that ends in .png, .svg or .pdf")
    atomic_write(path, lambda temporary: fig.savefig(temporary, format=kind, dpi=150))
