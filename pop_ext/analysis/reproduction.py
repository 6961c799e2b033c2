"""The paper's tables for a model (He et al., arXiv 2602.03295): scores of tasks where several shares of the layers are
skipped, for POP, what it is compared with and its ablation; speed; and how far what the layers compute drifts.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..checkpoints.calibration import Calibration
from ..runtime.device import peak_memory, reset_peak_memory, synchronize
from ..runtime.generation import Model
from .benchmarks import Task
from .evaluation import RESAMPLES, interval, variants
from .speed import processor_name
from .uses import use_pairs

METHODS = {
    "full": "the full model",
    "pop_paper": "POP as in the paper: own weights, one boundary token, no anchor",
    "pop_calibrated": "POP as it runs here: calibrated projections, one boundary token, one anchor",
    "shortgpt": "layers of least block influence removed from prefill and decode alike",
    "no_projection": "ablation: the paper's POP whose skipped layers hold nothing for truncated tokens, so that they "
    "see boundary and generated tokens only",
    "no_boundary": "ablation: the paper's POP without a boundary token",
}
TIMED = ("full", "pop_paper", "pop_calibrated", "shortgpt")
DRIFTING = ("pop_paper", "pop_calibrated")
BATCHES = (1, 8)
PROSE_PROMPTS, DRIFT_TOKENS = 4, 8  # and tokens decoded after each where drift is measured
SKIPPED = (20, 25, 33, 40, 50)  # per cent of the layers
Progress = Callable[..., None]


@dataclass(frozen=True)
class Run:
    """A method at a prefill depth: the model that runs it, and the depth to run that at (ShortGPT's has fewer layers,
    all of which run).
    """

    method: str
    prefill_depth: int
    model: Model
    depth: int


@dataclass
class Score:
    """A method at a depth, on the items of a task: the mean of their scores in [0, 1], its difference from the full
    model's, and the 95% bootstrap interval of that difference, paired by item.
    """

    method: str
    prefill_depth: int
    score: float
    difference: float
    difference_ci95: tuple[float, float]


@dataclass
class Speed:
    """A method at a depth and batch size. Medians over rounds in which all take turns; `speedup` is the full model's
    prefill time over this one's in the same round. peak_bytes: the most memory that the process (on a GPU: torch) held
    meanwhile, all methods' weights included; None where the system does not tell.
    """

    method: str
    prefill_depth: int
    batch: int
    prefill_seconds: float
    speedup: float
    decode_tokens_per_second: float
    peak_bytes: int | None


def depths_of(skipped: list[int], layers: int) -> list[int]:
    """The prefill depths that skip these shares (per cent) of `layers`, to the nearest layer, the deepest first."""
    depths = []
    for percent in skipped:
        depth = int(layers * (100 - percent) / 100 + 0.5)
        if not 1 <= depth < layers:
            raise ValueError(
                f"skipped is {percent} per cent, expected a share that leaves 1 to {layers - 1} of {layers} layers"
            )
        depths.append(depth)
    return sorted(set(depths), reverse=True)


def runs_of(model: Model, calibration: Calibration, depths: list[int], texts: list[list[int]]) -> list[Run]:
    """Every method at every depth; the first is the full model. texts: token ids that ShortGPT's choice is made on."""
    best, paper, unbounded = (copy.copy(model) for _ in range(3))
    best.calibration, best.boundary_tokens, best.anchor_tokens = calibration.to(model.device), 1, 1
    for base, boundary in ((paper, 1), (unbounded, 0)):
        base.calibration, base.boundary_tokens, base.anchor_tokens = None, boundary, 0
    families = (
        (best, {"pop_calibrated": "pop_calibrated", "shortgpt": "shortgpt"}),
        (paper, {"pop_uncalibrated": "pop_paper", "speed": "no_projection"}),
        (unbounded, {"pop_uncalibrated": "no_boundary"}),
    )
    layers = model.spec.num_layers
    runs = [Run("full", layers, paper, layers)]
    for base, names in families:
        for method, depth, variant, _ in variants(base, depths, list(names), texts, [[]] * len(texts))[1:]:
            if method == "speed":
                variant.cuda_graphs = False  # its attention reads lengths on the host
            runs.append(Run(names[method], depth, variant, min(depth, variant.spec.num_layers)))
    return sorted(runs, key=lambda run: list(METHODS).index(run.method))


