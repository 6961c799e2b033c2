"""Calibrated projections: keys and values of the skipped layers, fitted to those that the full model computes.

For a prefill depth P every prompt token has one vector `x = h[P] / rms(h[P])`, from which each skipped layer l makes
its keys and values. The layer's own weights expect h[l]. Ridge regression finds the `W_l` [D, 2 Hkv E] that come
closest to the keys and values of h[l], before K-norm, RoPE and bias, pulled towards the own weights `W0`:

    W = W0 + (X^T X + lambda I)^-1 X^T (Y - X W0)

X^T X and X^T Y add up over a stream of text in float64, and are all that is kept of it. Layer P's input is exact, so
its own weights stay.

A token's deep keys also say what the token before it was: layers above P find by them what followed a word last time.
Attention put it there, which a projection of the token alone cannot know. So x is continued by `rank` features of the
token before, `z_t = A x_(t-1)` with one A [rank, D] for all layers: a reduced-rank regression (Izenman 1975) of what x
leaves of the keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoints.calibration import Calibration
from ..checkpoints.families import ModelSpec
from ..runtime.finite import NonFiniteError, explained
from ..runtime.kv_cache import BLOCK_SIZE
from ..vision.spans import ImageSpan
from .normal_equations import PENALTIES, NormalEquations, UnfinishedPass

HELD_OUT = 8  # every eighth window chooses the penalty and measures the errors
WINDOW = 512  # tokens
BATCH = 4  # windows of one forward pass
RANK = 64  # features of the token before
FEATURE_SCALE = 2.0**-8  # of the features: so small beside x, they leave the norm that `project_kv` takes as it is


def normed(hidden: Tensor, eps: float) -> Tensor:
    """hidden [T, D] -> x [T, D] float32 of root mean square 1."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


