"""Images on a device: the CPU's tokens, one copy a picture and one a pass, and nothing that waits in between."""

from __future__ import annotations

import pytest
import torch
from helpers import normwise
from on_device import CACHE, DEVICE, assert_same_tokens, bound, generate, load_both, on_the_double
from vision_models import picture

import pop_ext

TEXTS = ["what is in here, an apple or a pear?", "the the an", "and the answer is"]
IMAGES = [[picture(40, 30)], [picture(33, 64), picture(50, 20)], None]


def encode(model, text, images, history=()):
    """Token ids and visuals as `prefill` takes them."""
    from pop_ext.runtime.prompts import encode_prompt

    ids, media = encode_prompt(model, text, "prompt", list(history), images or ())
    visuals = sorted((v for m in media for v in model.vision.encode(m)), key=lambda v: v.start)
    return ids, visuals


def assert_same_continuations(cpu, tokens, texts, images):
    encoded = [encode(cpu, text, pictures) for text, pictures in zip(texts, images, strict=True)]
    prompts, visuals = map(list, zip(*encoded, strict=True))
    return assert_same_tokens(cpu, tokens, prompts, visuals=visuals)


@pytest.mark.parametrize("depth", [3, 1.0])
def test_the_cpus_tokens(vision_folder, depth):
    cpu, ours = load_both(vision_folder, prefill_depth=depth)
    output = generate(ours, TEXTS, images=IMAGES)
    assert assert_same_continuations(cpu, output.tokens, TEXTS, IMAGES) > 12
    assert generate(ours, TEXTS, graphs=False, images=IMAGES).tokens == output.tokens


def test_chunks_and_turns(vision_folder):
    """An image in a second turn, and prompts cut into passes, some within an image."""
    cpu, ours = load_both(vision_folder, prefill_depth=3, boundary_tokens=2)
    results = []
    for model in (cpu, ours):
        model.chunk_tokens = 23
        sequence, logits = model.new_sequence(), []
        for text, pictures in zip(TEXTS[1:], (IMAGES[1], IMAGES[0]), strict=True):
            ids, visuals = encode(model, text, pictures, sequence.token_ids)
            logits.append(model.prefill([sequence], [ids], visuals=[visuals])[0])
            logits.append(model.decode([sequence], [7]))
        results.append(torch.cat(logits).cpu())
    assert normwise(results[1], results[0]) <= 2 * bound(cpu.spec.num_layers)


@on_the_double
def test_copies_and_waits(vision_folder, log):
    """Every one there is, with its file; a picture is a copy, so is a pass, and so is the state of the decode batch."""
    model = pop_ext.load(vision_folder, device=DEVICE, prefill_depth=3, max_cache_tokens=CACHE)
    log.clear()
    generate(model, TEXTS, images=IMAGES, max_new_tokens=6)
    entries = {(kind, what, where.partition(":")[0]): n for (kind, what, where), n in log.table().items()}
    assert entries == {
        ("to device", "copy", "transfer.py"): 3 + 1,
        ("to device", "copy", "runtime/decoding.py"): 1,
        ("to host", "copy", "runtime/decoding.py"): 6,
        ("wait", "event", "runtime/decoding.py"): 6,
        ("wait", "event", "runtime/device.py"): 1,  # reading the stages' times
    }
    model.chunk_tokens = 23
    ids, visuals = encode(model, TEXTS[1], IMAGES[1])
    log.clear()
    model.prefill([model.new_sequence()], [ids], visuals=[visuals])
    passes = sum(entry.kind == "to device" for entry in log)
    assert [entry.kind for entry in log] == ["to device"] * passes and passes > 1
