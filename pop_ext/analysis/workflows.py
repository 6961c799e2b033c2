"""What the commands do, from Python: calibrate, evaluate and measure on texts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..checkpoints.calibration import Calibration
from ..runtime.generation import Model
from . import calibration as calibrations
from . import evaluation, importance
from . import text as texting
from .evaluation import Fidelity
from .importance import Importance

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Reports nothing."""


def joined(texts: Sequence[str]) -> str:
    """The texts as one; TypeError for a string in place of a list of strings."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"texts is {texts!r:.60}, expected a list of strings")
    return "\n\n".join(texts)


def calibrate(
    model: Model,
    depths: Sequence[int | float],
    texts: Sequence[str] | None = None,
    *,
    tokens: int = 50_000,
    rank: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Calibration:
    """Fits the projections of the skipped layers to what the full model computes, for each prefill depth.

    texts: what to calibrate on; by default text that needs no file (samples of the model and Python's help, `seed`).
    tokens: how many tokens of it to use at most. rank: features of the token before (64), 0 for none.
    Returns a Calibration; `save` it for `pop_ext.load(..., calibration=FILE)`. ValueError for text that is too short.
    """
    resolved = [model.resolve_prefill_depth(depth) for depth in depths]
    start = time.perf_counter()
    source = joined(texts) if texts is not None else texting.default_text(model, tokens, seed, progress)
    sampled = time.perf_counter()
    length = min(calibrations.WINDOW, model.spec.max_position_embeddings)
    windows = texting.windows(model.tokenizer, source, length)[: max(2, tokens // length)]
    result = calibrations.calibrate(model, windows, resolved, rank=rank, progress=progress)
    result.provenance |= {
        "text": ["default"] if texts is None else [f"{len(texts)} texts"],
        "boundary_tokens": model.boundary_tokens,
        "anchor_tokens": model.anchor_tokens,
        "sampling_seconds": sampled - start,
        "seconds": time.perf_counter() - sampled,
    }
    return result


def evaluate(
    model: Model,
    texts: Sequence[str],
    depths: Sequence[int | float],
    *,
    prompts: int = 32,
    prompt_tokens: int = 384,
    continuation_tokens: int = 64,
    methods: Sequence[str] = ("pop_uncalibrated", "pop_calibrated"),
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Fidelity]:
    """Compares next-token distributions after truncated prompts with the full model's, and prefill times.

    `prompts` windows of prompt_tokens + continuation_tokens are taken from the texts. The first row is the full model,
    then a row for each method and depth. ValueError for text that is too short or an unknown method.
    """
    length = prompt_tokens + continuation_tokens
    windows = texting.windows(model.tokenizer, joined(texts), length, prompts)
    pairs = [window[:prompt_tokens] for window in windows], [window[prompt_tokens:] for window in windows]
    resolved = sorted({model.resolve_prefill_depth(depth) for depth in depths})
    return evaluation.evaluate(model, *pairs, resolved, list(methods), seed=seed, progress=progress)


def measure_importance(
    model,
    windows: list[list[int]],
    prompt_tokens: int,
    *,
    boundary_tokens: int = 1,
    anchor_tokens: int = 1,
    branches: bool = False,
    draws: int = 4,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Importance:
    """Every layer's importance for prefill and for decode, by virtual gates on a transformers model.

    windows: token ids, each a prompt of `prompt_tokens` and its continuation. See `analysis.importance.measure`.
    """
    return importance.measure(
        model, windows, prompt_tokens, boundary_tokens=boundary_tokens, anchor_tokens=anchor_tokens, branches=branches,
        draws=draws, seed=seed, progress=progress,
    )  # fmt: skip


def suggest_depth(
    model: Model,
    texts: Sequence[str],
    *,
    max_kl: float = 0.05,
    prompts: int = 8,
    prompt_tokens: int = 384,
    continuation_tokens: int = 64,
) -> tuple[int, dict[int, float]]:
    """The least prefill depth whose KL divergence from the full model, nats a token, is within `max_kl` with the
    model's own projections; and the KL at each depth that the search measured.
    """
    method = "pop_uncalibrated"

    def kl_at(depth: int) -> float:
        rows = evaluate(
            model, texts, [depth], prompts=prompts, prompt_tokens=prompt_tokens,
            continuation_tokens=continuation_tokens, methods=[method],
        )  # fmt: skip
        return next(row.kl for row in rows if row.method == method)

    return importance.suggest_depth(model.spec.num_layers, max_kl, kl_at)
