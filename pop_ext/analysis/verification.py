"""`pop verify`: what a truncated model is safe for, by checks that ship with the package.

Six uses: chat, prose, code, maths, retrieval and copying. Texts are Python's own (its help, its library's sources) or
written here. Each use compares the truncated model with the full one of the same checkpoint, on the same prompts and
continuations:

    chat, prose, code, maths    the upper end of the KL's 95% interval is at most MAX_KL nats a token
    retrieval, copying          of the answers that the full model gets right, MIN_KEPT or more stay right; where it
                                gets fewer than LEAST_RIGHT right there is nothing to keep, and the KL decides

The verdict is "safe" where all uses pass, "partly safe" where some do, else "not safe".
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..runtime.generation import Model
from .evaluation import RESAMPLES, interval, score
from .uses import USES, use_pairs

PROMPT_TOKENS = 256
MAX_KL = 0.1  # nats a token
MIN_KEPT = {"retrieval": 0.95, "copying": 0.8}
LEAST_RIGHT = 4  # answers
VERDICTS = ("safe", "partly safe", "not safe")  # by exit code


@dataclass
class Check:
    """One use. KL divergences are from the full model, in nats a token, means over prompts."""

    use: str
    prompts: int
    kl: float
    kl_ci95: tuple[float, float]  # 95%, bootstrapped over prompts
    top1_agreement: float  # share of continuation tokens whose likeliest token is the full model's
    full_right: int | None  # retrieval and copying: answers that the full model gets right
    kept: int | None  # how many of these the truncated one does
    safe: bool

    @property
    def counts(self) -> bool:
        """Whether right answers decide, and not the KL."""
        return self.full_right is not None and self.full_right >= LEAST_RIGHT

    @property
    def reason(self) -> str:
        """Why it passed or failed, in words."""
        if self.counts:
            share = (self.kept or 0) / (self.full_right or 1)
            return f"{self.kept} of {self.full_right} right answers kept ({share:.0%}), {MIN_KEPT[self.use]:.0%} needed"
        limit = f"KL at most {self.kl_ci95[1]:.3f} by its 95% interval, {MAX_KL:g} allowed"
        if self.full_right is None:
            return limit
        return f"{limit}; the full model gets {self.full_right} of {self.prompts} right, too few to count"


@dataclass
class Verification:
    """What `verify` found. problem: what is wrong with the calibration itself; nothing is safe with it then."""

    prefill_depth: int
    layers: int
    calibrated: bool
    deep_tokens: float
    checks: list[Check]
    problem: str | None = None
    prefill_plan: bool = False  # by a plan, whose depth prefill_depth is

    @property
    def safe_uses(self) -> list[str]:
        return [check.use for check in self.checks if check.safe and not self.problem]

    @property
    def exit_code(self) -> int:
        """0 safe, 1 safe for some uses, 2 not safe."""
        return 2 if not self.safe_uses else int(len(self.safe_uses) < len(self.checks))

    @property
    def verdict(self) -> str:
        return VERDICTS[self.exit_code]

    def sentences(self) -> list[str]:
        """The answer, in words."""
        depth = f"prefill depth {self.prefill_depth} of {self.layers}{' by the plan' if self.prefill_plan else ''}"
        if self.problem:
            return [f"Not safe: {self.problem}."]
        lost = [check for check in self.checks if not check.safe]
        reasons = [f"{check.use}: {check.reason}." for check in lost]
        if not lost:
            return [f"Safe: {depth} passes all {len(self.checks)} checks."]
        if not self.safe_uses:
            return [f"Not safe: {depth} passes none of {len(self.checks)} checks.", *reasons]
        uses = ", ".join(check.use for check in lost)
        return [f"Safe for {', '.join(self.safe_uses)} only: {depth} is not safe for {uses}.", *reasons]

    def to_json(self) -> dict:
        """By the fields' names, and verdict, safe_uses and the reason of each check."""
        return {
            "verdict": self.verdict,
            "safe_uses": self.safe_uses,
            **asdict(self),
            "checks": [asdict(check) | {"reason": check.reason} for check in self.checks],
        }


