"""Prefill depths: as a number or a share of the layers, and as text."""

import re


def resolve_depth(depth: int | float, layers: int) -> int:
    """A prefill depth in layers, of a model of `layers`: an int counts them, a float in (0, 1] is their share."""
    if isinstance(depth, bool) or not isinstance(depth, int | float):
        raise TypeError(f"prefill_depth is {depth!r}, expected layers (int) or a share of them (float)")
    if isinstance(depth, float):
        if not 0 < depth <= 1:
            raise ValueError(f"prefill_depth is {depth}, expected a share of the layers in (0, 1]")
        depth = max(1, int(depth * layers + 0.5))
    if not 1 <= depth <= layers:
        raise ValueError(f"prefill_depth is {depth}, expected 1 to {layers} layers (or a float, a share of them)")
    return depth


def parse_depth(text: str) -> float:
    """A prefill depth: "12" is 12 layers and "1" is one, "0.7" is a share of the layers and "1.0" is all of them."""
    if re.fullmatch(r"\s*[+-]?\d+\s*", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--prefill-depth is {text!r}, expected a number of layers (12) or a share of them (0.7)"
        ) from None


def layers_of(text: str, layers: int) -> int:
    """A prefill depth in layers, of a model of `layers` whose prompts it truncates."""
    depth = parse_depth(text)
    found = resolve_depth(depth, layers) if isinstance(depth, float) and 0 < depth <= 1 else depth
    if found not in range(1, layers):
        raise ValueError(
            f"prefill_depth is {text}, expected 1 to {layers - 1} of the model's {layers} layers, or their share"
        )
    return int(found)
