"""Speed: prefill by prompt length and depth, and decode after it, in rounds that take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..runtime.device import synchronize
from ..runtime.generation import Model


@dataclass
class Speed:
    """Of one prompt length and prefill depth: tokens a second, one number a round."""

    prompt_tokens: int
    prefill_depth: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def spread(rates: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of a single number."""
    return statistics.mean(rates), statistics.stdev(rates) if len(rates) > 1 else 0.0


@torch.no_grad()
def measure_speed(
    model: Model,
    prompt_tokens: list[int],
    depths: list[int],
    *,
    decode_tokens: int = 32,
    rounds: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Speed]:
    """Times random prompts of each length at each prefill depth, then greedy decoding of `decode_tokens`.

    A round measures every length and depth once, so that what slows the machine down for a while slows all of them. One
    round before the first is not counted.
    """
    generator = torch.Generator().manual_seed(seed)
    results = [Speed(length, depth) for length in prompt_tokens for depth in depths]
    for number in range(rounds + 1):
        for index, result in enumerate(results):
            progress(number * len(results) + index, (rounds + 1) * len(results))
            prompt = torch.randint(model.spec.vocab_size, (result.prompt_tokens,), generator=generator).tolist()
            with model.new_sequence() as sequence:
                start = time.perf_counter()
                logits, _ = model.prefill([sequence], [prompt], prefill_depth=result.prefill_depth)
                synchronize(model.device)
                middle = time.perf_counter()
                for _ in range(decode_tokens):
                    logits = model.decode([sequence], [int(logits[0].argmax())])
                synchronize(model.device)
                end = time.perf_counter()
            if number:
                result.prefill.append(result.prompt_tokens / (middle - start))
                result.decode.append(decode_tokens / (end - middle))
    return results


def processor_name(model: Model) -> str:
    """What the model runs on, as the system names it, and on a processor the instruction set of its kernels."""
    if model.device.type != "cpu":
        return torch.get_device_module(model.device).get_device_name(model.device)
    from .. import ops

    return f"{ops.build_info()['processor']}, {ops.cpu_isa()}, {torch.get_num_threads()} threads"
