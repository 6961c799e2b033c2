"""What the commands do, from Python: tune, calibrate, evaluate and measure on texts or chats."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..checkpoints.calibration import Calibration
from ..runtime.generation import Model
from . import calibration as calibrations
from . import evaluation, importance
from . import text as texting
from . import tune as tuning
from .data import Data
from .evaluation import DEFAULT_METHODS, Fidelity
from .importance import Importance
from .samples import Pairs
from .tune import PROMPT_TOKENS, Goal, Tuning

Progress = Callable[..., None]


def no_progress(done: int, total: int, note: str = "") -> None:
    """Reports nothing."""


def tune(
    model: Model,
    texts: Sequence[str] | None = None,
    *,
    chats: Sequence | None = None,
    depths: Sequence[int | float] | None = None,
    max_kl: float | None = None,
    min_top1: float | None = None,
    speedup: float | None = None,
    tokens: int = 50_000,
    prompts: int = 24,
    prompt_tokens: int = PROMPT_TOKENS,
    continuation_tokens: int = 64,
    rank: int | None = None,
    seed: int = 0,
    verify: bool = True,
    output: str | Path | None = None,
    progress: Progress = no_progress,
) -> Tuning:
    """Finds the prefill depth that is safe for this model and data, with calibrated projections, and what it gains.

    texts, chats: the data; chats are lists of messages that end with the assistant's answer, as they are tokenized for
        the model by its own chat template. By default text that needs no file. A quarter is held out and measured on.
    depths: the candidates, by default up to six from two fifths of the layers up.
    max_kl, min_top1, speedup: at most one of them; the recommended depth is the least whose KL divergence from the full
        model, in nats a token (0.05), or whose share of equal likeliest tokens keeps within it with 95% confidence, or
        the greatest whose prefill is so many times as fast.
    tokens: to calibrate on at most. prompts, prompt_tokens, continuation_tokens: what is measured on; chats have
        prompts of their own length. rank: features of the token before (64), 0 for none.
    verify: check what the recommended depth is safe for, on a few prompts of each use, as `pop_ext.verify` does. A
        model whose context is shorter than its prompts is not checked.
    output: where to write the calibration; a run that was interrupted then goes on from `output` + ".tuning".
    progress: called with what is done, the total, and a note.
    Returns a Tuning with the calibration, the recommended depth (None where no candidate will do), and the figures.
    ValueError for data that is too short, before anything is computed.
    """
    goal = Goal.of(max_kl, min_top1, speedup)
    asked = tuning.candidates(model.spec.num_layers) if depths is None else depths
    resolved = calibrated_depths(model, asked)
    data = None if texts is None and chats is None else Data.of(texts, chats)
    if data is None:
        data = default_data(model, tokens * 4 // 3, seed, progress)
    fit, held_out = data.split(model, tokens, prompts, prompt_tokens, continuation_tokens)
    for pairs in (fit, held_out):
        pairs.encode_images(model, progress)
    return tuning.tune(
        model, fit, held_out, resolved, goal, rank=rank, seed=seed, verify=verify, output=output, progress=progress
    )


def default_data(model: Model, tokens: int, seed: int = 0, progress: Progress = no_progress) -> Data:
    """Text that needs no file: samples of the model, and Python's help."""
    return Data(texting.default_text(model, tokens, seed, progress), name="the sampled text")


def calibrated_depths(model: Model, depths: Sequence[int | float]) -> list[int]:
    """In layers, whatever calibration the model has."""
    own = copy.copy(model)
    own.calibration = None
    return sorted({own.resolve_prefill_depth(depth) for depth in depths})


