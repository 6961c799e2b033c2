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

PENALTIES = tuple(10.0 ** (-k / 2) for k in range(2, 17))  # relative to the mean of the diagonal of X^T X
HELD_OUT = 8  # every eighth window chooses the penalty and measures the errors
WINDOW = 512  # tokens
BATCH = 4  # windows of one forward pass
RANK = 64  # features of the token before
FEATURE_SCALE = 2.0**-8  # of the features: so small beside x, they leave the norm that `project_kv` takes as it is


def normed(hidden: Tensor, eps: float) -> Tensor:
    """hidden [T, D] -> x [T, D] float32 of root mean square 1."""
    hidden = hidden.float()
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


class NormalEquations:
    """X^T X, X^T Y and Y^T Y's diagonal of a stream, in float64; products of one block of rows are float32. X [n, in];
    Y [n, out] for each of `layers`.
    """

    def __init__(self, layers: range, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        like = {"dtype": torch.float64, "device": device}
        self.xx = torch.zeros(inputs, inputs, **like)
        self.xy = {layer: torch.zeros(inputs, outputs, **like) for layer in layers}
        self.yy = {layer: torch.zeros(outputs, **like) for layer in layers}
        self.count = 0

    def to_host(self) -> None:
        """What follows is small, and in float64, which GPUs are slow at."""
        self.xx = self.xx.cpu()
        self.xy = {layer: xy.cpu() for layer, xy in self.xy.items()}
        self.yy = {layer: yy.cpu() for layer, yy in self.yy.items()}

    def add_inputs(self, x: Tensor) -> None:
        self.xx += x.T @ x
        self.count += len(x)

    def add_targets(self, layer: int, x: Tensor, y: Tensor) -> None:
        self.xy[layer] += x.T @ y
        self.yy[layer] += y.double().square().sum(0)

    def __add__(self, other: NormalEquations) -> NormalEquations:
        total = NormalEquations(range(0), 0, 0)
        total.xx, total.count = self.xx + other.xx, self.count + other.count
        total.xy = {layer: self.xy[layer] + other.xy[layer] for layer in self.xy}
        total.yy = {layer: self.yy[layer] + other.yy[layer] for layer in self.yy}
        return total

    def of(self, matrix: Tensor) -> NormalEquations:
        """The moments of inputs `matrix` x, matrix [m, in]."""
        result = NormalEquations(range(0), 0, 0)
        result.xx, result.count = matrix @ self.xx @ matrix.T, self.count
        result.xy, result.yy = {layer: matrix @ xy for layer, xy in self.xy.items()}, self.yy
        return result

    def solve(self, layer: int, own: Tensor, penalty: float, spectrum: tuple[Tensor, Tensor]) -> Tensor:
        """The ridge solution [in, out] float64 with `spectrum`, the eigenvalues and eigenvectors of X^T X: sound
        however nearly singular that is, as a negative eigenvalue can only be rounding."""
        values, vectors = spectrum
        damped = values.clamp_min(0) + penalty * values.mean()
        return own + vectors @ ((vectors.T @ (self.xy[layer] - self.xx @ own)) / damped[:, None])

    def penalty_errors(
        self, layer: int, own: Tensor, spectrum: tuple[Tensor, Tensor], other: NormalEquations
    ) -> Tensor:
        """[PENALTIES] float64: of each penalty's `solve`, the squared error over another stream, relative to the sum of
        its targets' squares. other: that stream's moments in the basis of the eigenvectors, `of(vectors.T)`.

        In the basis of the eigenvectors, a solution is `own + D R` with a diagonal D that alone has the penalty, so
        that its error is a quadratic form of D: three products for all penalties, and not three for each.
        """
        values, vectors = spectrum
        rest = vectors.T @ (self.xy[layer] - self.xx @ own)  # R
        own = vectors.T @ own
        xx, xy = other.xx, other.xy[layer]
        linear = 2 * ((xx @ own - xy) * rest).sum(1)
        quadratic = xx * (rest @ rest.T)
        constant = (own * (xx @ own - 2 * xy)).sum() + other.yy[layer].sum()
        damped = values.clamp_min(0) + torch.tensor(PENALTIES, dtype=torch.float64)[:, None] * values.mean()
        scale = 1 / damped  # [PENALTIES, in]
        return (((scale @ quadratic) * scale).sum(1) + scale @ linear + constant) / other.yy[layer].sum()

    def errors(self, layer: int, weight: Tensor) -> Tensor:
        """The squared error of `weight` [in, out] in each output, summed over the stream: [out]."""
        return (weight * (self.xx @ weight - 2 * self.xy[layer])).sum(0) + self.yy[layer]


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
    progress: Callable[..., None] = lambda done, total, note="": None,
) -> Calibration:
    """Projections for every prefill depth of `depths`, from one pass over `windows` of tokens; visuals[i] are the
    images of windows[i]. rank: features of the token before, by default RANK, or the hidden size if that is less (0:
    none, and projections as large as the layers' own).
    """
    spec, size = model.spec, model.spec.hidden_size
    rank = _checked_rank(spec, windows, depths, rank)
    pairs = list(zip(windows, visuals if visuals is not None else [[]] * len(windows), strict=True))
    depths = sorted(set(depths))
    rows = 2 * spec.num_kv_heads * spec.head_dim
    layers = {depth: range(depth + 1, spec.num_layers) for depth in depths}
    fitted, held_out = (
        {depth: NormalEquations(layers[depth], (1 + (rank > 0)) * size, rows, model.device) for depth in depths}
        for _ in range(2)
    )
    done = 0
    count = max(1, min(BATCH, model.max_cache_tokens // (max(map(len, windows)) + BLOCK_SIZE)))
    for part, moments in zip(split(pairs), (fitted, held_out), strict=True):
        for start in range(0, len(part), count):
            batch, images = zip(*part[start : start + count], strict=True)
            _add_batch(model, moments, list(batch), list(images), rank)
            done += len(batch)
            progress(done, len(windows))

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
