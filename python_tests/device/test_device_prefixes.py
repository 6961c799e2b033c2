"""Forks and the prefix cache on a device: what conversations share changes no token, and stays one copy a pass."""

from __future__ import annotations

import pytest
import torch
from on_device import CACHE, DEVICE, assert_same_tokens, draw_prompts, load_both, on_the_double

import pop_ext


def load(folder, **settings):
    return pop_ext.load(folder, device=DEVICE, max_cache_tokens=CACHE, prefill_depth=3, **settings)


@pytest.mark.parametrize("graphs", [False, True])
def test_prompts_that_begin_alike(llama, graphs):
    """Prompts that share 128 tokens: the second time those are reused, and tokens are the CPU's."""
    ours, cpu = load(llama, prefix_cache=True), load_both(llama, prefill_depth=3)[0]
    ours.cuda_graphs = graphs
    (shared,) = draw_prompts(130)
    prompts = [shared + rest for rest in draw_prompts(20, 45, seed=2)]
    reused, agreed = [], 0
    for prompt in (*prompts, prompts[0]):
        output = ours.generate([prompt], max_new_tokens=6, do_sample=False)
        reused += output.reused_tokens
        agreed += assert_same_tokens(cpu, output.tokens, [prompt], depth=3)
    assert reused == [0, 128, 128] and agreed > 9


def test_a_fork_writes_where_no_other_reads(llama):
    """Two continuations of one conversation, decoded together, from a block that both hold: the logits of a
    conversation of its own each, bit for bit.
    """
    ours = load(llama)
    (prompt,) = draw_prompts(70)

    def logits(sequences, tokens):
        return torch.stack([ours.decode(sequences, step).cpu() for step in tokens])

    with ours.new_sequence() as one:
        ours.prefill([one], [prompt])
        with one.fork() as two:
            together = logits([one, two], [(5, 6), (7, 8)])
    with ours.new_sequence() as one, ours.new_sequence() as two:
        ours.prefill([one, two], [prompt, prompt])
        assert torch.equal(logits([one, two], [(5, 6), (7, 8)]), together)
    assert len(ours.cache.free_blocks) == ours.cache.num_blocks


@on_the_double
def test_a_copied_block_stays_on_the_device(llama, log):
    ours = load(llama)
    with ours.new_sequence() as one:
        ours.prefill([one], draw_prompts(70))
        with one.fork() as two:
            log.clear()
            ours.decode([one, two], [5, 6])
            assert [e.kind for e in log] == ["to device"]