def calibrate(
    model: Model,
    depths: Sequence[int | float],
    texts: Sequence[str] | None = None,
    *,
    chats: Sequence | None = None,
    tokens: int = 50_000,
    rank: int | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Calibration:
    """Fits the projections of the skipped layers to what the full model computes, for each prefill depth.

    texts, chats: what to calibrate on, as in `tune`; by default text that needs no file (samples of the model and
    Python's help, `seed`). tokens: how many tokens of it to use at most. rank: features of the token before (64), 0 for
    none. Returns a Calibration; `save` it for `pop_ext.load(..., calibration=FILE)`. ValueError for text that is too
    short.
    """
    resolved = calibrated_depths(model, depths)
    start = time.perf_counter()
    given = texts is not None or chats is not None
    data = Data.of(texts, chats) if given else default_data(model, tokens, seed, progress)
    sampled = time.perf_counter()
    fit = data.windows(model, tokens)
    fit.encode_images(model, progress)
    source = [data.name] if given else ["default"]
    return calibrate_on(model, resolved, fit, rank=rank, source=source, waited=sampled - start, progress=progress)


def calibrate_on(
    model: Model,
    depths: list[int],
    fit: Pairs,
    *,
    rank: int | None = None,
    source: list[str],
    waited: float = 0.0,
    refine: int = 0,
    state: Path | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Calibration:
    """`calibrate` on tokens, then `refine` gradient steps. source: names of the data, waited: seconds that sampling it
    took, for the provenance; state: see `refinement.refine`.
    """
    start = time.perf_counter()
    windows = fit.windows
    result = calibrations.calibrate(model, windows, depths, rank=rank, visuals=fit.visuals, progress=progress)
    result.provenance |= {
        "text": source,
        "boundary_tokens": model.boundary_tokens,
        "anchor_tokens": model.anchor_tokens,
        "sampling_seconds": waited,
        "seconds": time.perf_counter() - start,
    }
    if refine:
        from . import refinement

        refinement.refine(model, result, windows, refine, state=state, seed=seed, progress=progress)
    return result


def evaluate(
    model: Model,
    texts: Sequence[str] | None = None,
    depths: Sequence[int | float] | None = None,
    *,
    chats: Sequence | None = None,
    prompts: int = 32,
    prompt_tokens: int = 384,
    continuation_tokens: int = 64,
    methods: Sequence[str] = DEFAULT_METHODS,
    deep_tokens: Sequence[float] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[Fidelity]:
    """Compares next-token distributions after truncated prompts with the full model's, and prefill times.

    texts, chats: the data, as in `tune`; text is cut into `prompts` windows of prompt_tokens + continuation_tokens, of
    chats as many are taken as they are. depths: by default those of the model's calibration, or two thirds of the
    layers. deep_tokens: shares as `load` has one, by default the model's. The first row is the full model, then a row
    for each method, depth and share. ValueError for text that is too short
    or an unknown method.
    """
    evaluation.check_methods(methods)
    if depths is None:
        depths = [2 / 3] if model.calibration is None else model.calibration.depths
    resolved = sorted({model.resolve_prefill_depth(depth) for depth in depths})
    pairs = Data.of(texts, chats).pairs(model, prompts, prompt_tokens, continuation_tokens)
    pairs.encode_images(model, progress)
    shares = (model.deep_tokens,) if deep_tokens is None else deep_tokens
    return evaluate_on(model, pairs, resolved, methods, deep_tokens=shares, seed=seed, progress=progress)


def evaluate_on(
    model: Model,
    pairs: Pairs,
    depths: list[int],
    methods: Sequence[str],
    *,
    deep_tokens: Sequence[float] = (0.0,),
    seed: int = 0,
    progress=no_progress,
) -> list[Fidelity]:
    """`evaluate` on tokens."""
    return evaluation.evaluate(
        model, pairs.prompts, pairs.continuations, depths, list(methods), visuals=pairs.visuals,
        deep_tokens=deep_tokens, seed=seed, progress=progress,
    )  # fmt: skip


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
    model's own projections; and the KL at each depth that the search measured. Calibrated projections allow less: see
    `tune`.
    """
    method = "pop_uncalibrated"

    def kl_at(depth: int) -> float:
        rows = evaluate(
            model, texts, [depth], prompts=prompts, prompt_tokens=prompt_tokens,
            continuation_tokens=continuation_tokens, methods=[method],
        )  # fmt: skip
        return next(row.kl for row in rows if row.method == method)

    return importance.suggest_depth(model.spec.num_layers, max_kl, kl_at, model.boundary_tokens)
