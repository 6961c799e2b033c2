"""What tests of the runner on a device share.

On the double every operation runs its CUDA kernel on the PTX emulator, mixing devices raises, and each copy and wait
is counted by file and line.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from helpers import COMMON, CUDA_SIZES, NEAR_TIE, TINY, Tiny
from vision_models import TINY_VISION

import pop_ext

DEVICE = os.environ.get("POP_TEST_DEVICE", "gpudouble")
on_the_double = pytest.mark.skipif(DEVICE != "gpudouble", reason="counts and refusals are the double's")
CACHE = 2048  # tokens
# TINY_VISION's families in sizes that CUDA takes. Qwen3-VL: DeepStack, positions of three axes; Gemma-3: attention in
# both directions within an image, whole and in crops.
VISION_SIZES = {
    "qwen3_vl": dict(intermediate_size=104),
    "gemma3": dict(hidden_size=96, intermediate_size=112),
    "gemma3_pan": dict(intermediate_size=96),
}
_folders = {}


def bound(layers: int) -> float:
    """How far bfloat16 may take the logits, normwise: about eight roundings a layer, and two for norm and logits, each
    of 2^-8 at most; errors of either sign add up as the root of their number.
    """
    return 2**-8 * (8 * layers + 2) ** 0.5


def device_folder(family: str, tmp_path_factory):
    if family not in _folders:
        tiny = TINY[family]
        folder = tmp_path_factory.mktemp("device") / family
        _folders[family] = Tiny(tiny.config, tiny.sizes | CUDA_SIZES[family]).make(folder, seed=7)
    return _folders[family]


def vision_device_folder(family: str, tmp_path_factory):
    if "vision " + family not in _folders:
        tiny, folder = TINY_VISION[family], tmp_path_factory.mktemp("device") / family
        _folders["vision " + family] = replace(tiny, text=tiny.text | VISION_SIZES[family]).make(folder, seed=5)
    return _folders["vision " + family]


def draw_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def load_both(folder, **settings):
    settings = {"max_cache_tokens": CACHE, **settings}
    return pop_ext.load(folder, device="cpu", **settings), pop_ext.load(folder, device=DEVICE, **settings)


def assert_same_tokens(cpu, ours: list[list[int]], prompts, depth=None, visuals=None) -> int:
    """Each token is the CPU's for the tokens before it, but where its two best logits are near a tie. Returns how many
    are not."""
    agreed = 0
    for prompt, tokens, images in zip(prompts, ours, visuals or [[]] * len(prompts), strict=True):
        logits = cpu.logits([prompt], [tokens], visuals=[images], prefill_depth=depth)[0]
        top = logits.topk(2).values
        clear = top[:, 0] - top[:, 1] > NEAR_TIE * logits.std(dim=-1)
        assert torch.equal(logits.argmax(-1)[clear], torch.tensor(tokens)[clear])
        agreed += int(clear.sum())
    return agreed


def generate(model, prompts, graphs=True, **settings):
    model.cuda_graphs, model.decode_buffers = graphs, {}
    return model.generate(prompts, **{"do_sample": False, "max_new_tokens": 8, **settings})
