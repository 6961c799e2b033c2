"""SmolLM2-135M and Gemma-3-270M on real text: full depth against transformers in float32 and bfloat16, truncated depth
against `reference_pop`. Skips where a model's package is missing."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, normwise, text_ids, transformers_model
from pairs import batched_logits
from reference_pop import ReferencePOP
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig

import pop_ext

sys.path.insert(0, str(ROOT / "bench"))

from engines import fast_dtype

BOUND = 1e-5
WORSE = 1.1  # how much further from float32 our bf16 may be than the worse of transformers' own
# (prompt, continuation): prompts on both sides of block edges and of Gemma's window of 512; 2,100 positions in all
WINDOWS = [(1, 350), (17, 350), (64, 350), (129, 350), (300, 350), (520, 350)]


@pytest.fixture(scope="module")
def setup(real):
    """The model's folder, windows of text (with BOS where the model wants one), and transformers in float32."""
    config = AutoConfig.from_pretrained(real)
    ids, windows, at = text_ids(real), [], 0
    for prompt, continuation in WINDOWS:
        first = [config.bos_token_id] if config.model_type == "gemma3_text" else [ids[at]]
        piece = first + ids[at + 1 : at + prompt + continuation]
        windows.append((piece[:prompt], piece[prompt:]))
        at += prompt + continuation
    yield SimpleNamespace(folder=real, windows=windows, peer=transformers_model(real), layers=config.num_hidden_layers)
    gc.collect()


@pytest.fixture(scope="module")
def model(setup):
    yield pop_ext.load(setup.folder, dtype=torch.float32)
    gc.collect()


@torch.no_grad()
def plain_logits(peer, prompt, continuation):
    """transformers, all at once: the float32 logits that predict the continuation."""
    ids = torch.tensor([prompt + continuation[:-1]])
    return peer(ids, logits_to_keep=len(continuation)).logits[0].float()


def test_full_depth_is_transformers(setup, model):
    for prompt, continuation in setup.windows:
        expected = plain_logits(setup.peer, prompt, continuation[:24])
        ours = model.logits([prompt], [continuation[:24]])[0]
        assert normwise(ours, expected) <= BOUND, f"prompt of {len(prompt)}"
        assert normwise(ours[0], expected[0]) <= BOUND, f"the prefill's own logits, prompt of {len(prompt)}"


def test_last_layer_costs_nothing(setup, model):
    prompt, continuation = setup.windows[4]
    full = model.logits([prompt], [continuation[:16]])[0]
    assert normwise(model.logits([prompt], [continuation[:16]], prefill_depth=setup.layers - 1)[0], full) <= 1e-6


def test_greedy_tokens_are_transformers(setup, model):
    """64 tokens of two prompts in a batch: the same choice as transformers given the same past, near ties excepted."""
    prompts = [setup.windows[1][0], setup.windows[3][0]]
    eos = model.generation_config.eos_token_id
    assert eos is not None
    made = model.generate(prompts, max_new_tokens=64, min_new_tokens=64, do_sample=False, repetition_penalty=1.0).tokens
    for prompt, tokens in zip(prompts, made, strict=True):
        logits = plain_logits(setup.peer, prompt, tokens)
        logits[:, eos] = -torch.inf  # min_new_tokens forbids it
        best = logits.topk(2).values
        assert ((logits.argmax(-1) == torch.tensor(tokens)) | (best[:, 0] - best[:, 1] < 1e-3)).all()


@pytest.mark.parametrize("boundary, anchors", [(1, 1), (5, 1), (1, 0)])
def test_truncated_depth_is_the_reference(setup, model, boundary, anchors):
    model.boundary_tokens, model.anchor_tokens = boundary, anchors
    depth = setup.layers * 2 // 3
    try:
        for prompt, continuation in [setup.windows[3]] if (boundary, anchors) != (1, 1) else setup.windows[2::3]:
            expected = ReferencePOP(setup.peer, depth, boundary, anchors).logits(prompt, continuation[:16])
            ours = model.logits([prompt], [continuation[:16]], prefill_depth=depth)[0]
            assert normwise(ours, expected) <= BOUND, f"prompt of {len(prompt)}"
    finally:
        model.boundary_tokens, model.anchor_tokens = 1, 1


