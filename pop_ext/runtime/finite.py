"""NaN and infinity: seen in the logits, where it costs nothing, and traced to where they come from only then."""

from __future__ import annotations

from math import isfinite

import numpy as np
from torch import Tensor


class NonFiniteError(ValueError):
    """The model's logits are not numbers: its weights are damaged, or too large for the dtype."""


def check_logits(logits: Tensor) -> None:
    """NonFiniteError if any row of logits [rows, vocabulary] has NaN or positive infinity in it, or no number."""
    if not logits.numel():
        return
    # numpy's maximum is many times faster than torch's on a processor, and lets NaN through alike
    peaks = np.isfinite(logits.numpy().max(-1)) if logits.is_cpu else logits.amax(-1).isfinite()
    if not bool(peaks.all()):
        raise NonFiniteError("the logits are not finite")


def check_chosen(logits: Tensor, tokens: list[int]) -> None:
    """`check_logits` for the likeliest tokens: NaN goes before every number there, so no other has to be checked."""
    chosen = logits.numpy() if logits.is_cpu else logits
    if not all(isfinite(chosen[row, token]) for row, token in enumerate(tokens)):
        raise NonFiniteError("the logits are not finite")


def check_weights(weights) -> None:
    """NonFiniteError that names the first of `ModelWeights` with NaN or infinity in it. Reads all of them."""
    if (bad := _bad_weight(weights)) is not None:
        raise NonFiniteError(f"the weights have NaN or infinity in {bad}")


def explained(error: NonFiniteError, model, prompts: list[list[int]]) -> NonFiniteError:
    """The error with its cause, if it can be found: the first bad tensor, else the first layer whose output is bad."""
    if (bad := _bad_weight(model.weights)) is not None:
        return NonFiniteError(f"{error}: the weights have NaN or infinity in {bad}")
    for prompt in prompts:
        try:
            for layer, hidden in enumerate(model.hidden_states([prompt])):
                if not hidden.isfinite().all():
                    where = f"layer {layer - 1}" if layer else "the embedding"
                    return NonFiniteError(f"{error}: the weights are finite, but what {where} makes of them is not")
        except ValueError:  # no room in the cache
            break
    return NonFiniteError(f"{error}, though the weights and the prompt's hidden states are")


def _bad_weight(weights) -> str | None:
    tensors = [("the embedding", weights.embedding)]
    for index, layer in enumerate(weights.layers):
        tensors += [(f"layer {index}, {name}", value) for name, value in vars(layer).items() if value is not None]
    tensors += [("the final norm", weights.final_norm), ("lm_head", weights.lm_head)]
    return next((name for name, value in tensors if not value.isfinite().all()), None)