@torch.no_grad()
def verify(
    model: Model,
    *,
    prefill_depth: int | float | None = None,
    prompts: int = 20,
    prompt_tokens: int = PROMPT_TOKENS,
    seed: int = 0,
    progress=lambda done, total, note="": None,
) -> Verification:
    """Checks what a prefill depth, with the model's calibration and deep tokens, is safe for.

    Chat, prose, code and maths are safe where the KL from the full model is 0.1 nats a token or less, by the upper end
    of its 95% interval; retrieval where 95%, copying where 80% of the full model's right answers stay right (of fewer
    than 4 the KL decides). The verdict is "safe" where all six are, "partly safe" where some are, else "not safe".

    prefill_depth: by default the model's own, or its plan. prompts, prompt_tokens: of each use, and tokens of a prompt
    (at most, of chats). progress: called with what is done, the total, and a note. ValueError for a depth of all
    layers, and where the model's context is too short.
    """
    depth, layers = model.resolve_prefill_depth(prefill_depth), model.spec.num_layers
    partial = bool(model.partial_layers(prefill_depth))
    if depth >= layers and not partial:
        raise ValueError(f"prefill_depth is {depth} of {layers} layers, expected fewer: nothing is truncated")
    calibrated = model.calibration is not None and depth < layers - 1
    result = Verification(depth, layers, calibrated, float(model.deep_tokens), [], prefill_plan=partial)
    result.problem = calibration_problem(model, depth) if calibrated else None
    own = copy.copy(model)
    own.calibration = None
    runs = [("full", layers, own, layers), ("pop", depth, model, None if partial else depth)]
    for number, use in enumerate(() if result.problem else USES):
        pairs, scores = use_pairs(use, model, prompts, prompt_tokens, seed), []
        for prompt, continuation in zip(*pairs, strict=True):
            progress(number * prompts + len(scores), len(USES) * prompts, use)
            scores.append(score(runs, prompt, continuation, []))
        result.checks.append(_check(use, np.array(scores), seed))
    return result


def calibration_problem(model: Model, depth: int) -> str | None:
    """What no calibration of this model can have: layer P's own input is exact, and so are its projections."""
    assert model.calibration is not None
    held = model.calibration.at(depth)[0][0].float()
    own = model.weights.projections_from(depth)[0].float()
    size = own.shape[1]
    # a projection of the hidden state and `rank` features, as `project_kv` takes it, is scaled for their number
    held = held[:, :size] * (held.shape[1] / size) ** 0.5
    error = float((held - own).norm() / own.norm())
    if error < 0.02:  # the rounding of bfloat16, and no more
        return None
    return (
        f"the calibration's projections of layer {depth}, whose input is exact, differ from the model's own by "
        f"{error:.0%}: it is damaged, or was not made by `pop calibrate`"
    )


def _check(use: str, scores: np.ndarray, seed: int) -> Check:
    """Of `score` for every prompt, [prompts, 2, 5]: the full model's and the truncated one's."""
    resamples = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, len(scores)))
    kl_ci95 = interval(scores[:, 1, 1], resamples)
    right, answers = scores[:, :, 4] > 0, use in MIN_KEPT
    full_right, kept = int(right[:, 0].sum()), int(right.all(1).sum())
    check = Check(
        use=use,
        prompts=len(scores),
        kl=float(scores[:, 1, 1].mean()),
        kl_ci95=kl_ci95,
        top1_agreement=float(scores[:, 1, 3].mean()),
        full_right=full_right if answers else None,
        kept=kept if answers else None,
        safe=False,
    )
    check.safe = kept >= MIN_KEPT[use] * full_right if check.counts else kl_ci95[1] <= MAX_KL
    return check