def features_of(moments: NormalEquations, size: int, rank: int) -> Tensor:
    """A [rank, size] float64 from the moments of inputs [x_t, x_(t-1)], each of `size`: of all A x_(t-1), what with x_t
    predicts the keys of all layers best, each layer's in units of what x_t alone predicts of them.

    Scaled so that a feature varies by 1 for given x_t.
    """
    if rank == 0 or not moments.xy:
        return torch.zeros(rank, size, dtype=torch.float64)
    xx = moments.xx + 1e-4 * moments.xx.diagonal().mean() * torch.eye(2 * size, dtype=torch.float64)
    now, both, before = xx[:size, :size], xx[:size, size:], xx[size:, size:]
    factor = torch.linalg.cholesky(now)
    rest = torch.linalg.cholesky(before - both.T @ torch.cholesky_solve(both, factor))  # of x_(t-1) given x_t
    unexplained = []
    for xy in moments.xy.values():
        keys = xy[:, : xy.shape[1] // 2]
        weight = torch.cholesky_solve(keys[:size], factor)
        unexplained.append((keys[size:] - both.T @ weight) / (keys[:size] * weight).sum().clamp_min(1e-300).sqrt())
    unexplained = torch.linalg.solve_triangular(rest, torch.cat(unexplained, 1), upper=False)
    _, vectors = torch.linalg.eigh(unexplained @ unexplained.T)
    best = vectors[:, -rank:]
    return math.sqrt(moments.count) * torch.linalg.solve_triangular(rest.T, best, upper=True).T


def column_scale(size: int, rank: int) -> Tensor:
    """[size + rank] float64: what turns a projection of [x, z] into that of `project_kv`'s rows, whose features are
    FEATURE_SCALE as large, and which it divides by their root mean square: x's `size` squares over size + rank.
    """
    scale = torch.full((size + rank,), math.sqrt(size / (size + rank)), dtype=torch.float64)
    scale[size:] /= FEATURE_SCALE
    return scale


def split(windows: list) -> tuple[list, list]:
    """Windows to fit on, and those held out: every eighth, counted from the last."""
    held_out = set(range(len(windows) - 1, -1, -HELD_OUT))
    return (
        [window for i, window in enumerate(windows) if i not in held_out],
        [windows[i] for i in sorted(held_out)],
    )


def _targets(model, layer: int, x: Tensor) -> Tensor:
    """What layer `layer` makes of its own normed input x [n, D]: [n, 2 Hkv E] float32. A K-norm discards the scale of
    each token's key in each head, so there keys count with a root mean square of 1.
    """
    y = x @ model.weights.projections_from(layer)[0].float().T
    if model.spec.qk_norm:
        keys = y[:, : y.shape[1] // 2].unflatten(1, (-1, model.spec.head_dim))
        keys *= torch.rsqrt(keys.square().mean(-1, keepdim=True) + model.spec.rms_norm_eps)
    return y


def _own(model, layer: int, moments: NormalEquations) -> Tensor:
    """The layer's own weights [in, 2 Hkv E] float64, nothing for features; under a K-norm each head's keys at the scale
    that fits best.
    """
    own = model.weights.projections_from(layer)[0].cpu().double().T
    own = torch.cat([own, own.new_zeros(len(moments.xx) - len(own), own.shape[1])])
    if model.spec.qk_norm:
        heads = own[:, : own.shape[1] // 2].unflatten(1, (-1, model.spec.head_dim))  # [in, Hkv, E], a view
        wanted = moments.xy[layer][:, : own.shape[1] // 2].unflatten(1, (-1, model.spec.head_dim))
        power = torch.einsum("dhe,dc,che->h", heads, moments.xx, heads)
        scale = (heads * wanted).sum((0, 2)) / power.clamp_min(1e-300)
        heads *= torch.where(scale > 0, scale, 1.0)[:, None]
    return own


def _checked_rank(spec: ModelSpec, windows: list[list[int]], depths: list[int], rank: int | None) -> int:
    """The rank to use; ValueError for arguments of `calibrate` that cannot be used."""
    for depth in depths:
        if not 1 <= depth < spec.num_layers:
            raise ValueError(
                f"prefill_depth is {depth}, expected 1 to {spec.num_layers - 1}: the full model skips nothing"
            )
    rank = min(RANK, spec.hidden_size) if rank is None else rank
    if not 0 <= rank <= spec.hidden_size:
        raise ValueError(f"rank is {rank}, expected 0 to the hidden size, {spec.hidden_size}")
    if len(windows) < 2:
        raise ValueError(f"the text has {len(windows)} windows, expected at least 2: one is held out")
    return rank


def _add_batch(
    model, moments: dict[int, NormalEquations], batch: list[list[int]], images: list[list[ImageSpan]], rank: int
) -> None:
    """Adds a batch of windows to the sums of every prefill depth."""
    spec, inputs = model.spec, {}
    first = max(model.anchor_tokens, rank > 0)  # anchors have true keys and values, and unlike any other token's
    counted = torch.cat([torch.arange(len(window)) >= first for window in batch]).nonzero()[:, 0]
    counted = counted.to(model.device)
    for layer, hidden in enumerate(model.hidden_states(batch, images)):
        if layer == spec.num_layers:
            break
        x = normed(hidden, spec.rms_norm_eps)
        if inputs:
            targets = _targets(model, layer, x[counted])
            for depth, depth_x in inputs.items():
                moments[depth].add_targets(layer, depth_x, targets)
        if layer in moments:
            inputs[layer] = torch.cat([x[counted], x[counted - 1]], 1) if rank else x[counted]
            moments[layer].add_inputs(inputs[layer])


@torch.no_grad()
def calibrate(
    model,
    windows: list[list[int]],
    depths: list[int],
    *,
    rank: int | None = None,
    visuals: list[list[ImageSpan]] | None = None,
    unfinished: UnfinishedPass | None = None,
    progress: Callable[..., None] = lambda done, total, note="": None,
) -> Calibration:
    """Projections for every prefill depth of `depths`, from one pass over `windows` of tokens; visuals[i] are the
    images of windows[i]. rank: features of the token before, by default RANK, or the hidden size if that is less (0:
    none, and projections as large as the layers' own). unfinished: where the pass is kept and goes on from.
    """
    rank = _checked_rank(model.spec, windows, depths, rank)
    pairs = list(zip(windows, visuals if visuals is not None else [[]] * len(windows), strict=True))
    depths = sorted(set(depths))
    fitted, held_out = _pass(model, pairs, depths, rank, unfinished, progress)
    moments = [*fitted.values(), *held_out.values()]
    for m in moments:
        m.to_host()
    if not all(tensor.isfinite().all() for m in moments for tensor in (m.xx, *m.xy.values())):
        raise explained(NonFiniteError("the hidden states are not finite"), model, windows[:1])
    projections, features, report = {}, {}, {}
    for depth in depths:
        progress(len(windows), len(windows), f"solving depth {depth}")
        fit = _fit(model, depth, fitted.pop(depth), held_out.pop(depth), rank)
        projections[depth], features[depth], report[str(depth)] = fit
    return Calibration(
        projections,
        features,
        {
            "fingerprint": model.fingerprint(),
            "tokens": sum(map(len, windows)),
            "windows": len(windows),
            "rank": rank,
            "dtype": str(model.dtype).removeprefix("torch."),
            "depths": report,
        },
    )


def _pass(
    model, pairs: list[tuple], depths: list[int], rank: int, unfinished: UnfinishedPass | None, progress
) -> tuple[dict[int, NormalEquations], dict[int, NormalEquations]]:
    """The normal equations of each depth, of the windows to fit on and of those held out. pairs: windows, and their
    images.
    """
    spec, size = model.spec, model.spec.hidden_size
    rows = 2 * spec.num_kv_heads * spec.head_dim
    fitted, held_out = (
        {
            depth: NormalEquations(range(depth + 1, spec.num_layers), (1 + (rank > 0)) * size, rows, model.device)
            for depth in depths
        }
        for _ in range(2)
    )
    tables = [*fitted.values(), *held_out.values()]
    count = max(1, min(BATCH, model.max_cache_tokens // (max(len(window) for window, _ in pairs) + BLOCK_SIZE)))
    before, done = unfinished.load(tables) if unfinished else 0, 0
    for part, moments in zip(split(pairs), (fitted, held_out), strict=True):
        for start in range(0, len(part), count):
            batch, images = zip(*part[start : start + count], strict=True)
            done += len(batch)
            if done <= before:
                continue
            _add_batch(model, moments, list(batch), list(images), rank)
            if unfinished:
                unfinished.save_now_and_then(tables, done)
            progress(done, len(pairs))
    return fitted, held_out


def _fit(
    model, depth: int, fitted: NormalEquations, held_out: NormalEquations, rank: int
) -> tuple[Tensor, Tensor, dict]:
    """Projections and features of one depth, as `Calibration` has them, and penalty and errors of each layer."""
    size, layers = model.spec.hidden_size, range(depth + 1, model.spec.num_layers)
    features = features_of(fitted, size, rank)
    if rank:
        joined = torch.block_diag(torch.eye(size, dtype=torch.float64), features)
        fitted, held_out = fitted.of(joined), held_out.of(joined)
    own = {layer: _own(model, layer, fitted) for layer in layers}
    spectrum = torch.linalg.eigh(fitted.xx)
    turned = held_out.of(spectrum[1].T)
    errors = {layer: fitted.penalty_errors(layer, own[layer], spectrum, turned) for layer in layers}
    best = min(range(len(PENALTIES)), key=lambda k: sum(float(table[k]) for table in errors.values()))
    everything = fitted + held_out
    spectrum = torch.linalg.eigh(everything.xx)
    solved = [everything.solve(layer, own[layer], PENALTIES[best], spectrum).T for layer in layers]
    exact = model.weights.projections_from(depth)[0].cpu().double()
    exact = torch.cat([exact, exact.new_zeros(len(exact), rank)], 1)
    projection = (torch.stack([exact, *solved]) * column_scale(size, rank)).to(model.dtype)
    report = {
        "penalty": PENALTIES[best],
        "error_before": {
            layer: float(held_out.errors(layer, own[layer]).sum() / held_out.yy[layer].sum()) for layer in layers
        },
        "error_after": {layer: float(table[best]) for layer, table in errors.items()},
    }
    return projection, (features * FEATURE_SCALE).to(model.dtype), report
