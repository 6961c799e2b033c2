"""The frequencies of a config's rotary embeddings."""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .families import MODEL_FAMILIES, head_size, rope_parameters, text_config


def rope_frequencies(config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """inv_freq [ropes, E/2] float32, scaling [ropes] float32 (YaRN multiplies cos and sin), and axes [E/2] int64: with
    multimodal RoPE the axis that each frequency turns with, else None.

    The order is that of `ModelSpec.rope_index`. ValueError where the config's parameters give no finite frequencies.
    """
    config = text_config(config)
    inv_freq, scaling, axes = [], [], None
    for layer_type, parameters in rope_parameters(config).items():
        name = f"rope_parameters[{layer_type!r}]" if layer_type else "rope_parameters"
        try:
            if parameters["rope_type"] == "default":
                exponents = torch.arange(0, head_size(config), 2, dtype=torch.float32) / head_size(config)
                frequencies, scale = 1.0 / parameters["rope_theta"] ** exponents, 1.0
            else:
                init = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
                frequencies, scale = init(config, torch.device("cpu"), layer_type=layer_type)
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
        if not (frequencies.isfinite().all() and 0 < scale < float("inf")):
            raise ValueError(f"{name}: frequencies are not finite")
        inv_freq.append(frequencies)
        scaling.append(scale)
        if MODEL_FAMILIES[config.model_type].mrope:
            _, *shares = parameters.get("mrope_section") or (24, 20, 20)  # transformers' default
            axes = torch.zeros(len(frequencies), dtype=torch.int64)
            for axis, share in enumerate(shares, start=1):
                axes[axis : 3 * share : 3] = axis
    return torch.stack(inv_freq).float(), torch.tensor(scaling, dtype=torch.float32), axes
