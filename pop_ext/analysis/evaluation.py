"""Fidelity: how far the next-token distributions after a truncated prompt are from the full model's, and at what time.

POP is compared with what else makes a prompt cheaper without training: layers taken out of prefill and decode alike,
and prompts whose tokens the deep layers do not see at all. All run on the same prompts and continuations.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..runtime.device import synchronize
from ..runtime.generation import Model
from ..vision.spans import ImageSpan
from .baselines import SpeedBaseline, layer_similarity, without_layers

DEFAULT_METHODS = ("full", "pop_uncalibrated", "pop_calibrated")
BASELINES = ("last_layers_removed", "shortgpt", "gromov", "speed")
METHODS = (*DEFAULT_METHODS, *BASELINES)
NAMES = {  # for people
    "full": "full model",
    "pop_uncalibrated": "own weights",
    "pop_calibrated": "calibrated",
    "last_layers_removed": "last layers removed",
    "shortgpt": "ShortGPT",
    "gromov": "Gromov",
    "speed": "SPEED, untrained",
}
RESAMPLES = 2000
ROUNDS = 11  # of timed prefills: in each, every method has its turn
ROUND_SECONDS = 0.05  # that a turn takes at least, by repetition


@dataclass
class Fidelity:
    """One method at one depth. KL divergences are from the full model, in nats a token, means over prompts."""

    method: str
    prefill_depth: int
    perplexity: float  # of the continuations
    kl: float
    kl_ci95: tuple[float, float]  # 95%, bootstrapped over prompts
    top1_agreement: float  # share of continuation tokens whose likeliest token is the full model's
    top1_ci95: tuple[float, float]
    first_token_kl: float
    prefill_seconds: float  # of one prompt, the median; NaN where it was not timed
    speedup: float  # the full model's time over this one's in the same round, the median
    speedup_quartiles: tuple[float, float]  # over rounds
    exact_answers: float  # share of prompts after which every token of the continuation is the likeliest
    # of the difference in KL to the lowest at this depth, bootstrapped over the same prompts; (0, 0) for that itself
    excess_interval: tuple[float, float] = (0.0, 0.0)
    deep_tokens: float = 0.0  # share of the truncated tokens that ran through all layers
    prefill_plan: bool = False  # by the model's prefill plan, whose depth prefill_depth is


def variants(
    model: Model,
    depths: list[int],
    methods: list[str] | tuple[str, ...],
    prompts: list[list[int]],
    visuals,
    deep_tokens: Sequence[float] = (0.0,),
) -> list[tuple]:
    """(method, depth, model, prefill depth to run it at) of every comparison that makes sense, POP's with each share of
    deep tokens; the first is `full`, the last the model's plan if it has one, which runs at no depth (None).
    """
    layers, plan, model = model.spec.num_layers, model.prefill_plan, copy.copy(model)
    model.prefill_plan = None
    own = copy.copy(model)
    own.calibration = None
    if {"shortgpt", "gromov"} & set(methods):
        influence, angles = layer_similarity(own, prompts, visuals)
    found: list[tuple] = [("full", layers, own, layers)]
    for depth in depths:
        skipped = layers - depth
        for method in methods:
            if method == "pop_uncalibrated":
                found += [(method, depth, with_deep_tokens(own, share), depth) for share in deep_tokens]
            elif method == "pop_calibrated" and model.calibration is not None and depth in model.calibration.depths:
                found += [(method, depth, with_deep_tokens(model, share), depth) for share in deep_tokens]
            elif method == "last_layers_removed":
                found.append((method, depth, without_layers(own, range(depth, layers)), depth))
            elif method == "shortgpt":
                found.append((method, depth, without_layers(own, influence.argsort()[:skipped].tolist()), depth))
            elif method == "gromov":
                first = int(angles.diagonal(skipped).argmin())
                found.append((method, depth, without_layers(own, range(first, first + skipped)), depth))
            elif method == "speed":
                found.append((method, depth, SpeedBaseline(own), depth))
    held = [] if model.calibration is None else model.calibration.depths
    for method, base in (("pop_uncalibrated", own), ("pop_calibrated", model)):
        if plan is not None and method in methods and (base is own or plan.depth in held):
            variant = copy.copy(base)
            variant.prefill_plan = plan
            found.append((method, plan.depth, variant, None))
    return found


def with_deep_tokens(model: Model, share: float) -> Model:
    """The model with another share of deep tokens."""
    variant = copy.copy(model)
    variant.deep_tokens = share
    variant.check_settings()
    return variant


@torch.no_grad()
def evaluate(
    model: Model,
    prompts: list[list[int]],
    continuations: list[list[int]],
    depths: list[int],
    methods: list[str] | tuple[str, ...] = METHODS,
    *,
    visuals: list[list[ImageSpan]] | None = None,
    deep_tokens: Sequence[float] = (0.0,),
    seed: int = 0,
    progress=lambda done, total: None,
) -> list[Fidelity]:
    """Compares methods at prefill depths on the same prompts, visuals[i] the images of prompts[i], and continuations.
    POP's have a row for each share in `deep_tokens`.

    `pop_calibrated` needs a calibration in the model; `full` is always the first row. Intervals are percentiles of
    2,000 paired bootstrap resamples of the prompts. Times are of rounds in which every method has its turn.
    """
    if not prompts or len(prompts) != len(continuations) or not all(continuations):
        raise ValueError(
            f"prompts has {len(prompts)} and continuations {len(continuations)} entries, expected as many of both, at "
            "least one, and no empty continuation"
        )
    check_methods(methods)
    for depth in depths:
        if not 1 <= depth < model.spec.num_layers:
            raise ValueError(
                f"prefill_depth is {depth}, expected 1 to {model.spec.num_layers - 1}: the full model is always "
                "compared with"
            )
    visuals = visuals if visuals is not None else [[]] * len(prompts)
    runs = variants(model, depths, methods, prompts, visuals, deep_tokens)
    total = len(prompts) + ROUNDS + 1
    scores = np.zeros((len(prompts), len(runs), 5))
    for i, sample in enumerate(zip(prompts, continuations, visuals, strict=True)):
        scores[i] = score(runs, *sample)
        progress(i + 1, total)
    seconds = time_rounds(
        runs, prompts, visuals, progress=lambda done, rounds: progress(len(prompts) + done, len(prompts) + rounds)
    )
    return summarise(runs, scores, seconds, seed)


def check_methods(methods) -> None:
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"methods has {', '.join(sorted(unknown))}, expected some of {', '.join(METHODS)}")


@torch.no_grad()
def score(runs: list[tuple], prompt: list[int], continuation: list[int], images: list[ImageSpan]) -> np.ndarray:
    """Of every run (`variants`, the full model first) on one prompt, [runs, 5]: KL of the first token, mean KL, mean
    negative log-likelihood, share of equal top tokens, and whether every token of the continuation is the likeliest.
    """
    scores, full = np.zeros((len(runs), 5)), None
    for run, (_, _, variant, depth) in enumerate(runs):
        depth = None if depth is None else min(depth, variant.spec.num_layers)
        (logits,) = variant.logits([prompt], [continuation], visuals=[images], prefill_depth=depth)
        target = torch.tensor(continuation, device=logits.device)
        log_p = logits.log_softmax(-1)
        full = log_p if full is None else full
        kl = (full.exp() * (full - log_p)).sum(-1)
        top = log_p.argmax(-1)
        nll = -log_p.gather(1, target[:, None]).mean()
        agreement = (top == full.argmax(-1)).float().mean()
        scores[run] = [float(x) for x in (kl[0], kl.mean(), nll, agreement, (top == target).all())]
    return scores


def time_rounds(runs: list[tuple], prompts, visuals, *, progress=lambda done, total: None) -> np.ndarray:
    """Seconds of one prefill by each run, [ROUNDS, runs]: in round i all runs take prompt i in turn, so that they share
    what the machine does besides. Short prefills are repeated until a turn is long enough to be timed.
    """
    seconds, repeats = np.zeros((ROUNDS, len(runs))), 1
    for i in range(-1, ROUNDS):  # the first is a warm-up, and says how often to repeat
        at = max(i, 0) % len(prompts)
        for run, (_, _, variant, depth) in enumerate(runs):
            depth = None if depth is None else min(depth, variant.spec.num_layers)
            arguments = variant, prompts[at], visuals[at], depth
            seconds[i, run] = sum(time_prefill(*arguments) for _ in range(repeats)) / repeats
        if i < 0:
            repeats = max(1, math.ceil(ROUND_SECONDS / seconds[i].min()))
        progress(i + 2, ROUNDS + 1)
    return seconds


def summarise(runs: list[tuple], scores: np.ndarray, seconds: np.ndarray, seed: int) -> list[Fidelity]:
    """A row for each run, from `score` of every prompt, [prompts, runs, 5], and `time_rounds`, [rounds, runs]."""
    resamples = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, len(scores)))
    kls, results = scores[:, :, 1], []
    for run, (method, depth, variant, run_at) in enumerate(runs):
        first, kl, nll, agreement, exact = scores[:, run].mean(0).tolist()
        # The nearest rival: the truncating method of lowest KL at this depth.
        rivals = [other for other in range(1, len(runs)) if runs[other][1] == depth]
        best = min(rivals, key=lambda other: kls[:, other].mean(), default=run)
        ratios = seconds[:, 0] / seconds[:, run]
        low, middle, high = np.percentile(ratios, [25, 50, 75]).tolist()
        results.append(
            Fidelity(
                method=method,
                prefill_depth=depth,
                perplexity=math.exp(min(nll, 700.0)),
                kl=kl,
                kl_ci95=interval(kls[:, run], resamples),
                top1_agreement=agreement,
                top1_ci95=interval(scores[:, run, 3], resamples),
                first_token_kl=first,
                prefill_seconds=float(np.median(seconds[:, run])),
                speedup=middle,
                speedup_quartiles=(low, high),
                exact_answers=exact,
                excess_interval=interval(kls[:, run] - kls[:, best], resamples),
                deep_tokens=float(variant.deep_tokens) if method.startswith("pop_") else 0.0,
                prefill_plan=run_at is None,
            )
        )
    return results


def time_prefill(model: Model, prompt: list[int], images: list[ImageSpan], depth: int | None) -> float:
    """Seconds of one prompt's prefill, in a conversation of its own that is forgotten."""
    sequence = model.new_sequence()
    try:
        start = time.perf_counter()
        model.prefill([sequence], [prompt], visuals=[images], prefill_depth=depth)
        synchronize(model.device)
        return time.perf_counter() - start
    finally:
        model.free(sequence)


