"""Which prefill depth is safe for a model on given text, with calibrated projections, and what it gains.

The data is split. One pass over the first part calibrates all candidate depths; the other part, held out, measures own
and calibrated projections against the full model; prefill is timed at full depth and at each candidate in turn. Of the
candidates that keep within the limit, the shallowest is recommended, and checked for uses that the data may not have.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoints.calibration import FORMAT, Calibration, CalibrationError
from ..runtime.generation import Model
from . import calibration as calibrations
from . import evaluation, uses, verification
from .evaluation import Fidelity
from .normal_equations import UnfinishedPass
from .samples import Pairs

SHARES = (0.4, 0.5, 0.6, 0.67, 0.75, 0.87)  # of the layers: the candidates where none are given
PROMPT_TOKENS = 512  # of running text, which has no prompts of its own
VERIFIED = 8  # prompts of each use that the recommended depth is checked on
MAX_KL = 0.05
SAVE_SECONDS = 20  # between states of the work file
METHODS = ("pop_uncalibrated", "pop_calibrated")
Progress = Callable[..., None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Goal:
    """What the recommended depth must keep within; `kind` is max_kl, min_top1 or speedup."""

    kind: str = "max_kl"
    value: float = MAX_KL

    @classmethod
    def of(cls, max_kl: float | None = None, min_top1: float | None = None, speedup: float | None = None) -> Goal:
        """The one that is given; ValueError for several, or a value that no depth can have."""
        given = {"max_kl": max_kl, "min_top1": min_top1, "speedup": speedup}
        given = {kind: value for kind, value in given.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, expected one of them")
        for kind, value in given.items():
            low, high = {"max_kl": (0, math.inf), "min_top1": (0, 1), "speedup": (1, math.inf)}[kind]
            if not low < value <= high or value == math.inf:
                raise ValueError(f"{kind} is {value}, expected more than {low}{', at most 1' * (high == 1)}")
            return cls(kind, value)
        return cls()

    def choose(self, rows: list[Fidelity]) -> int | None:
        """The shallowest depth whose 95% interval keeps within the limit; for a speed-up, the deepest that has it in
        the median. None if there is none.
        """
        fits = {
            "max_kl": lambda row: row.kl_ci95[1] <= self.value,
            "min_top1": lambda row: row.top1_ci95[0] >= self.value,
            "speedup": lambda row: row.speedup >= self.value,
        }[self.kind]
        depths = [row.prefill_depth for row in rows if row.method == "pop_calibrated" and fits(row)]
        return (max if self.kind == "speedup" else min)(depths, default=None)

    def __str__(self) -> str:
        return {
            "max_kl": f"a KL of at most {self.value:g} nats a token (the upper end of its 95% interval)",
            "min_top1": f"the same likeliest token at {self.value:.0%} or more (the lower end of the 95% interval)",
            "speedup": f"a speed-up of {self.value:g} or more",
        }[self.kind]


@dataclass
class Tuning:
    """What `tune` found. rows: the full model, then own and calibrated projections at each candidate depth."""

    calibration: Calibration
    rows: list[Fidelity]
    goal: Goal
    prompts: int  # held out
    prompt_tokens: int  # of a prompt, the median
    continued: bool = False  # from the work file of a run that was interrupted
    verification: verification.Verification | None = None  # of the recommended depth

    @property
    def recommended(self) -> int | None:
        """The recommended prefill depth in layers; None if no candidate reaches the goal."""
        return self.calibration.recommended

    def row(self, depth: int, method: str = "pop_calibrated") -> Fidelity:
        return next(row for row in self.rows if (row.prefill_depth, row.method) == (depth, method))

    def sentences(self) -> list[str]:
        """What was found, in words."""
        if self.recommended is None:
            return self._nothing_found()
        full, row, own = self.rows[0], self.row(self.recommended), self.row(self.recommended, "pop_uncalibrated")
        low, high = row.kl_ci95
        spread = (row.speedup_quartiles[1] - row.speedup_quartiles[0]) / 2
        found = [
            f"Recommended: prefill depth {row.prefill_depth} of {full.prefill_depth} layers, with calibrated "
            f"projections. It reaches {self.goal}.",
            f"Speed: prefill of {self.prompt_tokens} tokens is {row.speedup:.2f} ± {spread:.2f} times as fast as at "
            f"full depth ({full.prefill_seconds:.3f} s) on this machine.",
            f"Quality: the KL divergence from the full model is {row.kl:.4f} nats a token (95% interval {low:.4f} to "
            f"{high:.4f}; {own.kl:.4f} with own weights), and the likeliest next token is the full model's at "
            f"{row.top1_agreement:.1%} of all tokens.",
            f"That means: a token that the full model would write keeps {math.exp(-row.kl):.0%} of its probability on "
            "average. It holds for text like this; other text, longer prompts and tasks that copy from the prompt lose "
            "more.",
        ]
        if row.speedup_quartiles[0] < 1.05:
            found.append("There is little to gain at this prompt length: POP speeds up long prompts.")
        if self.verification is not None:
            found.append(f"Uses, by {VERIFIED} prompts of each, which is a rough check (`pop verify` takes more):")
            found += self.verification.sentences()
        return found

    def _nothing_found(self) -> list[str]:
        rows = [self.row(depth) for depth in self.calibration.depths]
        closest = max(rows, key=lambda r: r.speedup) if self.goal.kind == "speedup" else min(rows, key=lambda r: r.kl)
        return [
            f"No candidate reaches {self.goal}. Closest is prefill depth {closest.prefill_depth} of "
            f"{self.rows[0].prefill_depth} layers: KL {closest.kl:.4f} nats a token, the likeliest next token the full "
            f"model's at {closest.top1_agreement:.1%} of all tokens, prefill {closest.speedup:.2f} times as fast.",
            "Stay at full depth, allow more, calibrate on more text, or try other candidates with prefill_depth.",
        ]

    def to_json(self) -> dict:
        return {
            "recommended": self.recommended,
            "goal": {self.goal.kind: self.goal.value},
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "continued": self.continued,
            "verification": None if self.verification is None else self.verification.to_json(),
            "calibration_tokens": self.calibration.provenance["tokens"],
            "rows": evaluation.to_json(self.rows),
        }

    def __repr__(self) -> str:
        what = f"prefill depth {self.recommended}" if self.recommended else "no depth"
        return f"<Tuning: {what} recommended for {self.goal}, of {self.calibration.depths}>"


def candidates(layers: int) -> list[int]:
    """Depths worth trying where none are given; the last layer's input loses nothing, and gains nothing either."""
    return sorted({min(max(1, int(share * layers + 0.5)), max(1, layers - 2)) for share in SHARES})


