"""Whole models whose every operation runs CUDA kernels, on the GPU or the PTX emulator, against the CPU's."""

from __future__ import annotations

import pytest
import torch
from helpers import COMMON, TINY, Tiny, cuda_operations, normwise, real_model
from test_real_models import text_ids

import pop_ext
import pop_ext.model

# TINY's families in sizes that CUDA takes: multiples of 8, and heads of 32, 64, 128 or 256.
SIZES = {
    "llama": dict(hidden_size=72, intermediate_size=192),
    "llama_untied_bias": dict(hidden_size=104, intermediate_size=200),
    "mistral": dict(hidden_size=80, intermediate_size=152, head_dim=64),
    "qwen2": dict(hidden_size=192, intermediate_size=80),
    "qwen2_window": dict(intermediate_size=104),
    "qwen3": dict(hidden_size=72),
    "gemma3": dict(hidden_size=96, intermediate_size=176),
    "gemma3_gqa": dict(hidden_size=144, intermediate_size=96),
}
# The lead over the second token, relative to the logits' spread, from which on the first must be the same.
NEAR_TIE = 0.05


def align(weights) -> None:
    """Copies the tensors that lie in the file's mapping: on a GPU they would have come to addresses of 16 n."""
    for owner in (weights, *weights.layers):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
                setattr(owner, name, value.clone())


def compare(monkeypatch, folder, prompts, depth, tokens, bound):
    """Greedy tokens of the CPU, then CUDA's logits for the same tokens. Both round to bfloat16 at the same places, from
    sums in another order: `bound` is how far apart that may take them.
    """
    operations = cuda_operations()
    model = pop_ext.load(folder, prefill_depth=depth)
    chosen = model.generate(prompts, max_new_tokens=tokens, do_sample=False).tokens
    expected = model.logits(prompts, chosen)
    align(model.weights)
    monkeypatch.setattr(pop_ext.model, "pop", operations)
    logits = model.logits(prompts, chosen)
    agreed = 0
    for ours, cpu, ids in zip(logits, expected, chosen, strict=True):
        assert normwise(ours, cpu) <= bound
        top = cpu.topk(2).values
        clear = top[:, 0] - top[:, 1] > NEAR_TIE * cpu.std(dim=-1)
        assert torch.equal(ours.argmax(-1)[clear], torch.tensor(ids)[clear])
        agreed += int(clear.sum())
    assert agreed > tokens * len(prompts) // 2, "near ties nearly everywhere"


@pytest.mark.parametrize("family", list(SIZES))
def test_tiny_models(monkeypatch, tmp_path, family):
    tiny = TINY[family]
    folder = Tiny(tiny.config, tiny.sizes | SIZES[family]).make(tmp_path / family, seed=7)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in (3, 90, 40)]
    for depth in (3, 1.0):
        with monkeypatch.context() as patch:
            compare(patch, folder, prompts, depth, tokens=8, bound=0.02)


def test_smollm2(monkeypatch):
    """Truncated prefill of a real prompt, projection, boundary and decode. (The CPU's own bfloat16 logits are 0.01 to
    0.02 from its float32 ones here.)
    """
    folder = real_model("smollm2-135m")
    compare(monkeypatch, folder, [text_ids(folder)[:96]], depth=20, tokens=5, bound=0.05)
