"""Forward passes on a device against the CPU: tokens, logits, and what goes between device and host."""

from __future__ import annotations

import pytest
import torch
from helpers import normwise, real_model, text_ids
from on_device import (
    CACHE,
    DEVICE,
    assert_same_tokens,
    bound,
    draw_prompts,
    load_both,
    on_the_double,
)

import pop_ext
from pop_ext import transfer


@pytest.mark.parametrize("depth", [3, 1.0])
def test_the_cpus_tokens(folder, depth):
    cpu, ours = load_both(folder, prefill_depth=depth)
    assert ours.device.type == torch.device(DEVICE).type
    prompts = draw_prompts(3, 90, 40)
    tokens = ours.generate(prompts, max_new_tokens=8, do_sample=False).tokens
    assert assert_same_tokens(cpu, tokens, prompts) > 12
    logits = [model.prefill([model.new_sequence() for _ in prompts], prompts)[0].cpu() for model in (cpu, ours)]
    assert normwise(logits[1], logits[0]) <= 2 * bound(cpu.spec.num_layers)


@pytest.mark.parametrize("boundary", [3, 0])
def test_chunks_and_turns(folder, boundary):
    """A second turn, and prompts cut into passes, have the logits of the CPU's."""
    cpu, ours = load_both(folder, prefill_depth=2, boundary_tokens=boundary)
    first, second, more = draw_prompts(70, 33, 80)
    for model in (cpu, ours):
        model.chunk_tokens = 37
    results = []
    for model in (cpu, ours):
        sequences = [model.new_sequence(), model.new_sequence()]
        model.prefill(sequences, [first, second])
        model.decode(sequences, [5, 6])
        results.append(torch.cat([model.prefill(sequences, [more, second])[0], model.decode(sequences, [7, 8])]).cpu())
    assert normwise(results[1], results[0]) <= 2 * bound(cpu.spec.num_layers)


def test_float16(llama):
    cpu = pop_ext.load(llama, device="cpu", dtype=torch.float32, prefill_depth=3)
    ours = pop_ext.load(llama, device=DEVICE, dtype=torch.float16, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(50, 9)
    logits = [model.prefill([model.new_sequence() for _ in prompts], prompts)[0].cpu() for model in (cpu, ours)]
    assert normwise(logits[1], logits[0]) <= bound(cpu.spec.num_layers) / 4


def test_projections_are_kept_from_the_depth_asked_for(llama):
    """And made for a smaller one that a call asks for."""
    cpu, ours = load_both(llama, prefill_depth=4)
    assert len(ours.weights.projection) == 2 < len(cpu.weights.projection) == 6
    prompts = draw_prompts(60)
    logits = [m.prefill([m.new_sequence()], prompts, prefill_depth=2)[0].cpu() for m in (cpu, ours)]
    assert normwise(logits[1], logits[0]) <= 2 * bound(6)
    kept, all_of_it = ours.weights.projection.cpu(), cpu.weights.projection[2:]
    assert torch.equal(kept[2:], all_of_it[2:])
    assert normwise(kept[:2], all_of_it[:2]) <= 2**-8  # from the weights in bfloat16: rounded twice


@on_the_double
@pytest.mark.parametrize("depth", [3, 1.0])
def test_a_forward_pass_is_one_copy(folder, log, depth):
    """Of a prefill in one pass and in four, and of a decode step; nothing waits, and nothing comes back."""
    model = pop_ext.load(folder, device=DEVICE, prefill_depth=depth, max_cache_tokens=CACHE)
    for chunk, passes in ((2048, 1), (37, 4)):
        model.chunk_tokens = chunk
        sequences = [model.new_sequence() for _ in range(3)]
        log.clear()
        _, times = model.prefill(sequences, draw_prompts(3, 90, 40))
        assert [(e.kind, e.where.partition(":")[0]) for e in log] == [("to device", "transfer.py")] * passes
        log.clear()
        model.decode(sequences, [1, 2, 3])
        assert [e.kind for e in log] == ["to device"]
        assert times.total > 0  # reading times waits
        assert log.count("wait") == 1


@on_the_double
def test_an_index_left_on_the_cpu_raises(llama, monkeypatch):
    """Planted: the deep rows are gathered by an index on the host."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    upload = transfer.to_device

    def leaves_one(tensors, device):
        return upload(tensors, device) | {"deep": tensors["deep"]}

    monkeypatch.setattr("pop_ext.runtime.model.to_device", leaves_one)
    message = r"index.* at runtime/(model|layers)\.py:\d+ mixes devices: .*torch.int64 on cpu"
    with pytest.raises(RuntimeError, match=message):
        model.prefill([model.new_sequence()], draw_prompts(40))


def test_smollm2():
    """A real prompt, truncated: the CPU's tokens."""
    folder = real_model("smollm2-135m")
    cpu, ours = load_both(folder, prefill_depth=20)
    prompts = [text_ids(folder)[:96]]
    tokens = ours.generate(prompts, max_new_tokens=4, do_sample=False).tokens
    assert assert_same_tokens(cpu, tokens, prompts) >= 3
