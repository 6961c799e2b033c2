"""The search for a prefill plan: which attentions and MLPs a prompt's truncated tokens are to run through, within a
budget of multiplications.

It begins with the plain model and closes one branch after the other. Of the open ones, the `shortlist` of least
importance (virtual gates, He et al., arXiv 2602.03295) for the multiplications that closing them spares are tried, and
the one goes that adds least KL for them. The result, and the suffix of equal cost, then change branches for others as
long as that helps. KL is that of the next-token distribution from the full model's over the continuations, as
`evaluation` has it. What is found is compared with the suffix on text that was held out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.families import ModelSpec
from ..checkpoints.prefill_plan import BRANCHES, PrefillPlan
from ..runtime.generation import Model
from . import evaluation
from .data import HELD_OUT, Data
from .evaluation import Fidelity
from .samples import Pairs

ROUNDS = 3  # of changes, at most
Branch = tuple[int, str]
Progress = Callable[..., None]


def multiplications(spec: ModelSpec, plan: PrefillPlan, tokens: int) -> int:
    """Of a prompt of `tokens` tokens, all of them truncated: linear layers, and query-key and weight-value products.

    Every layer makes keys and values. A layer's attention that runs adds queries, output projection and attention, its
    MLP three projections. The last layer's branches serve nobody but the boundary, and are not run. Left out is what
    every plan has: embeddings, the few tokens that run through everything, and the vocabulary projection.
    """
    heads, mlp = spec.num_heads * spec.head_dim, 3 * spec.hidden_size * spec.intermediate_size
    total = spec.num_layers * tokens * 2 * spec.hidden_size * spec.num_kv_heads * spec.head_dim
    for layer in range(spec.num_layers - 1):
        if plan.attention[layer]:
            seen = min(tokens, spec.windows[layer] or tokens)  # causal: the i-th token sees i keys, of a window at most
            pairs = seen * (seen + 1) // 2 + (tokens - seen) * seen
            total += tokens * 2 * spec.hidden_size * heads + 2 * heads * pairs
        if plan.mlp[layer]:
            total += tokens * mlp
    return total


def with_plan(model: Model, plan: PrefillPlan | None) -> Model:
    """The model with another plan."""
    variant = copy.copy(model)
    variant.prefill_plan = plan
    return variant


def split(data: Data) -> tuple[Data, Data]:
    """Data to search on and data to measure on: of text the last quarter is held out, of samples every fourth."""
    if data.samples is not None:
        held_out = data.samples[HELD_OUT - 1 :: HELD_OUT]
        rest = [sample for i, sample in enumerate(data.samples) if i % HELD_OUT != HELD_OUT - 1]
        return Data(samples=rest, name=data.name), Data(samples=held_out, name=f"what is held out of {data.name}")
    text = data.text or ""
    cut = len(text) - len(text) // HELD_OUT
    return Data(text[:cut], name=data.name), Data(text[cut:], name=f"the last quarter of {data.name}")


class Divergence:
    """KL in nats a token from the full model, the mean over `pairs`, of plans; each is run once."""

    def __init__(self, model: Model, pairs: Pairs):
        self.model, self.pairs, self.known = model, pairs, {}
        own = copy.copy(model)
        own.calibration = None
        self.full = [self._log_p(own, i, model.spec.num_layers) for i in range(len(pairs))]

    def __call__(self, plan: PrefillPlan) -> float:
        if plan not in self.known:
            variant, total = with_plan(self.model, plan), 0.0
            for i, full in enumerate(self.full):
                total += float((full.exp() * (full - self._log_p(variant, i, None))).sum(-1).mean())
            self.known[plan] = total / len(self.full)
        return self.known[plan]

    def _log_p(self, model: Model, i: int, depth: int | None) -> Tensor:
        prompt, continuation = self.pairs.prompts[i], self.pairs.continuations[i]
        return model.logits([prompt], [continuation], prefill_depth=depth)[0].log_softmax(-1)


class Search:
    """importance [L, 2] (attention, MLP): of the prefill gates. budget: multiplications. In a model with a calibration
    plans keep the depth that they begin with, as each depth has projections of its own.
    """

    def __init__(self, model: Model, importance: Tensor, kl: Divergence, budget: int, tokens: int, shortlist: int):
        self.spec, self.kl, self.budget, self.tokens, self.shortlist = model.spec, kl, budget, tokens, shortlist
        self.keeps_depth = model.calibration is not None
        full = PrefillPlan.suffix(self.spec.num_layers, self.spec.num_layers)
        self.branches = [(layer, branch) for layer in range(self.spec.num_layers - 1) for branch in BRANCHES]
        self.saved = {at: self.cost(full) - self.cost(full.switched(*at, False)) for at in self.branches}
        values = {at: float(importance[at[0], BRANCHES.index(at[1])]) for at in self.branches}
        self.branches.sort(key=lambda at: values[at] / self.saved[at])  # the least first

    def cost(self, plan: PrefillPlan) -> int:
        return multiplications(self.spec, plan, self.tokens)

    def closed(self, plan: PrefillPlan, at: Branch, depth: int) -> PrefillPlan | None:
        """The plan without a branch, None where that is no plan of this search."""
        if not plan.runs(*at) or sum(plan.attention + plan.mlp) == 1:
            return None
        found = plan.switched(*at, False)
        return None if self.keeps_depth and found.depth != depth else found

    def greedy(self, plan: PrefillPlan, report: Callable[[PrefillPlan], None]) -> PrefillPlan:
        """Closes branches until the plan is within the budget."""
        depth = plan.depth
        while self.cost(plan) > self.budget:
            tried = {at: found for at in self.branches if (found := self.closed(plan, at, depth)) is not None}
            tried = dict(list(tried.items())[: self.shortlist])
            if not tried:
                raise ValueError(f"budget is too small for a plan of depth {depth}: nothing is left to close")
            before = self.kl(plan)
            plan = min(tried.items(), key=lambda item: (self.kl(item[1]) - before) / self.saved[item[0]])[1]
            report(plan)
        return min(plan, self.filled(plan, depth), key=self.kl)

    def filled(self, plan: PrefillPlan, depth: int, but: Branch | None = None) -> PrefillPlan:
        """With what else the budget has room for, the most important first."""
        for at in reversed(self.branches):
            fits = at != but and not plan.runs(*at) and self.cost(plan) + self.saved[at] <= self.budget
            if fits and not (self.keeps_depth and at[0] >= depth):
                plan = plan.switched(*at, True)
        return plan

    def changes(self, plan: PrefillPlan) -> Iterator[PrefillPlan]:
        """Plans within the budget that are near: without one branch, with others in its place; or with one more, and
        without those of least importance that pay for it.
        """
        depth = plan.depth
        out = [(at, found) for at in self.branches if (found := self.closed(plan, at, depth)) is not None]
        for at, found in out[: self.shortlist]:
            yield self.filled(found, depth, at)
        more = [
            at for at in reversed(self.branches) if not plan.runs(*at) and not (self.keeps_depth and at[0] >= depth)
        ]
        for at in more[: self.shortlist]:
            found = plan.switched(*at, True)
            for other in self.branches:
                if self.cost(found) <= self.budget:
                    yield self.filled(found, depth)
                    break
                found = found if other == at else self.closed(found, other, depth) or found

    def improved(self, plan: PrefillPlan, report: Callable[[PrefillPlan], None]) -> PrefillPlan:
        for _ in range(ROUNDS):
            best = min(self.changes(plan), key=self.kl, default=plan)
            report(best)
            if self.kl(best) >= self.kl(plan):
                break
            plan = best
        return plan


@dataclass
class Found:
    """A plan, and the suffix that it is compared with. rows: on text that was held out, the full model, then the plan
    and the suffix, each with its share of the full model's multiplications in `shares`.
    """

    plan: PrefillPlan
    suffix_depth: int
    rows: list[Fidelity]
    shares: list[float]
    excess_interval: tuple[float, float]  # 95%, of the plan's KL over the suffix's, over the same prompts
    prompts: int  # held out
    prompt_tokens: int  # of a prompt, the median: what multiplications are counted at
    searched: int  # plans

    @property
    def better(self) -> bool:
        """Whether the plan loses less than the suffix, with 95% confidence."""
        return self.excess_interval[1] < 0

    def sentences(self) -> list[str]:
        """What was found, in words."""
        plan, suffix, low, high = *self.rows[1:3], *self.excess_interval
        figures = (
            f"KL {plan.kl:.4f} against {suffix.kl:.4f} nats a token on {self.prompts} prompts that were held out (95% "
            f"interval of the difference {low:+.4f} to {high:+.4f}), at {self.shares[1]:.1%} and {self.shares[2]:.1%} "
            f"of the full model's multiplications for a prompt of {self.prompt_tokens} tokens."
        )
        depth = f"prefill depth {self.suffix_depth} of {self.rows[0].prefill_depth}"
        if self.better:
            verdict = f"The plan is better than {depth}, which costs as much"
        elif low > 0:
            verdict = f"{depth.capitalize()} is better than the plan: do not use it"
        else:
            verdict = f"No plan was found that is better than {depth}, which is as good: use that"
        found = [f"It runs {self.plan}.", f"{verdict}. {figures}"]
        if suffix.method == "pop_uncalibrated":
            found.append("Both have the layers' own weights. A calibrated prefill depth may lose less: see `pop tune`.")
        return found

    def to_json(self) -> dict:
        names = ("kl", "kl_ci95", "top1_agreement", "perplexity", "exact_answers")
        return {
            "better_than_suffix": self.better,
            "suffix_depth": self.suffix_depth,
            "excess_interval": self.excess_interval,
            "prompts": self.prompts,
            "prompt_tokens": self.prompt_tokens,
            "plans_searched": self.searched,
            "rows": [
                {"name": name, "multiplications_share": share, **{key: getattr(row, key) for key in names}}
                for name, row, share in zip(("full", "plan", "suffix"), self.rows, self.shares, strict=True)
            ],
        }


def budget_of(spec: ModelSpec, tokens: int, share: float | None, depth: int | None) -> int:
    """Multiplications: a share of the full model's, or what a prefill depth costs. ValueError unless some plan and not
    every one is within it.
    """
    layers = spec.num_layers
    full = multiplications(spec, PrefillPlan.suffix(layers - 1, layers), tokens)
    least = multiplications(spec, PrefillPlan.suffix(1, layers), tokens)
    if (share is None) == (depth is None):
        raise ValueError("budget and prefill_depth: expected one of them")
    if depth is not None:
        return multiplications(spec, PrefillPlan.suffix(depth, layers), tokens)
    assert share is not None
    if not least <= share * full < full:
        raise ValueError(
            f"budget is {share:g}, expected {math.ceil(1000 * least / full) / 1000:g} to 1 of the full model's "
            f"multiplications: the least is what one layer and all keys and values take at {tokens} prompt tokens"
        )
    return int(share * full)


@torch.no_grad()
def find(
    model: Model,
    importance: Tensor,
    search: Pairs,
    held_out: Pairs,
    *,
    budget: float | None = None,
    prefill_depth: int | None = None,
    shortlist: int = 6,
    seed: int = 0,
    progress: Progress = lambda done, total, note="": None,
) -> Found:
    """The best plan found within `budget`, a share of the full model's multiplications for a prompt, or what
    `prefill_depth` costs, on `search`, and what it loses on `held_out`.

    importance [L, 2]: of the prefill gates of attention and MLP (`importance.measure` with branches). shortlist:
    branches tried at a time. Where the model has a calibration, plans of its depths use it, and the suffix does where
    it is of them. ValueError for a budget that no plan or every plan is within.
    """
    spec, layers, tokens = model.spec, model.spec.num_layers, search.prompt_tokens
    allowed = budget_of(spec, tokens, budget, prefill_depth)
    kl = Divergence(model, search)
    found = Search(model, importance, kl, allowed, tokens, shortlist)
    suffixes = [PrefillPlan.suffix(depth, layers) for depth in range(1, layers)]
    depth = max(s.depth for s in suffixes if found.cost(s) <= allowed)
    calibrated = [] if model.calibration is None else model.calibration.depths
    if model.calibration is not None and depth not in calibrated:
        raise ValueError(
            f"calibration holds the depths {', '.join(map(str, calibrated))}, expected {depth}, too: the prefill depth "
            "of equal cost is what a plan is compared with"
        )
    starts = [s for s in suffixes if found.cost(s) > allowed and s.depth in (calibrated or [layers - 1])]
    total, candidates = sum(found.cost(start) - allowed for start in starts) or 1, []

    def report(plan: PrefillPlan) -> None:
        """How many multiplications are closed, of all starts'."""
        left = sum(found.cost(start) - allowed for start in starts[len(candidates) :])
        if len(candidates) < len(starts):
            left += min(0, found.cost(plan) - found.cost(starts[len(candidates)]))
        progress(total - max(0, left), total, f"{len(kl.known)} plans tried, KL {kl(plan):.4f}")

    for start in starts:
        candidates.append(found.improved(found.greedy(start, report), report))
    candidates.append(found.improved(suffixes[depth - 1], report))
    plan = min(candidates, key=kl)
    rows, interval = compare(model, plan, depth, held_out, seed)
    full = found.cost(suffixes[-1])
    shares = [found.cost(p) / full for p in (suffixes[-1], plan, suffixes[depth - 1])]
    result = Found(plan, depth, rows, shares, interval, len(held_out), tokens, len(kl.known))
    provenance = {"multiplications_budget": allowed / full, "shortlist": shortlist, "seed": seed, **result.to_json()}
    result.plan = replace(plan, fingerprint=model.fingerprint(), found_with=provenance)
    return result


def compare(model: Model, plan: PrefillPlan, depth: int, pairs: Pairs, seed: int):
    """Rows for the full model, a plan and a prefill depth on `pairs`, and the 95% interval of what the plan's KL is
    over the depth's. Both have the model's calibration where it is for them.
    """
    own, layers = copy.copy(model), model.spec.num_layers
    own.calibration = None
    held = [] if model.calibration is None else model.calibration.depths
    suffix = model if depth in held else own
    planned = with_plan(model if plan.depth in held else own, plan)
    runs: list[tuple] = [("full", layers, own, layers)]
    for variant, at in ((planned, None), (suffix, depth)):
        method = "pop_uncalibrated" if variant.calibration is None else "pop_calibrated"
        runs.append((method, plan.depth if at is None else at, variant, at))
    samples = zip(pairs.prompts, pairs.continuations, strict=True)
    scores = np.array([evaluation.score(runs, *sample, []) for sample in samples])
    rows = evaluation.summarise(runs, scores, np.full((1, len(runs)), math.nan), seed)
    resamples = np.random.default_rng(seed).integers(len(scores), size=(evaluation.RESAMPLES, len(scores)))
    return rows, evaluation.interval(scores[:, 1, 1] - scores[:, 2, 1], resamples)
