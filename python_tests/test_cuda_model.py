"""Whole models whose every operation runs CUDA kernels, on the GPU or the PTX emulator, and the CPU's: both against
float64.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from helpers import (
    COMMON,
    CUDA_SIZES,
    NEAR_TIE,
    TINY,
    Tiny,
    cuda_operations,
    normwise,
    real_model,
    text_ids,
    transformers_model,
)
from reference_pop import ReferencePOP

import pop_ext
import pop_ext.runtime.layers
from pop_ext import ops


def align(weights) -> None:
    """Copies the tensors that lie in the file's mapping: on a GPU they would have come to addresses of 16 n."""
    for owner in (weights, *weights.layers):
        for name, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and value.data_ptr() % 16:
                setattr(owner, name, value.clone())


@contextmanager
def rounding_noise(model, seed: int):
    """Every submodule's output times 1 + u r, r uniform in [-1, 1], u = 2^-8: bfloat16's rounding at its largest."""
    generator = torch.Generator().manual_seed(seed)

    def hook(module, args, output):
        if not isinstance(output, torch.Tensor):
            return None
        noise = 2 * torch.rand(output.shape, generator=generator, dtype=output.dtype) - 1
        return output * (1 + 2**-8 * noise)

    modules = [m for m in model.modules() if m is not model.get_output_embeddings()]
    handles = [m.register_forward_hook(hook) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def references(folder, depth, prompts, answers):
    """For each prompt: float64 logits for the weights as bfloat16 rounds them, and how far rounding may lead away:
    1.5 times the furthest that noise of its size took the reference itself, normwise, in three runs.
    """
    peer = transformers_model(folder, torch.bfloat16).double()
    results = []
    for prompt, answer in zip(prompts, answers, strict=True):
        exact, errors = ReferencePOP(peer, depth).logits(prompt, answer), []
        for seed in range(3):
            with rounding_noise(peer, seed):
                errors.append(normwise(ReferencePOP(peer, depth).logits(prompt, answer), exact))
        results.append((exact, 1.5 * max(errors)))
    return results


def check(logits, expected, name: str) -> None:
    shares = [normwise(ours, exact) / bound for ours, (exact, bound) in zip(logits, expected, strict=True)]
    print(name, [f"{share:.2f}" for share in shares])
    assert max(shares) <= 1, f"{name}: errors are {shares} of what rounding allows"


def compare(monkeypatch, folder, prompts, depth, tokens):
    """The CPU in bfloat16, by every instruction set of this machine, and then CUDA, each against float64 for the greedy
    tokens of the former; where the first choice is clear, CUDA's is the same.
    """
    operations = cuda_operations()
    model = pop_ext.load(folder, prefill_depth=depth)
    chosen = model.generate(prompts, max_new_tokens=tokens, do_sample=False).tokens
    expected = references(folder, model.resolve_prefill_depth(), prompts, chosen)
    before = ops.cpu_isa()
    try:
        for isa in ops.cpu_isas():
            ops.set_cpu_isa(isa)
            check(model.logits(prompts, chosen), expected, isa)
    finally:
        ops.set_cpu_isa(before)
    align(model.weights)
    monkeypatch.setattr(pop_ext.runtime.layers, "pop", operations)
    logits = model.logits(prompts, chosen)
    check(logits, expected, "CUDA")
    agreed = 0
    for ours, (exact, _) in zip(logits, expected, strict=True):
        top = exact.topk(2).values
        clear = top[:, 0] - top[:, 1] > NEAR_TIE * exact.std(dim=-1)
        assert torch.equal(ours.argmax(-1)[clear], exact.argmax(-1)[clear])
        agreed += int(clear.sum())
    assert agreed > tokens * len(prompts) // 2, "near ties nearly everywhere"


@pytest.mark.parametrize("family", list(CUDA_SIZES))
def test_tiny_models(monkeypatch, tmp_path, family):
    tiny = TINY[family]
    folder = Tiny(tiny.config, tiny.sizes | CUDA_SIZES[family]).make(tmp_path / family, seed=7)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, COMMON["vocab_size"], (n,), generator=generator).tolist() for n in (3, 90, 40)]
    for depth in (3, 1.0):
        with monkeypatch.context() as patch:
            compare(patch, folder, prompts, depth, tokens=8)


def test_smollm2(monkeypatch):
    """Truncated prefill of a real prompt, projection, boundary and decode."""
    folder = real_model("smollm2-135m")
    compare(monkeypatch, folder, [text_ids(folder)[:96]], depth=20, tokens=5)
