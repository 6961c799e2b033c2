"""Checks of what the model is called with."""

from __future__ import annotations

import torch

from ..checkpoints.families import ModelSpec
from ..checkpoints.prefill_plan import PrefillPlan
from ..vision.spans import ImageSpan


def check_image_spans(visuals, prompts, spec: ModelSpec, depth: int | None = None) -> list[list[ImageSpan]]:
    """A list of images for each prompt. ValueError unless they lie in their prompts in order, for this model, and the
    prefill depth is enough for them.
    """
    if visuals is None:
        return [[] for _ in prompts]
    if not isinstance(visuals, list | tuple) or len(visuals) != len(prompts):
        raise ValueError(f"visuals is {visuals!r:.80}, expected a list for each of the {len(prompts)} prompts")
    for i, (images, prompt) in enumerate(zip(visuals, prompts, strict=True)):
        end = 0
        for visual in images:
            if spec.vision_type is None:
                raise ValueError(f"visuals[{i}] has images, but this model ({spec.model_type}) reads text only")
            if not end <= visual.start < visual.end <= len(prompt):
                raise ValueError(
                    f"visuals[{i}] has an image at [{visual.start}, {visual.end}), expected [{end}, {len(prompt)})"
                )
            end, shape = visual.end, tuple(visual.features.shape)
            if shape[1:] != (visual.end - visual.start, spec.hidden_size):
                raise ValueError(f"visuals[{i}] has features of shape {shape}, expected (1 + d, tokens, hidden size)")
            if depth is not None and depth < shape[0] - 1:
                raise ValueError(
                    f"prefill_depth is {depth} layers, expected at least {shape[0] - 1} for a prompt with images: "
                    f"DeepStack adds visual features to the hidden state after each of the first {shape[0] - 1} layers"
                )
    return [list(images) for images in visuals]


def check_token_lists(name: str, lists: list[list[int]], vocab_size: int, least: int = 1) -> None:
    """TypeError or ValueError unless `lists` holds lists of at least `least` token ids."""
    if not isinstance(lists, list | tuple):
        raise TypeError(f"{name} is {lists!r:.80}, expected a list of lists of token ids")
    for i, token_ids in enumerate(lists):
        if not isinstance(token_ids, list | tuple) or not all(type(token) is int for token in token_ids):
            raise TypeError(f"{name}[{i}] is {token_ids!r:.80}, expected a list of token ids (int)")
        if len(token_ids) < least:
            raise ValueError(f"{name}[{i}] is empty, expected at least one token id")
        wrong = next((token for token in token_ids if not 0 <= token < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name}[{i}] has token id {wrong}, expected 0 to {vocab_size - 1}")


def check_count(name: str, value, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r}, expected an int of {least} or more")


def check_share(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}, expected a share in [0, 1]")


def check_plan(plan: PrefillPlan | None, spec: ModelSpec, deep_tokens: float) -> None:
    """TypeError or ValueError for a prefill plan that cannot be run."""
    if plan is None:
        return
    if not isinstance(plan, PrefillPlan):
        raise TypeError(f"prefill_plan is of type {type_name(plan)}, expected a PrefillPlan or None")
    if len(plan.attention) != spec.num_layers:
        raise ValueError(f"prefill_plan has {len(plan.attention)} layers, expected the model's {spec.num_layers}")
    if plan.partial and spec.vision_type is not None:
        raise ValueError(
            f"prefill_plan runs parts of layers, which a vision-language model ({spec.vision_type}) is not run in: "
            "expected a model of text alone, or prefill_depth"
        )
    if plan.partial and deep_tokens:
        raise ValueError(
            f"deep_tokens is {deep_tokens}, expected 0 with a prefill_plan that runs parts of layers: deep tokens run "
            "through all of them, and are chosen above"
        )


def check_integer(name: str, value) -> None:
    if value is not None and not is_integer(value):
        raise TypeError(f"{name} is of type {type_name(value)}, expected an int")


def is_integer(value) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | torch.Tensor)


def type_name(value) -> str:
    return type(value).__name__
