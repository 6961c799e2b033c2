"""Refinement of calibrated projections by gradient steps, from where the closed form ends.

What is minimised is what POP is judged by: the KL divergence of the next-token distribution after a truncated prompt
from the full model's. Only the projections move; the model stays as it is.

One window of T tokens is many prompts at once. It is cut into blocks; the tokens of a block are the boundary and the
continuation of the prompt that the earlier blocks are. So a token sees projected keys and values of the earlier blocks
(true ones of the anchors) and true ones within its own block, all in one pass of T tokens through the deep layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import kl_div, linear

from ..checkpoints.calibration import Calibration, CalibrationError
from ..checkpoints.files import atomic_write
from ..checkpoints.tensors import open_safetensors
from .calibration import FEATURE_SCALE, column_scale, normed, split

BLOCK = 64  # tokens
BATCH = 2  # windows a step
CHECK_EVERY = 25  # steps between looks at the held-out windows; the state is saved then
HELD_OUT_WINDOWS = 12
RATE, WARM_UP = 5e-4, 10  # Adam's, with a cosine to nothing


class DeepLayers:
    """The layers from `depth` up, differentiable: transformers' own modules with projected keys and values beside the
    true ones.

    They take a second copy of the model's weights, in the model's dtype.
    """

    def __init__(self, model, depth: int, features: Tensor):
        """features [rank, D] of x_(t-1)."""
        from transformers import AutoModelForCausalLM

        self.model, self.depth, self.features = model, depth, features
        full = AutoModelForCausalLM.from_pretrained(model.folder, dtype=model.dtype, attn_implementation="sdpa")
        full.to(model.device).eval().requires_grad_(False)
        self.layers = full.model.layers[depth:]
        self.final_norm, self.lm_head = full.model.norm, full.lm_head

    def __call__(self, hidden: Tensor, projection: Tensor, starts: Tensor) -> Tensor:
        """hidden [B, T, D] before layer `depth`; projection [L - P, 2 Hkv E, D + rank] of [x, z]; starts [T]: where the
        block of each token starts. Returns the hidden states [B, T, D] after the last layer.
        """
        model, spec = self.model, self.model.spec
        tokens = torch.arange(hidden.shape[1], device=hidden.device)
        x = normed(hidden, spec.rms_norm_eps)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        inputs = torch.cat([x, linear(before, self.features)], -1).to(hidden.dtype)
        cos, sin = model.rope(tokens)  # [ropes, T, E / 2]
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        first = max(model.anchor_tokens, len(self.features) > 0)
        shallow = (tokens < starts[:, None]) & (tokens >= first)  # [query, key]
        deep = (tokens <= tokens[:, None]) & ~shallow
        seen = torch.cat([shallow, deep], -1)
        distance = (tokens[:, None] - tokens).repeat(1, 2)
        for offset, layer in enumerate(self.layers):
            index = self.depth + offset
            rope = spec.rope_index[index]
            kv = linear(inputs, projection[offset].to(inputs.dtype))
            if model.weights.projection_bias is not None:
                kv = kv + model.weights.projection_bias[index]
            keys, values = kv.unflatten(-1, (2, spec.num_kv_heads, spec.head_dim)).transpose(1, 3).unbind(2)
            keys = keys.float()  # [B, Hkv, T, E]
            if model.k_norms is not None:
                keys = keys * torch.rsqrt(keys.square().mean(-1, keepdim=True) + spec.rms_norm_eps)
                keys = keys * model.k_norms[index]
            first, second = keys.chunk(2, -1)
            keys = (keys * cos[rope] + torch.cat([-second, first], -1) * sin[rope]).to(hidden.dtype)
            window = spec.windows[index]
            hidden = layer(
                hidden,
                attention_mask=(seen & (distance < window) if window else seen)[None, None],
                position_embeddings=(cos[rope][None].to(hidden.dtype), sin[rope][None].to(hidden.dtype)),
                past_key_values=_Projected(keys, values),
            )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] after the last layer -> [..., V] float32."""
        return self.lm_head(self.final_norm(hidden)).float()


