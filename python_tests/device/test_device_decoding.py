"""Decoding on a device: one replay, one copy and one wait a step; captured and eager alike."""

from __future__ import annotations

import pytest
from on_device import (
    CACHE,
    DEVICE,
    NEAR_TIE,
    assert_same_tokens,
    draw_prompts,
    generate,
    load_both,
    on_the_double,
)

import pop_ext
from pop_ext.runtime import decoding


@on_the_double
def test_a_decode_step_is_one_copy_to_the_host(folder, log):
    """And one wait, for the tokens of the step before; to the device one copy for all steps, as no row ends early."""
    model = pop_ext.load(folder, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(3, 90, 40)
    log.clear()
    generate(model, prompts, max_new_tokens=12)
    entries = {(kind, what, where.partition(":")[0]): n for (kind, what, where), n in log.table().items()}
    assert entries == {
        ("to device", "copy", "transfer.py"): 1,  # prefill
        ("to device", "copy", "runtime/decoding.py"): 1,  # the state of the decode batch
        ("to host", "copy", "runtime/decoding.py"): 12,
        ("wait", "event", "runtime/decoding.py"): 12,
        ("wait", "event", "runtime/device.py"): 1,  # reading the stages' times
    }
    assert len(log.table()) == 5, log.table()  # each at one line


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_replay_is_eager(llama, small_buckets, rows):
    """In every batch bucket, padded or full, across the edge of a context bucket: the same tokens and logprobs."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(*[58, 3, 61, 17, 40, 62, 1, 30, 5][:rows])
    eager = generate(model, prompts, graphs=False, return_logprobs=True, max_new_tokens=14)
    replayed = generate(model, prompts, return_logprobs=True, max_new_tokens=14)
    assert replayed.tokens == eager.tokens and replayed.logprobs == eager.logprobs
    (buffers,) = model.decode_buffers.values()
    assert buffers.rows == decoding.batch_bucket(rows) and {key[0] for key in buffers.steps} == {64, 128}
    assert all(step.graph is not None for step in buffers.steps.values())
    again = generate(model, prompts, return_logprobs=True, max_new_tokens=14)
    assert again.tokens == eager.tokens
    cpu = pop_ext.load(llama, device="cpu", prefill_depth=3)
    assert assert_same_tokens(cpu, replayed.tokens, prompts) > 7 * rows


def test_rows_that_end_early(folder, small_buckets):
    """By an end-of-sequence token and by length: the others go on as before, and the next turn is the CPU's."""
    cpu, ours = load_both(folder, prefill_depth=3)
    prompts = draw_prompts(30, 61, 7)
    whole = generate(ours, prompts, max_new_tokens=12).tokens
    ends = whole[1][4]
    stopped = dict(max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    output = generate(ours, prompts, **stopped, keep=True)
    assert output.tokens == generate(ours, prompts, graphs=False, **stopped).tokens
    for tokens, all_of_them in zip(output.tokens, whole, strict=True):
        length = all_of_them.index(ends) + 1 if ends in all_of_them else 12
        assert tokens == all_of_them[:length]
    assert [len(s.token_ids) - s.num_cached for s in output.sequences] == [1, 1, 1]
    turn = draw_prompts(9, 20, 4, seed=2)
    again = ours.generate(turn, sequences=output.sequences, max_new_tokens=4, do_sample=False, keep=True).tokens
    sequences = [cpu.new_sequence() for _ in prompts]
    for sequence, prompt, tokens, more, chosen in zip(sequences, prompts, output.tokens, turn, again, strict=True):
        cpu.prefill([sequence], [prompt])
        for token in tokens[:-1]:
            cpu.decode([sequence], [token])
        sequence.token_ids.append(tokens[-1])
        logits = cpu.prefill([sequence], [more])[0][0]
        top = logits.topk(2).values
        assert top[0] - top[1] <= NEAR_TIE * logits.std() or int(logits.argmax()) == chosen[0]
    assert all(len(s.blocks) == -(-len(s.token_ids) // 64) for s in output.sequences)


def test_a_cache_without_room_for_the_step_too_many(llama):
    """The last token of a full cache is found to end its row, as on the CPU."""
    ours = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=64)
    prompts = draw_prompts(60)
    whole = generate(pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=128), prompts).tokens[0]
    if whole[4] not in whole[:4]:
        assert generate(ours, prompts, eos_token_id=whole[4], pad_token_id=0).tokens[0] == whole[:5]
    with pytest.raises(pop_ext.CacheFullError):
        generate(ours, prompts)
    assert len(ours.cache.free_blocks) == 1


@pytest.mark.parametrize("graphs", [True, False])
def test_one_step_too_many(llama, monkeypatch, graphs):
    """At a stop that the host reads a step late; its token is dropped. None where the length ends the row."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts, steps = draw_prompts(20), []
    run = decoding.Step.run
    monkeypatch.setattr(decoding.Step, "run", lambda step: (steps.append(step), run(step)))
    whole = generate(model, prompts, graphs=graphs, max_new_tokens=9).tokens[0]
    assert len(whole) == 9 and len(steps) == 8  # the first token is prefill's
    end = next(i for i in range(2, 8) if whole[i] not in whole[:i])
    steps.clear()
    tokens = generate(model, prompts, graphs=graphs, max_new_tokens=9, eos_token_id=whole[end], pad_token_id=0).tokens
    assert tokens[0] == whole[: end + 1] and len(steps) == end + 1


@on_the_double
def test_a_wait_in_the_loop_is_seen(llama, log, monkeypatch):
    """Planted: an .item() beside each step."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    run = decoding.Step.run
    monkeypatch.setattr(decoding.Step, "run", lambda step: (run(step), step.buffers.tokens[0].item()))
    log.clear()
    generate(model, draw_prompts(20), max_new_tokens=5)
    assert sum(entry.what == "_local_scalar_dense" for entry in log) >= 4


@on_the_double
def test_a_stale_slot_in_a_replay_is_seen(llama, monkeypatch):
    """Planted: the replay writes where the step before did."""
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    prompts = draw_prompts(20, 50)
    eager = generate(model, prompts, graphs=False, return_logprobs=True)
    run = decoding.Step.run

    def stale(step):
        if step.runs > 1:
            step.views["seqlens_k"].sub_(1)  # as if the step had not advanced
        run(step)

    monkeypatch.setattr(decoding.Step, "run", stale)
    assert generate(model, prompts, return_logprobs=True).logprobs != eager.logprobs


@on_the_double
def test_kernels_are_loaded_before_a_capture(llama, double, monkeypatch):
    """All of them, when the model is; without that a capture raises."""
    monkeypatch.setattr(double, "kernels_loaded", 0)
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    assert double.kernels_loaded > 64
    generate(model, draw_prompts(20))
    monkeypatch.setattr(double, "kernels_loaded", 0)
    with pytest.raises(RuntimeError, match=r"a capture at runtime/decoding.py:\d+ before ops.load_cuda_kernels"):
        generate(model, draw_prompts(20))


@on_the_double
def test_torch_in_a_capture_raises(llama, monkeypatch):
    model = pop_ext.load(llama, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    head = type(model).head
    monkeypatch.setattr(type(model), "head", lambda self, hidden: head(self, hidden * 1))
    with pytest.raises(RuntimeError, match=r"mul.* at runtime/.* cannot be captured"):
        generate(model, draw_prompts(20))
