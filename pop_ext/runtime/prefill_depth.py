"""Prefill depths as text."""

import re


def parse_depth(text: str) -> float:
    """A prefill depth: "12" is 12 layers and "1" is one, "0.7" is a share of the layers and "1.0" is all of them."""
    if re.fullmatch(r"\s*[+-]?\d+\s*", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        raise ValueError(
            f"--prefill-depth must be a number of layers (12) or a share of them (0.7), got {text!r}"
        ) from None


def layers_of(text: str, layers: int) -> int:
    """A prefill depth in layers, of a model of `layers` whose prompts it truncates."""
    depth = parse_depth(text)
    if isinstance(depth, float) and 0 < depth <= 1:
        depth = max(1, int(depth * layers + 0.5))
    if depth not in range(1, layers):
        raise ValueError(
            f"prefill_depth is {text}, expected 1 to {layers - 1} of the model's {layers} layers, or their share"
        )
    return depth
