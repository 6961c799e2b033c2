"""Which layers matter in which stage, by virtual gates.

Every layer gets two gates, `h[l+1] = h[l] + g f_l(h[l])` with g = 1: the prefill gate acts on prompt tokens except the
anchors and the boundary, the decode gate on boundary and continuation tokens. What the loss loses when a gate closes
is, to second order, half the Hessian; with labels drawn from the model itself the first order vanishes in expectation
and the Hessian is the Fisher information (He et al., arXiv 2602.03295):

    I = 1/2 E[(d loss / d g)^2],  loss = sum over continuation positions of -log p(y_t),  y_t drawn from p(. | text)

Squares are taken of one sample's and one draw's gradient. Everything runs on transformers' own model, through autograd.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.files import resolve_folder

STAGES = ("prefill", "decode")
BRANCHES = ("attention", "mlp")
# Where a branch's output meets the residual: the norm after it where there is one, else its last module.
BRANCH_MODULES = {
    "attention": (("self_attn", "post_attention_layernorm"), ("self_attn",), ("attn",), ("attention",)),
    "mlp": (("mlp", "post_feedforward_layernorm"), ("mlp",), ("feed_forward",)),
}


def load_transformers(folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A transformers causal language model, or the one within a vision-language model, for measuring."""
    import transformers

    folder = resolve_folder(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    vision = type(config) not in transformers.AutoModelForCausalLM._model_mapping
    loader = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def decoder_layers(model) -> nn.ModuleList:
    """The decoder's layers: the module list that is as long as the text config says."""
    count = model.config.get_text_config().num_hidden_layers
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and "vision" not in name and "visual" not in name
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of {count} layers: its gates cannot be placed")
    return found[0]


class Gates:
    """Gates at a model's layers while the context is entered.

    values [B, L, 2] (stage), with branches [B, L, 2, 2] (stage, branch); acts [2, T]: the tokens of each stage.
    """

    def __init__(self, model, branches: bool = False):
        self.layers, self.branches = decoder_layers(model), branches
        self.values: Any = None
        self.acts: Any = None

    def shape(self, batch: int) -> tuple[int, ...]:
        return (batch, len(self.layers), 2) + ((2,) if self.branches else ())

    def _minus_one(self, layer: int, branch: int | None) -> Tensor:
        """Gate minus one for every token: [B, T, 1]."""
        values = self.values[:, layer] if branch is None else self.values[:, layer, :, branch]
        return ((values - 1) @ self.acts)[..., None]

    @contextmanager
    def __call__(self, values: Tensor, acts: Tensor):
        self.values, self.acts, handles = values, acts, []
        try:
            for index, layer in enumerate(self.layers):
                if self.branches:
                    for branch, name in enumerate(BRANCHES):
                        handles.append(
                            _branch_module(layer, name).register_forward_hook(self._branch_hook(index, branch))
                        )
                else:
                    handles.append(layer.register_forward_hook(self._layer_hook(index), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.values = None

    def _layer_hook(self, index: int):
        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            # as a difference from the open gate, so that an open gate changes nothing, not even the rounding
            after = after + self._minus_one(index, None).to(after.dtype) * (after - before)
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return hook

    def _branch_hook(self, index: int, branch: int):
        def hook(module, args, output):
            out = output[0] if isinstance(output, tuple) else output
            out = out + self._minus_one(index, branch).to(out.dtype) * out
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook


def _branch_module(layer: nn.Module, branch: str) -> nn.Module:
    sandwich = hasattr(layer, "post_feedforward_layernorm")
    for names in BRANCH_MODULES[branch]:
        if all(hasattr(layer, name) for name in names) and (len(names) == 1 or sandwich):
            return getattr(layer, names[-1])
    raise ValueError(f"{type(layer).__name__} has no {branch} module that is known: branch gates cannot be placed")


def stage_masks(length: int, prompt_tokens: int, boundary_tokens: int, anchor_tokens: int) -> Tensor:
    """[2, T] float32: the tokens on which prefill and decode gates act."""
    position = torch.arange(length)
    decode = position >= max(prompt_tokens - boundary_tokens, 0)
    prefill = ~decode & (position >= anchor_tokens)
    # an anchor is of neither stage, unless it is of the boundary
    return torch.stack([prefill, decode]).float()


@dataclass
class Importance:
    """values and errors (standard errors of the mean) [L, 2] (prefill, decode), in nats of loss per continuation; with
    branches [L, 2, 2] (stage; attention, mlp).
    """

    values: Tensor
    errors: Tensor
    samples: int
    draws: int
    continuation_tokens: float  # of a window, the mean


def sample_gradients(
    model: nn.Module,
    gates: Gates,
    windows: Tensor,
    prompt_tokens: int,
    acts: Tensor,
    draws: int,
    seeds: list[int],
    images: dict[str, Tensor] | None = None,
) -> Tensor:
    """d loss / d gate of each window and draw: [B, draws, L, 2(, 2)]. windows [B, T]; labels are drawn per window from
    its own seed, so that results do not depend on what shares a batch.
    """
    values = torch.ones(gates.shape(len(windows))).requires_grad_()
    with torch.enable_grad(), gates(values, acts):
        log_p = _log_probabilities(model, windows, prompt_tokens, images)
        gradients = []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for draw in range(draws):
            labels = torch.stack(
                [
                    torch.multinomial(row.detach().exp(), 1, generator=generator)
                    for row, generator in zip(log_p, generators, strict=True)
                ]
            )
            loss = -log_p.gather(-1, labels).sum()
            gradients.append(torch.autograd.grad(loss, values, retain_graph=draw + 1 < draws)[0])
    return torch.stack(gradients, 1)


def _log_probabilities(
    model: nn.Module, windows: Tensor, prompt_tokens: int, images: dict[str, Tensor] | None = None
) -> Tensor:
    """Of the continuation's tokens, [B, c, V] float32; the logits at position i are for token i + 1."""
    count = windows.shape[1] - prompt_tokens + 1
    # What the vocabulary projection need not make, where the model can be told so.
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": count} if known else {}
    logits = model(input_ids=windows, use_cache=False, **kept, **(images or {})).logits
    return logits[:, -count:-1].float().log_softmax(-1)


def measure(
    model: nn.Module,
    windows: list[list[int]],
    prompt_tokens: int | list[int],
    *,
    images: list[dict[str, Tensor]] | None = None,
    boundary_tokens: int = 1,
    anchor_tokens: int = 1,
    branches: bool = False,
    draws: int = 4,
    batch_size: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Importance:
    """The importance of every layer in both stages over `windows`, each a prompt of `prompt_tokens` tokens (one number
    for all, or one for each) and a continuation. images[i] is what the model takes for the images of windows[i]
    (`vision.transformers_inputs`); windows with images, or of different lengths, run one at a time.
    """
    counts = _prompt_lengths(windows, prompt_tokens)
    gates = Gates(model, branches)
    same = images is None and len(set(zip(map(len, windows), counts, strict=True))) == 1
    size = batch_size if same else 1
    per_window = []
    for start in range(0, len(windows), size):
        batch, count = torch.tensor(windows[start : start + size]), counts[start]
        acts = stage_masks(batch.shape[1], count, boundary_tokens, anchor_tokens)
        # Two windows' draws must not be the same stream; seeds are spread by a large odd step.
        seeds = [seed + 1_000_003 * (start + i) for i in range(len(batch))]
        pictures = images[start] if images else None
        gradients = sample_gradients(model, gates, batch, count, acts, draws, seeds, pictures)
        per_window += list(0.5 * gradients.double().square().mean(1))
        progress(len(per_window), len(windows))
    values = torch.stack(per_window)
    spread = values.std(0) if len(values) > 1 else torch.full_like(values[0], math.nan)
    mean = (sum(map(len, windows)) - sum(counts)) / len(windows)
    return Importance(values.mean(0), spread / len(values) ** 0.5, len(values), draws, mean)


def _prompt_lengths(windows: list[list[int]], prompt_tokens: int | list[int]) -> list[int]:
    """One for each window; ValueError unless each leaves a prompt and a continuation."""
    counts = [prompt_tokens] * len(windows) if isinstance(prompt_tokens, int) else list(prompt_tokens)
    for window, count in zip(windows, counts, strict=True):
        if not 1 <= count < len(window):
            raise ValueError(f"prompt_tokens is {count}, expected 1 to {len(window) - 1} of the window's tokens")
    return counts


@torch.no_grad()
def truncation_kl(
    model: nn.Module,
    windows: list[list[int]],
    prompt_tokens: int | list[int],
    depth: int,
    boundary_tokens: int = 1,
    anchor_tokens: int = 1,
    images: list[dict[str, Tensor]] | None = None,
    full: dict[int, Tensor] | None = None,
) -> float:
    """KL in nats a token from the full model with every prefill gate from `depth` up closed: POP with own weights.
    Arguments as for `measure`; `full`, empty at first, keeps the full model's side (1 GiB at most) for other depths.
    """
    full = {} if full is None else full
    gates, total = Gates(model), 0.0
    values = torch.ones(gates.shape(1))
    values[:, depth:, 0] = 0
    pictures = images or [{}] * len(windows)
    counts = _prompt_lengths(windows, prompt_tokens)
    for i, (window, count, inputs) in enumerate(zip(windows, counts, pictures, strict=True)):
        tokens = torch.tensor([window])
        acts = stage_masks(len(window), count, boundary_tokens, anchor_tokens)
        whole = full.get(i)
        if whole is None:
            whole = _log_probabilities(model, tokens, count, inputs)[0]
            if sum(kept.nbytes for kept in full.values()) + whole.nbytes <= 2**30:
                full[i] = whole.clone()
        with gates(values, acts):
            cut = _log_probabilities(model, tokens, count, inputs)[0]
        total += float((whole.exp() * (whole - cut)).sum(-1).mean())
    return total / len(windows)


def gate_sums(importance: Importance) -> list[float]:
    """For each depth P the sum of the prefill gates' importance from P up: a ranking, far from the loss itself."""
    prefill = importance.values[:, 0]
    prefill = prefill.sum(-1) if prefill.dim() == 2 else prefill
    return prefill.flip(0).cumsum(0).flip(0).tolist()


def suggest_depth(
    layers: int, budget: float, kl_at: Callable[[int], float], boundary_tokens: int = 1
) -> tuple[int, dict[int, float]]:
    """The smallest depth whose KL is within `budget`, by bisection, and the KL at every depth that was measured.

    Bisection takes for granted that KL falls with depth; where the measured points contradict that, the depths between
    are measured too. Depth L - 1 loses nothing, but without a boundary: then only L does.
    """
    lossless = layers - 1 if boundary_tokens else layers
    measured = {lossless: 0.0}

    def within(depth: int) -> bool:
        if depth not in measured:
            measured[depth] = kl_at(depth)
        return measured[depth] <= budget

    low, high = 1, lossless
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle + 1, high)
    # A dip below the answer is possible if the curve is not monotone nearby: look two further down.
    while any(within(depth) for depth in range(max(1, high - 2), high)):
        high = min(depth for depth in range(max(1, high - 2), high) if within(depth))
    return high, dict(sorted(measured.items()))


def summarise(
    model: nn.Module,
    windows: list[list[int]],
    prompt_tokens: list[int],
    *,
    budget: float = 0.05,
    depths: list[int] | None = None,
    images: list[dict[str, Tensor]] | None = None,
    boundary_tokens: int = 1,
    anchor_tokens: int = 1,
    progress: Callable[..., None] = lambda done, total, note="": None,
    **settings,
) -> tuple[Importance, dict]:
    """`measure` (with its settings), and as an object for JSON that with the depth whose KL with own weights is within
    `budget` (nats a token), and the KL at every depth that was measured: those of the search, and `depths`.
    """
    stage = {"boundary_tokens": boundary_tokens, "anchor_tokens": anchor_tokens}
    result = measure(model, windows, prompt_tokens, images=images, **stage, **settings, progress=progress)
    layers, visited, full = len(result.values), [], {}

    def kl_at(depth: int) -> float:
        progress(len(visited), layers.bit_length() + 2, f"KL at depth {depth}")
        visited.append(depth)
        return truncation_kl(model, windows, prompt_tokens, depth, **stage, images=images, full=full)

    suggested, measured = suggest_depth(layers, budget, kl_at, boundary_tokens)
    measured |= {depth: kl_at(depth) for depth in depths or [] if depth not in measured}
    sums, count = [*gate_sums(result), 0.0], result.continuation_tokens
    rows = [
        {"prefill_depth": depth, "kl": kl, "gate_sum_per_token": sums[depth] / count}
        for depth, kl in sorted(measured.items())
    ]
    return result, {
        "prompts": len(windows),
        "prompt_tokens": sum(prompt_tokens) / len(windows),
        "continuation_tokens": count,
        "draws": result.draws,
        "importance": to_json(result),
        "budget": budget,
        "suggested_depth": suggested,
        "projections": "own weights",
        "depths": rows,
    }


def to_json(importance: Importance) -> list[dict]:
    """A list of objects, one for each layer and stage (and branch)."""
    rows = []
    tokens = importance.continuation_tokens
    for layer in range(len(importance.values)):
        for s, stage in enumerate(STAGES):
            parts = [(None, (layer, s))] if importance.values.dim() == 2 else [
                (branch, (layer, s, b)) for b, branch in enumerate(BRANCHES)
            ]  # fmt: skip
            for branch, at in parts:
                value, error = float(importance.values[at]), float(importance.errors[at])
                rows.append(
                    {
                        "layer": layer,
                        "stage": stage,
                        **({"branch": branch} if branch else {}),
                        "importance": value,
                        "standard_error": None if math.isnan(error) else error,
                        "importance_per_token": value / tokens,
                    }
                )
    return rows


def plot(importance: Importance, path: str | Path, title: str, suggested: int | None = None) -> None:
    """Both curves over the layers, with standard errors, on a logarithmic scale, and a line before the first layer that
    prompts may skip.
    """
    from .plotting import figure, save

    fig, axes = figure()
    layers = range(len(importance.values))
    for s, stage in enumerate(STAGES):
        parts = [(stage, (slice(None), s))] if importance.values.dim() == 2 else [
            (f"{stage}, {branch}", (slice(None), s, b)) for b, branch in enumerate(BRANCHES)
        ]  # fmt: skip
        for label, at in parts:
            values, errors = importance.values[at], importance.errors[at].nan_to_num()
            # no place on this scale for a nothing, such as the last layer's for prefill
            axes.errorbar(layers, values.where(values > 0, math.nan), yerr=errors, marker="o", capsize=2, label=label)
    if suggested is not None:
        label = f"suggested prefill depth, {suggested} of {len(layers)}"
        axes.axvline(suggested - 0.5, color="0.5", linestyle="--", label=label)
    # a model of few samples may have nothing at all that a logarithmic scale can show
    if (importance.values > 0).any():
        axes.set_yscale("log")
    axes.set(xlabel="layer (bars: standard error over prompts)", ylabel="importance, nats per continuation")
    axes.set_xticks(range(0, len(layers), max(1, len(layers) // 16)))
    axes.set_title(title)
    axes.legend()
    save(fig, path)