def interval(values: np.ndarray, resamples: np.ndarray) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of `values` [n]; resamples [R, n] are indices into it."""
    low, high = np.percentile(values[resamples].mean(1), [2.5, 97.5])
    return float(low), float(high)


def to_json(results: list[Fidelity]) -> list[dict]:
    """Objects by the fields' names; None for what was not measured."""
    rows = [asdict(result) for result in results]
    for row in rows:
        for name in ("prefill_seconds", "speedup"):
            row[name] = None if math.isnan(row[name]) else row[name]
        row["speedup_quartiles"] = None if row["speedup"] is None else row["speedup_quartiles"]
    return rows


def plot(results: list[Fidelity], path: str | Path, title: str, recommended: int | None = None) -> None:
    """KL against speed-up, both with their spread, a colour per method, and a line at full depth; a ring at the depth
    that is recommended. The format is the file name's.
    """
    from .plotting import figure, save

    fig, axes = figure()
    layers = results[0].prefill_depth
    axes.axvline(1.0, color="0.5", linestyle="--", label="full depth")
    for method in METHODS[1:]:
        timed = [r for r in results if r.method == method and not math.isnan(r.speedup)]
        rows = sorted(timed, key=lambda r: r.prefill_depth)
        if not rows:
            continue
        kl, speedup = np.array([r.kl for r in rows]), np.array([r.speedup for r in rows])
        errors = {
            "yerr": np.abs(np.array([r.kl_ci95 for r in rows]).T - kl),
            "xerr": np.abs(np.array([r.speedup_quartiles for r in rows]).T - speedup),
        }
        line = "-" if len(rows) > 2 else "none"
        axes.errorbar(speedup, kl, **errors, marker="o", capsize=3, linestyle=line, label=NAMES[method])
        for row in rows:
            axes.annotate(
                f"{row.prefill_depth} of {layers}", (row.speedup, row.kl), xytext=(5, 5), textcoords="offset points",
                size=7,
            )  # fmt: skip
            if row.prefill_depth == recommended and method == "pop_calibrated":
                axes.plot(row.speedup, row.kl, "o", markersize=16, fillstyle="none", color="0.2", label="recommended")
    if all(r.kl > 0 for r in results[1:]):
        axes.set_yscale("log")
    axes.set(xlabel="prefill speed-up, full depth = 1", ylabel="KL from the full model, nats a token", title=title)
    axes.margins(x=0.12)
    axes.legend()
    save(fig, path)