def tune(
    model: Model,
    fit: Pairs,
    held_out: Pairs,
    depths: Sequence[int],
    goal: Goal,
    *,
    rank: int | None = None,
    seed: int = 0,
    verify: bool = True,
    output: str | Path | None = None,
    progress: Progress = lambda done, total, note="": None,
) -> Tuning:
    """Calibrates `depths` on `fit`, measures them on `held_out`, recommends one by `goal`, and checks what that is safe
    for. With `output` the calibration is written there, and a run that was interrupted goes on where it was: the file
    `output` + ".tuning" keeps its state, and is gone when all is done.
    """
    depths = sorted(set(depths))
    start = time.perf_counter()
    rounds = (len(depths) + 1) * (evaluation.ROUNDS + 1)
    # in passes over a window or a prompt, which take about as long
    work = {"calibrate": len(fit), "evaluate": len(held_out) * (2 * len(depths) + 1), "time": rounds}
    verify = verify and model.spec.max_position_embeddings >= verification.PROMPT_TOKENS + uses.CONTINUATION
    work["verify"] = 2 * VERIFIED * len(uses.USES) if verify else 0
    total, at = sum(work.values()), f"depths {', '.join(map(str, depths))}"
    key = _key(model, fit, held_out, depths, rank, seed)
    state = _State.load(output, key, model)
    continued = state is not None
    if state is None:
        unfinished = None if output is None else UnfinishedPass(Path(f"{output}.tuning"), key)
        result = calibrations.calibrate(
            model, fit.windows, depths, rank=rank, visuals=fit.visuals, unfinished=unfinished,
            progress=lambda done, _, note="": progress(done, total, note or f"calibrating {at}"),
        )  # fmt: skip
        continued = unfinished is not None and unfinished.continued
        result.provenance["seconds"] = time.perf_counter() - start
        state = _State(result, [], key, output)
        state.save()
    variant = copy.copy(model)
    variant.calibration, variant.prefill_plan = state.calibration.to(model.device), None
    visuals = held_out.visuals or [[]] * len(held_out)
    runs = evaluation.variants(variant, depths, list(METHODS), held_out.prompts, visuals)
    samples = list(zip(held_out.prompts, held_out.continuations, visuals, strict=True))
    try:
        for i in range(len(state.scores), len(samples)):
            state.scores.append(evaluation.score(runs, *samples[i]).tolist())
            done = work["calibrate"] + len(state.scores) * len(runs)
            progress(done, total, f"evaluating {at}")
            state.save_now_and_then()
    finally:
        state.save()
    before = work["calibrate"] + work["evaluate"]
    seconds = _seconds(runs, held_out, visuals, lambda done: progress(before + done, total, f"timing {at}"))
    rows = evaluation.summarise(runs, np.array(state.scores), seconds, seed)
    calibration = state.calibration
    calibration.provenance |= {
        "recommended": goal.choose(rows),
        "boundary_tokens": model.boundary_tokens,
        "anchor_tokens": model.anchor_tokens,
    }
    result = Tuning(calibration, rows, goal, len(held_out), held_out.prompt_tokens, continued)
    if verify and result.recommended is not None:
        variant.calibration = calibration.to(model.device)
        result.verification = verification.verify(
            variant, prefill_depth=result.recommended, prompts=VERIFIED, seed=seed,
            progress=lambda done, _, use="": progress(before + rounds + 2 * done, total, f"verifying {use}"),
        )  # fmt: skip
    progress(total, total, "done")
    calibration.provenance["tuning"] = result.to_json()
    if output is not None:
        calibration.save(output)
        state.path.unlink(missing_ok=True)
    return result