class _Projected:
    """What a layer of transformers takes for its cache: puts the projected keys and values before its own."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


def divergence(deep: DeepLayers, hidden: Tensor, full: Tensor, rows: int = 128) -> tuple[float, Tensor]:
    """The sum over tokens of KL(full || truncated) in nats, and its gradient by `hidden`; `rows` tokens at a time, as
    a vocabulary's worth of numbers for each token is large. hidden, full [N, D] after the last layer.
    """
    total, gradient = 0.0, torch.empty_like(hidden)
    for part, target, out in zip(hidden.split(rows), full.split(rows), gradient.split(rows), strict=True):
        part = part.detach().requires_grad_()
        with torch.no_grad():
            target = deep.logits(target).log_softmax(-1)
        with torch.enable_grad():
            loss = kl_div(deep.logits(part).log_softmax(-1), target, log_target=True, reduction="sum")
        out.copy_(torch.autograd.grad(loss, part)[0])
        total += loss.item()
    return total, gradient


@dataclass
class _State:
    """What a run needs to go on: everything random follows from seed and step."""

    step: int
    weight: Tensor  # [L - P, 2 Hkv E, D + rank] float32
    first: Tensor  # Adam's moments
    second: Tensor
    best: Tensor
    best_kl: float

    def save(self, path: Path, key: str) -> None:
        tensors = {name: value.detach().cpu() for name, value in vars(self).items() if isinstance(value, Tensor)}
        rest = {"key": key, "step": str(self.step), "best_kl": repr(self.best_kl)}
        atomic_write(path, lambda temporary: save_file(tensors, temporary, rest))

    @classmethod
    def load(cls, path: Path, key: str, device: torch.device) -> _State | None:
        """The state of an interrupted run with the same `key`; None where there is none, or of another run."""
        if not path.is_file():
            return None
        try:
            with open_safetensors(path) as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != key:
                    return None
                tensors = {name: file.get_tensor(name).to(device) for name in ("weight", "first", "second", "best")}
            return cls(step=int(metadata["step"]), best_kl=float(metadata["best_kl"]), **tensors)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CalibrationError(f"{path}: the state of a refinement, but damaged ({error}): remove it") from error


def refine(
    model,
    calibration: Calibration,
    windows: list[list[int]],
    steps: int,
    *,
    state: str | Path | None = None,
    seed: int = 0,
    progress: Callable[..., None] = lambda done, total, note="": None,
) -> None:
    """Moves every depth's projections of `calibration` along the gradient, and keeps the best on held-out windows.

    windows: of equal length; every eighth is held out, as in `calibrate`. state: with it a run that was interrupted
    goes on from its last check: the file `state` plus ".refining" keeps it, and is gone when all is done.
    Memory: a second copy of the model, Adam's two moments, and two hidden states for each token of the windows.
    """
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or lengths[0] <= BLOCK + model.anchor_tokens:
        raise ValueError(
            f"windows have lengths {lengths}, expected one length, more than {BLOCK + model.anchor_tokens} tokens"
        )
    if len(windows) < 2:
        raise ValueError(f"the text has {len(windows)} windows, expected at least 2: one is held out")
    if model.vision is not None:
        raise ValueError(
            f"the model has a vision tower ({model.spec.vision_type}), expected one of text alone to refine"
        )
    for count, depth in enumerate(calibration.depths):
        path = None if state is None else Path(f"{state}.refining-{depth}")

        def report(step: int, kl: float, count: int = count, depth: int = depth) -> None:
            progress(
                count * steps + step, len(calibration.depths) * steps, f"refining depth {depth}, held-out KL {kl:.4f}"
            )

        _refine_depth(model, calibration, windows, depth, steps, path, seed, report)


def _refine_depth(model, calibration, windows, depth, steps, path, seed, report) -> None:
    fitted, held_out = split(windows)
    held_out = held_out[:HELD_OUT_WINDOWS]
    projection, features = (tensor.to(model.device) for tensor in calibration.at(depth))
    scale = column_scale(model.spec.hidden_size, len(features)).float().to(model.device)
    start = projection.float() / scale
    key = hashlib.sha256(repr((model.fingerprint(), windows, depth, steps, seed)).encode())
    key = hashlib.sha256(key.digest() + start.cpu().numpy().tobytes()).hexdigest()
    deep = DeepLayers(model, depth, features.float() / FEATURE_SCALE)
    inputs, outputs = _ends(model, fitted, depth)
    check_inputs, check_outputs = _ends(model, held_out, depth)

    def check(weight: Tensor) -> float:
        """KL on the held-out windows, in nats a token."""
        starts = torch.arange(check_inputs.shape[1], device=model.device) // BLOCK * BLOCK
        scored = _scored(starts, model.boundary_tokens)
        total = 0.0
        for before, after in zip(check_inputs, check_outputs, strict=True):
            hidden = deep(before[None], weight, starts)[0, scored]
            total += divergence(deep, hidden, after[scored])[0] / len(hidden)
        return total / len(check_inputs)

    now = None if path is None else _State.load(path, key, model.device)
    if now is None:
        now = _State(0, start.clone(), torch.zeros_like(start), torch.zeros_like(start), start, check(start))
    entry = calibration.provenance["depths"][str(depth)]
    entry.setdefault("refined", []).append({"steps": steps, "kl_before": check(start), "kl_after": now.best_kl})
    report(now.step, now.best_kl)
    weight = now.weight.requires_grad_()
    adam = torch.optim.Adam([weight], betas=(0.9, 0.95))
    adam.state[weight] = {"step": torch.tensor(float(now.step)), "exp_avg": now.first, "exp_avg_sq": now.second}
    while now.step < steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + now.step)
        chosen = [_shuffled(len(fitted), seed, now.step * BATCH + i) for i in range(BATCH)]
        tokens = torch.arange(inputs.shape[1], device=model.device)
        shift = int(torch.randint(BLOCK, (), generator=generator))
        starts = ((tokens - shift).div(BLOCK, rounding_mode="floor") * BLOCK + shift).clamp_min(0)
        scored = _scored(starts, model.boundary_tokens)
        with torch.enable_grad():
            hidden = deep(inputs[chosen], weight, starts)[:, scored].flatten(0, 1)
        _, gradient = divergence(deep, hidden.detach(), outputs[chosen][:, scored].flatten(0, 1))
        weight.grad = torch.autograd.grad(hidden, weight, gradient / len(hidden))[0]
        weight.grad[0] = 0  # layer P's own weights are exact
        now.step += 1
        adam.param_groups[0]["lr"] = (
            RATE * min(1.0, now.step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * (now.step - 1) / steps))
        )
        adam.step()
        if now.step % CHECK_EVERY == 0 or now.step == steps:
            kl = check(weight.detach())
            if kl < now.best_kl:
                now.best, now.best_kl = weight.detach().clone(), kl
            if path is not None and now.step < steps:
                now.save(path, key)
        report(now.step, now.best_kl)
    entry["refined"][-1]["kl_after"] = now.best_kl
    calibration.projections[depth] = (now.best * scale).to(projection.dtype).cpu()
    if path is not None:
        path.unlink(missing_ok=True)


def _ends(model, windows: list[list[int]], depth: int) -> tuple[Tensor, Tensor]:
    """The full model's hidden states [windows, T, D] before layer `depth` and after the last."""
    before, after = [], []
    for window in windows:
        states = list(model.hidden_states([window]))
        before.append(states[depth])
        after.append(states[-1])
    return torch.stack(before), torch.stack(after)


def _scored(starts: Tensor, boundary_tokens: int) -> Tensor:
    """Which tokens predict a token of the answer: those with a prompt before their block, from its last token on."""
    return (starts >= BLOCK) & (torch.arange(len(starts), device=starts.device) - starts >= boundary_tokens - 1)


def _shuffled(count: int, seed: int, position: int) -> int:
    """Entry `position` of an endless sequence of shuffles of range(count)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position // count)
    return int(torch.randperm(count, generator=generator)[position % count])