@torch.no_grad()
def scores(runs: list[Run], task: Task, seed: int, progress: Progress) -> list[Score]:
    """A row for each run."""
    found = np.zeros((len(task.items), len(runs)))
    for i, item in enumerate(task.items):
        found[i] = [item.score(run.model, run.depth) for run in runs]
        progress(i + 1, len(task.items), task.name)
    resamples = np.random.default_rng(seed).integers(len(found), size=(RESAMPLES, len(found)))
    rows = []
    for number, run in enumerate(runs):
        difference = found[:, number] - found[:, 0]
        rows.append(
            Score(
                run.method,
                run.prefill_depth,
                float(found[:, number].mean()),
                float(difference.mean()),
                interval(difference, resamples),
            )
        )
    return rows


@torch.no_grad()
def speeds(
    runs: list[Run],
    prompt_tokens: int,
    decode_tokens: int,
    rounds: int,
    seed: int,
    progress: Progress,
) -> list[Speed]:
    """Times of random prompts in batches, prefilled and then decoded greedily; one round before the first is not
    counted.
    """
    timed = [(run, batch) for batch in BATCHES for run in runs if run.method in TIMED]
    generator, figures = torch.Generator().manual_seed(seed), np.zeros((rounds, len(timed), 2))
    peaks: list[Any] = [0] * len(timed)
    for number in range(-1, rounds):
        for at, (run, batch) in enumerate(timed):
            vocabulary = run.model.spec.vocab_size
            prompts = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).tolist()
            *seconds, peak = _time(run, prompts, decode_tokens)
            if number >= 0:
                figures[number, at] = seconds
                peaks[at] = peak if peak is None else max(peaks[at], peak)
            progress((number + 1) * len(timed) + at + 1, (rounds + 1) * len(timed), "speed")
    rows = []
    for at, (run, batch) in enumerate(timed):
        full = next(i for i, (other, size) in enumerate(timed) if size == batch)
        prefill, decode = np.median(figures[:, at], 0).tolist()
        speedup = statistics.median((figures[:, full, 0] / figures[:, at, 0]).tolist())
        rate = batch * decode_tokens / decode
        rows.append(Speed(run.method, run.prefill_depth, batch, prefill, speedup, rate, peaks[at]))
    return rows


def _time(run: Run, prompts: list[list[int]], decode_tokens: int) -> tuple[float, float, int | None]:
    """Seconds of prefill and of decode, and the peak of memory in bytes."""
    model, sequences = run.model, [run.model.new_sequence() for _ in prompts]
    try:
        reset_peak_memory(model.device)
        start = time.perf_counter()
        logits, _ = model.prefill(sequences, prompts, prefill_depth=run.depth)
        synchronize(model.device)
        middle = time.perf_counter()
        for _ in range(decode_tokens):
            logits = model.decode(sequences, logits.argmax(-1).tolist())
        synchronize(model.device)
        return middle - start, time.perf_counter() - middle, peak_memory(model.device)
    finally:
        for sequence in sequences:
            sequence.close()


# Drift


class _Watched(Model):
    """`model`, whose layers keep what comes in and what attention gives of the last forward pass."""

    def __init__(self, model: Model):
        self.__dict__.update(vars(model))
        self.inputs: dict[int, Tensor] = {}
        self.attended: dict[int, Tensor] = {}

    def layer(self, index: int, hidden: Tensor, *rest) -> Tensor:
        self.inputs[index] = hidden.float()
        return super().layer(index, hidden, *rest)

    def attention(self, index: int, query: Tensor, *rest) -> Tensor:
        output = super().attention(index, query, *rest)
        self.attended[index] = output.flatten(1).float()
        return output