def _seconds(runs: list[tuple], held_out: Pairs, visuals, report: Callable[[int], None]) -> np.ndarray:
    """Times of all runs, [rounds, runs], on the prompts nearest to the median length. Own weights take what calibrated
    ones do, but for the features of the token before: they are not timed.
    """
    middle, prompts = held_out.prompt_tokens, held_out.prompts
    nearest = sorted(range(len(prompts)), key=lambda i: abs(len(prompts[i]) - middle))[: evaluation.ROUNDS]
    timed = [run for run, (method, *_) in enumerate(runs) if method != "pop_uncalibrated"]
    found = evaluation.time_rounds(
        [runs[run] for run in timed], [prompts[i] for i in nearest], [visuals[i] for i in nearest],
        progress=lambda done, _: report(done * len(timed)),
    )  # fmt: skip
    seconds = np.full((len(found), len(runs)), math.nan)
    seconds[:, timed] = found
    return seconds


def _key(model: Model, fit: Pairs, held_out: Pairs, depths, rank, seed) -> str:
    """Of all that a state hangs on."""
    batches = (model.max_cache_tokens, calibrations.BATCH)
    settings = (model.boundary_tokens, model.anchor_tokens, str(model.dtype), depths, rank, seed, batches, FORMAT)
    data = (fit.windows, held_out.prompts, held_out.continuations)
    images = [[v.start, v.end, v.digest()] for p in (fit, held_out) for s in p.visuals or [] for v in s]
    return hashlib.sha256(repr((model.fingerprint(), settings, data, images)).encode()).hexdigest()


@dataclass
class _State:
    """What an interrupted run goes on from: a calibration whose provenance has the scores of the prompts so far."""

    calibration: Calibration
    scores: list[list[list[float]]]
    key: str
    output: str | Path | None
    saved: float = 0.0

    @property
    def path(self) -> Path:
        return Path(f"{self.output}.tuning")

    def save(self) -> None:
        if self.output is not None:
            provenance = self.calibration.provenance | {"state": {"key": self.key, "scores": self.scores}}
            Calibration(self.calibration.projections, self.calibration.features, provenance).save(self.path)
        self.saved = time.perf_counter()

    def save_now_and_then(self) -> None:
        if time.perf_counter() - self.saved > SAVE_SECONDS:
            self.save()

    @classmethod
    def load(cls, output: str | Path | None, key: str, model: Model) -> _State | None:
        """The state of an interrupted run of the same `key`; None where there is none, or of another run."""
        if output is None or not Path(f"{output}.tuning").is_file() or UnfinishedPass.is_at(Path(f"{output}.tuning")):
            return None
        try:
            calibration = Calibration.load(f"{output}.tuning", model.spec, model.dtype)
            state = calibration.provenance.pop("state")
        except (CalibrationError, KeyError) as error:
            logger.warning("%s.tuning cannot be gone on from, so all is done anew: %s", output, error)
            return None
        if state["key"] != key:
            logger.info("%s.tuning is of another run, so all is done anew", output)
            return None
        return cls(calibration, state["scores"], key, output, time.perf_counter())
