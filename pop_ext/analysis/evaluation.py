"""Fidelity: how far the next-token distributions after a truncated prompt are from the full model's, and at what time.

POP is compared with what else makes a prompt cheaper without training: layers taken out of prefill and decode alike,
and prompts whose tokens the deep layers do not see at all. All run on the same prompts and continuations.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..runtime.device import synchronize
from ..runtime.generation import Model
from ..vision.spans import ImageSpan
from .baselines import SpeedBaseline, layer_similarity, without_layers

METHODS = ("full", "pop_uncalibrated", "pop_calibrated", "last_layers_removed", "shortgpt", "gromov", "speed")
RESAMPLES = 2000
TIMED_PROMPTS = 8


@dataclass
class Fidelity:
    """One method at one depth. KL divergences are from the full model, in nats a token, means over prompts."""

    method: str
    prefill_depth: int
    perplexity: float  # of the continuations
    kl: float
    kl_ci95: tuple[float, float]  # 95%, bootstrapped over prompts
    top1_agreement: float  # share of continuation tokens whose likeliest token is the full model's
    first_token_kl: float
    prefill_seconds: float  # of one prompt, the median
    exact_answers: float  # share of prompts after which every token of the continuation is the likeliest
    # of the difference in KL to the lowest at this depth, bootstrapped over the same prompts; (0, 0) for that itself
    excess_interval: tuple[float, float] = (0.0, 0.0)


def variants(model: Model, depths: list[int], methods: list[str], prompts: list[list[int]], visuals) -> list[tuple]:
    """(method, depth, model, prefill depth to run it at) of every comparison that makes sense; the first is `full`."""
    layers = model.spec.num_layers
    own = copy.copy(model)
    own.calibration = None
    if {"shortgpt", "gromov"} & set(methods):
        influence, angles = layer_similarity(own, prompts, visuals)
    found = [("full", layers, own, layers)]
    for depth in depths:
        skipped = layers - depth
        for method in methods:
            if method == "pop_uncalibrated":
                found.append((method, depth, own, depth))
            elif method == "pop_calibrated" and model.calibration is not None and depth in model.calibration.depths:
                found.append((method, depth, model, depth))
            elif method == "last_layers_removed":
                found.append((method, depth, without_layers(own, range(depth, layers)), depth))
            elif method == "shortgpt":
                found.append((method, depth, without_layers(own, influence.argsort()[:skipped].tolist()), depth))
            elif method == "gromov":
                first = int(angles.diagonal(skipped).argmin())
                found.append((method, depth, without_layers(own, range(first, first + skipped)), depth))
            elif method == "speed":
                found.append((method, depth, SpeedBaseline(own), depth))
    return found


@torch.no_grad()
def evaluate(
    model: Model,
    prompts: list[list[int]],
    continuations: list[list[int]],
    depths: list[int],
    methods: list[str] | tuple[str, ...] = METHODS,
    *,
    visuals: list[list[ImageSpan]] | None = None,
    seed: int = 0,
    progress=lambda done, total: None,
) -> list[Fidelity]:
    """Compares methods at prefill depths on the same prompts, visuals[i] the images of prompts[i], and continuations.

    `pop_calibrated` needs a calibration in the model; `full` is always the first row. Intervals are percentiles of
    2,000 paired bootstrap resamples of the prompts.
    """
    if not prompts or len(prompts) != len(continuations) or not all(continuations):
        raise ValueError("prompts and continuations must be as many, at least one, and none of them empty")
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"methods has {', '.join(sorted(unknown))}, expected some of {', '.join(METHODS)}")
    for depth in depths:
        if not 1 <= depth < model.spec.num_layers:
            raise ValueError(f"prefill_depth is {depth}, expected 1 to {model.spec.num_layers - 1}: {_what_full_is()}")
    visuals = visuals if visuals is not None else [[]] * len(prompts)
    runs = variants(model, depths, methods, prompts, visuals)
    timed = min(TIMED_PROMPTS, len(prompts))
    total, done = len(prompts) * len(runs) + timed + 1, 0
    # per run and prompt: KL of the first token, mean KL, mean negative log-likelihood, share of equal top tokens, and
    # whether every token of the continuation is the likeliest
    scores = np.zeros((len(runs), len(prompts), 5))
    for i, (prompt, continuation, images) in enumerate(zip(prompts, continuations, visuals, strict=True)):
        target, full = torch.tensor(continuation, device=model.device), None
        for run, (_, _, variant, depth) in enumerate(runs):
            depth = min(depth, variant.spec.num_layers)
            (logits,) = variant.logits([prompt], [continuation], visuals=[images], prefill_depth=depth)
            log_p = logits.log_softmax(-1)
            full = log_p if full is None else full
            kl = (full.exp() * (full - log_p)).sum(-1)
            top = log_p.argmax(-1)
            nll = -log_p.gather(1, target[:, None]).mean()
            agreement = (top == full.argmax(-1)).float().mean()
            scores[run, i] = [float(x) for x in (kl[0], kl.mean(), nll, agreement, (top == target).all())]
            done += 1
            progress(done, total)

    seconds = np.zeros((len(runs), timed + 1))
    for i in range(
        -1, timed
    ):  # the first is a warm-up; every prompt passes all methods, so that they share the machine
        for run, (_, _, variant, depth) in enumerate(runs):
            at = max(i, 0)
            seconds[run, i] = time_prefill(variant, prompts[at], visuals[at], min(depth, variant.spec.num_layers))
        done += 1
        progress(done, total)

    resamples = np.random.default_rng(seed).integers(len(prompts), size=(RESAMPLES, len(prompts)))
    results = []
    for run, (method, depth, _, _) in enumerate(runs):
        first, kl, nll, agreement, exact = scores[run].mean(0)
        # The nearest rival: the truncating method of lowest KL at this depth.
        rivals = [other for other in range(1, len(runs)) if runs[other][1] == depth]
        best = min(rivals, key=lambda other: scores[other, :, 1].mean(), default=run)
        results.append(
            Fidelity(
                method,
                depth,
                math.exp(min(nll, 700.0)),
                kl,
                interval(scores[run, :, 1], resamples),
                agreement,
                first,
                float(np.median(seconds[run, :timed])),
                exact,
                interval(scores[run, :, 1] - scores[best, :, 1], resamples),
            )
        )
    return results


def _what_full_is() -> str:
    return "the full model is always compared with"


def time_prefill(model: Model, prompt: list[int], images: list[ImageSpan], depth: int) -> float:
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
    return [asdict(result) for result in results]


def plot(results: list[Fidelity], path: str | Path, title: str) -> None:
    """KL against prefill time, both of a logarithmic scale, a curve per method; the format is the file name's."""
    from .plotting import figure, save

    fig, axes = figure()
    full = results[0].prefill_seconds
    for method in METHODS[1:]:
        rows = sorted((r for r in results if r.method == method), key=lambda r: r.prefill_depth)
        if rows:
            kl = np.array([r.kl for r in rows])
            error = np.abs(np.array([r.kl_ci95 for r in rows]).T - kl)
            times = [r.prefill_seconds / full for r in rows]
            axes.errorbar(times, kl, yerr=error, marker="o", capsize=3, label=method)
            for row, x in zip(rows, times, strict=True):
                axes.annotate(str(row.prefill_depth), (x, row.kl), xytext=(4, 4), textcoords="offset points", size=7)
    axes.set(yscale="log", xlabel="prefill time, of the full model's", ylabel="KL from the full model, nats a token")
    axes.set_title(title)
    axes.legend()
    save(fig, path)
