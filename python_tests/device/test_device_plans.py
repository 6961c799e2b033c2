"""Prefill plans on a device, with the CPU's results."""

from __future__ import annotations

import pytest
import torch
from helpers import normwise
from on_device import DEVICE, assert_same_tokens, bound, draw_prompts, load_both, on_the_double

from pop_ext.checkpoints.prefill_plan import PrefillPlan


@pytest.fixture
def plan_file(llama, tmp_path):
    """Of six layers: attentions without MLPs, an MLP without attention, and a layer of which nothing runs."""
    cpu, _ = load_both(llama)
    path = tmp_path / "plan.json"
    PrefillPlan(
        (True, False, True, False, True, False), (True, True, False, False, False, False), cpu.fingerprint()
    ).save(path)
    return path


def test_the_cpus_tokens(llama, plan_file):
    cpu, ours = load_both(llama, prefill_plan=plan_file)
    assert ours.device.type == torch.device(DEVICE).type
    assert (
        len(ours.weights.projection) == 5 < len(cpu.weights.projection) == 6
    )  # from the first attention that is skipped
    prompts = draw_prompts(3, 90, 40)
    tokens = ours.generate(prompts, max_new_tokens=8, do_sample=False).tokens
    assert assert_same_tokens(cpu, tokens, prompts) > 12
    results = []
    for model, depth in ((cpu, None), (ours, None), (cpu, 5)):
        model.chunk_tokens = 37
        sequences = [model.new_sequence() for _ in prompts]
        results.append(model.prefill(sequences, prompts, prefill_depth=depth)[0].cpu())
    assert normwise(results[1], results[0]) <= 2 * bound(6) < normwise(results[2], results[0])


@on_the_double
def test_a_forward_pass_is_one_copy(llama, plan_file, log):
    """Nothing waits, and nothing comes back."""
    _, model = load_both(llama, prefill_plan=plan_file)
    sequences = [model.new_sequence() for _ in range(3)]
    log.clear()
    model.prefill(sequences, draw_prompts(3, 90, 40))
    assert [(e.kind, e.where.partition(":")[0]) for e in log] == [("to device", "transfer.py")]