@torch.no_grad()
def drift(
    runs: list[Run], prompts: list[list[int]], continuations: list[list[int]], progress: Progress
) -> list[dict[str, Any]]:
    """Of POP's runs at one depth, for each layer the mean cosine distance from the full model's: of the hidden state
    before the layer and of the values it holds, for truncated tokens; and of the hidden state and of what attention
    gives, for generated ones. Arrays of L entries by name.
    """
    full, *rest = [run for run in runs if run.method in ("full", *DRIFTING)]
    sums: list[Any] = [0.0] * len(rest)
    for number, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
        expected = _states(full, prompt, continuation)
        for i, run in enumerate(rest):
            found = _states(run, prompt, continuation)
            pairs = zip(found, expected, strict=True)
            distances = [(1 - cosine_similarity(a, b, dim=-1)).mean(-1) for a, b in pairs]
            sums[i] = sums[i] + torch.stack(distances).clamp_min(0)  # rounding
        progress(number + 1, len(prompts), "drift")
    names = ("prompt_hidden", "prompt_values", "answer_hidden", "answer_attention")
    return [
        {"method": run.method, "prefill_depth": run.prefill_depth}
        | dict(zip(names, (total / len(prompts)).tolist(), strict=True))
        for run, total in zip(rest, sums, strict=True)
    ]


def _states(run: Run, prompt: list[int], continuation: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[L, tokens, ...] float32 of a prompt's tokens but the first and the last, hidden states and values; and of the
    continuation's, hidden states and what attention gives.
    """
    model, layers = _Watched(run.model), run.model.spec.num_layers
    tokens, answers = slice(1, len(prompt) - 1), []
    hidden = torch.stack([h.float() for h in model.hidden_states([prompt])][:layers])[:, tokens]
    if run.depth < layers:
        hidden[run.depth :] = hidden[run.depth].clone()
    with model.new_sequence() as sequence:
        model.prefill([sequence], [prompt], prefill_depth=run.depth)
        values = model.cache.values[:, sequence.blocks].flatten(1, 2)[:, tokens].flatten(2).float()
        for token in continuation:
            model.decode([sequence], [token])
            answers.append([torch.stack([kept[i] for i in range(layers)]) for kept in (model.inputs, model.attended)])
    inputs, attended = (torch.cat(parts, 1) for parts in zip(*answers, strict=True))
    return hidden, values, inputs, attended


def reproduce(
    model: Model,
    calibration: Calibration,
    depths: list[int],
    tasks: list[Task],
    *,
    timed_tokens: int,
    decode_tokens: int,
    rounds: int,
    prompt_tokens: int,
    seed: int = 0,
    progress: Progress = lambda done, total, note="": None,
) -> dict[str, Any]:
    """All tables, as an object for JSON. timed_tokens, decode_tokens, rounds: what speed is measured on (`speeds`).

    ShortGPT's layers are chosen, and drift is measured at the middle one of `depths`, on prose of `prompt_tokens`.
    """
    prompts, continuations = use_pairs("prose", model, PROSE_PROMPTS, prompt_tokens, seed)
    runs, layers = runs_of(model, calibration, depths, prompts), model.spec.num_layers
    middle = depths[len(depths) // 2]
    drifting = [run for run in runs if run.method == "full" or run.prefill_depth == middle]
    return {
        "layers": layers,
        "prefill_depths": depths,
        "methods": METHODS,
        "tasks": [
            {
                "name": task.name,
                "measure": task.measure,
                "items": len(task.items),
                "scores": [asdict(row) for row in scores(runs, task, seed, progress)],
            }
            for task in tasks
        ],
        "machine": processor_name(model),
        "speed_prompt_tokens": timed_tokens,
        "speed": [asdict(row) for row in speeds(runs, timed_tokens, decode_tokens, rounds, seed, progress)],
        "drift": drift(drifting, prompts, [rest[:DRIFT_TOKENS] for rest in continuations], progress),
    }