def test_second_turn_is_the_reference(setup, model):
    depth = setup.layers // 2
    (first, answer), (second, _) = setup.windows[2], setup.windows[3]
    reference, sequence = ReferencePOP(setup.peer, depth), model.new_sequence()
    reference.logits(first, answer[:5])
    model.prefill([sequence], [first], prefill_depth=depth)
    for token in answer[:4]:
        model.decode([sequence], [token])
    sequence.token_ids.append(answer[4])  # sampled last, not run
    reference.decode([answer[4]])
    ours, _ = model.prefill([sequence], [second], prefill_depth=depth)
    assert normwise(ours[0], reference.prompt(second)) <= BOUND
    model.free(sequence)


class Float32Products(TorchDispatchMode):
    """bfloat16 matrix multiplications and attention on the inputs' float32 values, results rounded to bfloat16: what
    bfloat16 instructions give, but for the order of sums, where torch has none and would take minutes.
    """

    FUNCTIONS = (
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        args, kwargs = (args, kwargs or {})
        if function not in self.FUNCTIONS:
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, Tensor.float, (args, kwargs))
        return tree_map_only(torch.Tensor, Tensor.bfloat16, function(*args, **kwargs))


def test_float32_products_are_bfloat16_ones():
    a, b = torch.randn(50, 300).bfloat16(), torch.randn(300, 40).bfloat16()
    with Float32Products():
        product = a @ b
    exact = a.double() @ b.double()
    assert product.dtype == torch.bfloat16
    assert ((product.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def distances(logits: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Sum of squared logit errors d, and sum over positions of KL(exact || logits) in nats: with p the softmax of
    exact, log(1 + sum p (e^d - 1)) - sum p d.
    """
    squared = kl = 0.0
    for a, b in zip(logits.split(50), exact.split(50), strict=True):
        p, d = b.softmax(-1), a - b
        squared += d.square().sum(dtype=torch.float64).item()
        kl += (torch.linalg.vecdot(p, d.expm1()).log1p() - torch.linalg.vecdot(p, d)).sum(dtype=torch.float64).item()
    return squared, kl


def test_distances():
    exact = torch.randn(60, 1000)
    logits = exact + 0.1 * torch.randn(60, 1000)
    log_p, log_q = (x.double().log_softmax(-1) for x in (exact, logits))
    expected = (logits - exact).square().sum(), (log_p.exp() * (log_p - log_q)).sum()
    assert distances(logits, exact) == pytest.approx([x.item() for x in expected], rel=1e-4)


def test_bfloat16_is_as_near_as_transformers(setup):
    """RMS logit error and KL against float32: at most 1.1 times those of the worse of transformers' two attentions."""
    ours = pop_ext.load(setup.folder)  # bfloat16 is the default
    assert ours.dtype == torch.bfloat16
    products = Float32Products if fast_dtype() == "float32" else nullcontext
    peers = {kind: transformers_model(setup.folder, torch.bfloat16, kind) for kind in ("sdpa", "eager")}
    sums, positions, size = {name: [0.0, 0.0] for name in ("ours", *peers)}, 0, 0
    # a batch decodes in a fraction of the time that its sequences would take one by one
    own_logits = batched_logits(ours, *zip(*setup.windows, strict=True), setup.layers)
    for (prompt, continuation), own in zip(setup.windows, own_logits, strict=True):
        exact = plain_logits(setup.peer, prompt, continuation)
        positions, size = positions + len(exact), size + exact.numel()
        for name, total in sums.items():
            if name == "ours":
                logits = own
            else:
                with products():
                    logits = plain_logits(peers[name], prompt, continuation)
            squared, kl = distances(logits, exact)
            total[0] += squared
            total[1] += kl
    assert positions >= 2000
    table = {name: ((squared / size) ** 0.5, kl / positions) for name, (squared, kl) in sums.items()}
    text = ", ".join(f"{name}: RMS {rms:.4f}, KL {kl:.2e}" for name, (rms, kl) in table.items())
    print(text)
    for i in range(2):
        assert table["ours"][i] <= WORSE * max(table["sdpa"][i], table["eager"][i]), text
