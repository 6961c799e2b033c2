"""Whole models whose every operation runs CUDA kernels, on the GPU or the software CUDA device, and the CPU's,
against float64."""

from __future__ import annotations

import pytest
import torch
from helpers import COMMON, TINY, Tiny, cuda_operations, normwise, real_model, transformers_model
from reference_pop import ReferencePOP
from test_real_models import text_ids

import pop_ext
import pop_ext.runtime.model
from pop_ext import ops

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


def bound(layers: int) -> float:
    """How far bfloat16 may take the logits, normwise. On its way through a layer a token's state is rounded about eight
    times (two norms, query and value, attention's output, two sums with the residual, the gated product), each time by
    at most u = 2^-8 of its size; errors of either sign add up as the root of their number. The final norm and the
    logits are two roundings more.
    """
    return 2**-8 * (8 * layers + 2) ** 0.5


def compare(monkeypatch, folder, prompts, depth, tokens):
    """The CPU in bfloat16, by every instruction set of this machine, and then CUDA, each against float64 for the greedy
    tokens of the former; where the CPU's first choice is clear, CUDA's is the same.
    """
    operations = cuda_operations()
    model = pop_ext.load(folder, prefill_depth=depth)
    chosen = model.generate(prompts, max_new_tokens=tokens, do_sample=False).tokens
    peer = transformers_model(folder, torch.bfloat16).double()  # the weights as ours are rounded
    pairs = zip(prompts, chosen, strict=True)
    exact = [ReferencePOP(peer, model.prefill_depth).logits(prompt, answer) for prompt, answer in pairs]
    limit = bound(model.spec.num_layers)
    for isa in ops.cpu_isas():
        before = ops.cpu_isa()
        ops.set_cpu_isa(isa)
        try:
            expected = model.logits(prompts, chosen)
        finally:
            ops.set_cpu_isa(before)
        print(
            isa, [f"{normwise(ours, reference) / limit:.2f}" for ours, reference in zip(expected, exact, strict=True)]
        )
        for ours, reference in zip(expected, exact, strict=True):
            assert normwise(ours, reference) <= limit, isa
    align(model.weights)
    monkeypatch.setattr(pop_ext.runtime.model, "pop", operations)
    logits = model.logits(prompts, chosen)
    agreed = 0
    print("cuda", [f"{normwise(ours, reference) / limit:.2f}" for ours, reference in zip(logits, exact, strict=True)])
    for ours, reference in zip(logits, exact, strict=True):
        assert normwise(ours, reference) <= limit
        top = reference.topk(2).values
        clear = top[:, 0] - top[:, 1] > NEAR_TIE * reference.std(dim=-1)
        assert torch.equal(ours.argmax(-1)[clear], reference.argmax(-1)[clear])
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
            compare(patch, folder, prompts, depth, tokens=8)


def test_smollm2(monkeypatch):
    """Truncated prefill of a real prompt, projection, boundary and decode."""
    folder = real_model("smollm2-135m")
    compare(monkeypatch, folder, [text_ids(folder)[:96]], depth=20, tokens=5)
