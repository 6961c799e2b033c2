"""Vision-language models: full depth against transformers, truncated depth against `ReferenceVisionPOP`, and prompts
against transformers' processors."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import normwise
from PIL import Image
from vision_models import picture
from vision_pairs import BOUND, CONTINUATION, SIZES, extend, pair_of, pixels, prompts

import pop_ext
from pop_ext.analysis.calibration import calibrate
from pop_ext.runtime.prompts import encode_prompt

# Prompts


def test_prompts_are_transformers(pair):
    """Text merges with what an image leaves beside it as it does there; the pixels are the same."""
    for text, images in prompts(pair):
        inputs = pair.process(text, images)
        token_ids, media = encode_prompt(pair.model, text, "prompt", [], images)
        assert token_ids == inputs["input_ids"][0].tolist()
        if images:
            assert torch.equal(torch.cat([item.pixel_values for item in media]), inputs["pixel_values"])
            placeholders = [i for item in media for start, end in item.spans for i in range(start, end)]
            kinds = inputs.get("mm_token_type_ids", inputs.get("token_type_ids"))[0]
            assert placeholders == kinds.nonzero().flatten().tolist()


def test_crops(tmp_path_factory):
    """Pan and scan: a long image brings crops, a square one none; each has tokens of its own."""
    pair = pair_of("gemma3_pan", tmp_path_factory)
    counts = {}
    for size in SIZES:
        _, (media,) = encode_prompt(pair.model, pair.mark, "prompt", [], [picture(*size)])
        counts[size] = len(media.spans)
        assert len(media.pixel_values) == len(media.spans)
    assert counts == {(40, 30): 3, (25, 61): 3, (33, 33): 1, (90, 14): 5, (9, 9): 1, (12, 70): 5}


def test_images_go_before_a_prompt_without_placeholders(pair):
    images = [picture(30, 20), picture(20, 30)]
    assert pair.ours("the", images)[0] == pair.ours(f"{pair.mark}{pair.mark}the", images)[0]
    chat = [{"role": "system", "content": "an"}, {"role": "user", "content": "the"}]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "the"}]
    expected = pair.ours([chat[0], {"role": "user", "content": parts}], images)[0]
    assert pair.ours(chat, images)[0] == expected
    own = [{"type": "image", "image": image} for image in images]
    assert pair.ours([chat[0], {"role": "user", "content": [*own, parts[2]]}])[0] == expected
    mixed = [own[0], {"type": "image"}, parts[2]]
    assert pair.ours([chat[0], {"role": "user", "content": mixed}], images[1:])[0] == expected


def test_files(pair, tmp_path):
    """A file is the same as the image in it; a palette, an alpha channel and a rotation in EXIF are undone."""
    image = picture(31, 22)
    image.save(tmp_path / "a.png")
    _, (expected,) = encode_prompt(pair.model, pair.mark, "prompt", [], [image])
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        _, (media,) = encode_prompt(pair.model, pair.mark, "prompt", [], [path])
        assert torch.equal(media.pixel_values, expected.pixel_values)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    image.convert("RGBA").save(tmp_path / "c.png")
    for name in ("b.png", "c.png"):
        _, (media,) = encode_prompt(pair.model, pair.mark, "prompt", [], [tmp_path / name])
        assert torch.equal(media.pixel_values, expected.pixel_values), name


# Logits


def test_full_depth_is_transformers(pair):
    for text, images in prompts(pair):
        expected = pair.plain(pair.process(text, images), CONTINUATION)
        token_ids, visuals = pair.ours(text, images)
        for depth in (pair.layers, pair.layers - 1):
            (logits,) = pair.model.logits([token_ids], [CONTINUATION], visuals=[visuals], prefill_depth=depth)
            assert normwise(logits, expected) <= BOUND, (text, depth)


def test_images_matter(pair):
    """The same text with another image gives other logits, at every depth: what is compared above depends on them."""
    for depth in range(max(pair.deepstack, 1), pair.layers + 1):
        rows = []
        for seed in (1, 2):
            token_ids, visuals = pair.ours(f"the {pair.mark} and", [picture(40, 30, seed)])
            rows.append(pair.model.logits([token_ids], [[7]], visuals=[visuals], prefill_depth=depth)[0])
        assert normwise(rows[0], rows[1]) > 0.01


@torch.no_grad()
def test_greedy_tokens_are_transformers(pair):
    for text, images in prompts(pair):
        inputs = pair.process(text, images)
        expected = pair.peer.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        output = pair.model.generate(text, images=images, max_new_tokens=12, do_sample=False)
        assert output.tokens[0] == expected.tolist()
        assert output.prompt_tokens == [inputs["input_ids"].shape[1]]
        assert (output.times.vision > 0) == bool(images)


# boundaries that begin in an image and anchors that end in one, too
@pytest.mark.parametrize(("boundary", "anchors"), [(1, 1), (1, 0), (3, 2), (17, 5), (9, 12), (1, 30), (0, 0)])
def test_truncated_depth_is_the_reference(pair, boundary, anchors):
    model = pair.model
    model.boundary_tokens, model.anchor_tokens = boundary, anchors
    for text, images in prompts(pair)[1::2]:
        inputs = pair.process(text, images)
        token_ids, visuals = pair.ours(text, images)
        for depth in range(max(pair.deepstack, 1), pair.layers):
            reference = pair.reference(depth, boundary, anchors)
            first = reference.prompt(token_ids, **pixels(inputs))[None]
            expected = torch.cat([first, reference.decode(CONTINUATION[:-1])])
            (logits,) = model.logits([token_ids], [CONTINUATION], visuals=[visuals], prefill_depth=depth)
            assert normwise(logits, expected) <= BOUND, (text, depth)


def test_the_reference_at_full_depth_is_transformers(pair):
    for text, images in prompts(pair):
        inputs = pair.process(text, images)
        reference = pair.reference(pair.layers)
        first = reference.prompt(inputs["input_ids"][0].tolist(), **pixels(inputs))[None]
        logits = torch.cat([first, reference.decode(CONTINUATION[:-1])])
        assert normwise(logits, pair.plain(inputs, CONTINUATION)) <= BOUND


@pytest.mark.parametrize("boundary", [1, 11])
def test_chunks_change_nothing(pair, boundary):
    """Gemma-3 never splits an image over chunks, however small they are; Qwen3-VL may."""
    model, depth = pair.model, max(pair.deepstack, 2)
    model.boundary_tokens = boundary
    for text, images in prompts(pair)[5:9]:
        token_ids, visuals = pair.ours(text, images)
        results = []
        for model.chunk_tokens in (2048, 1, 5, 16, 23):
            (logits,) = model.logits([token_ids], [CONTINUATION], visuals=[visuals], prefill_depth=depth)
            results.append(logits)
            assert normwise(logits, results[0]) <= BOUND, (text, model.chunk_tokens)


def test_batches_change_nothing(pair):
    """Prompts with and without images in one batch, in which chunks end anywhere."""
    model, depth = pair.model, max(pair.deepstack, 3)
    encoded = [pair.ours(text, images) for text, images in prompts(pair)]
    for model.chunk_tokens in (2048, 37):
        sequences = [model.new_sequence() for _ in encoded]
        logits, _ = model.prefill(
            sequences, [ids for ids, _ in encoded], visuals=[visuals for _, visuals in encoded], prefill_depth=depth
        )
        second = model.decode(sequences, [CONTINUATION[0]] * len(sequences))
        for sequence in sequences:
            model.free(sequence)
        for (token_ids, visuals), *rows in zip(encoded, logits, second, strict=True):
            (alone,) = model.logits([token_ids], [CONTINUATION[:2]], visuals=[visuals], prefill_depth=depth)
            assert normwise(torch.stack(rows), alone) <= BOUND


def test_a_second_turn_adds_an_image(pair):
    """At full depth the whole conversation at once, by transformers; truncated, the reference turn by turn."""
    mark, model = pair.mark, pair.model
    turns = [
        (f"a{mark} the", [picture(40, 30)]),
        (" and", []),
        (f"\n{mark}{mark} an", [picture(25, 61), picture(9, 9)]),
    ]
    answers = [[7, 30, 81], [64], CONTINUATION]
    for depth in (max(pair.deepstack, 2), pair.layers):
        reference, sequence = pair.reference(depth), model.new_sequence()
        everything, pictures, kinds = [], {}, []
        for (text, images), answer in zip(turns, answers, strict=True):
            token_ids, visuals = pair.ours(text, images, history=sequence.token_ids)
            inputs = pixels(pair.process(text, images)) if images else {}
            expected = [reference.prompt(token_ids, **inputs)]
            rows = [model.prefill([sequence], [token_ids], visuals=[visuals], prefill_depth=depth)[0][0]]
            for token in answer[:-1]:
                expected.append(reference.decode([token])[0])
                rows.append(model.decode([sequence], [token])[0])
            assert normwise(torch.stack(rows), torch.stack(expected)) <= BOUND
            for owner in (sequence.token_ids, reference.ids):
                owner.append(answer[-1])  # sampled, and not run yet
            everything += [*token_ids, *answer]
            for key, value in inputs.items():
                pictures[key] = torch.cat([pictures[key], value]) if key in pictures else value
        model.free(sequence)
        if depth == pair.layers:
            ids = torch.tensor([everything])
            kinds = (ids == pair.peer.config.image_token_id).int()
            name = "token_type_ids" if pair.gemma else "mm_token_type_ids"
            pair.peer.model.rope_deltas = None
            with torch.no_grad():
                logits = pair.peer(input_ids=ids, **pictures, **{name: kinds}).logits[0, -len(answer) - 1 : -1]
            assert normwise(torch.stack(rows), logits) <= BOUND


def test_conversation_with_generate(pair):
    """Turns by `generate` are turns of prefill and decode; a chat may add an image later."""
    model, depth = pair.model, max(pair.deepstack, 2)
    chat = [{"role": "user", "content": "the"}]
    first = model.generate(chat, images=[picture(33, 33)], keep=True, max_new_tokens=5, prefill_depth=depth)
    second = model.generate(
        [[{"role": "user", "content": [{"type": "image", "image": picture(90, 14)}, {"type": "text", "text": "an"}]}]],
        sequences=first.sequences, keep=True, max_new_tokens=4, prefill_depth=depth,
    )  # fmt: skip
    sequence = second.sequences[0]
    assert len(sequence.visuals) > 1 and all(visual.features is None for visual in sequence.visuals)
    history = sequence.token_ids
    assert len(history) == first.prompt_tokens[0] + 5 + second.prompt_tokens[0] + 4
    reference = pair.reference(depth)
    at, images = 0, [picture(33, 33), picture(90, 14)]
    for output, image in ((first, images[0]), (second, images[1])):
        prompt = history[at : at + output.prompt_tokens[0]]
        logits = [reference.prompt(prompt, **pixels(pair.process(pair.mark, [image])))]
        for token in output.tokens[0][:-1]:
            logits.append(reference.decode([token])[0])
        assert [int(row.argmax()) for row in logits] == output.tokens[0]
        reference.ids.append(output.tokens[0][-1])
        at += len(prompt) + len(output.tokens[0])
    model.free(sequence)


def test_a_failing_turn_leaves_no_image(pair, monkeypatch):
    """The conversation goes on as if nothing had been asked."""
    model, depth = pair.model, max(pair.deepstack, 2)
    sequence = model.new_sequence()
    model.prefill([sequence], [[5, 6, 7]], prefill_depth=depth)
    token_ids, visuals = pair.ours(f"a{pair.mark}", [picture(33, 33)])
    model.chunk_tokens = 8
    with monkeypatch.context() as patch:
        calls = iter(range(100))
        forward = model._forward
        patch.setattr(model, "_forward", lambda *args: forward(*args) if next(calls) == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.prefill([sequence], [token_ids], visuals=[visuals], prefill_depth=depth)
    assert (sequence.token_ids, sequence.visuals) == ([5, 6, 7], [])
    after = model.prefill([sequence], [token_ids], visuals=[visuals], prefill_depth=depth)[0]
    model.free(sequence)
    other = model.new_sequence()
    model.prefill([other], [[5, 6, 7]], prefill_depth=depth)
    assert normwise(after, model.prefill([other], [token_ids], visuals=[visuals], prefill_depth=depth)[0]) <= BOUND
    model.free(other)


def test_bfloat16(pair):
    """The tower and the decoder both; close to transformers in the same dtype, as far as bfloat16 goes."""
    model = pop_ext.load(pair.folder, dtype=torch.bfloat16)
    peer = transformers.AutoModelForImageTextToText.from_pretrained(pair.folder, dtype=torch.bfloat16).eval()
    for text, images in prompts(pair)[::3]:
        inputs = pair.process(text, images)
        exact = pair.plain(inputs, CONTINUATION)
        with torch.no_grad():
            length = inputs["input_ids"].shape[1]
            theirs = peer(**extend(inputs, CONTINUATION[:-1])).logits[0, length - 1 :]
        token_ids, media = encode_prompt(model, text, "prompt", [], images)
        visuals = [visual for item in media for visual in model.vision.encode(item)]
        assert all(visual.features.dtype == torch.bfloat16 for visual in visuals)
        (logits,) = model.logits([token_ids], [CONTINUATION], visuals=[visuals])
        assert normwise(logits, exact) <= 1.5 * normwise(theirs, exact)


@torch.no_grad()
def test_hidden_states(pair):
    """Before every layer, of several prompts at once: after the last, transformers' logits."""
    chosen = prompts(pair)[4:]
    encoded = [pair.ours(text, images) for text, images in chosen]
    states = list(pair.model.hidden_states([ids for ids, _ in encoded], [visuals for _, visuals in encoded]))
    assert len(states) == pair.layers + 1
    rows = states[-1].split([len(ids) for ids, _ in encoded])
    for (text, images), last in zip(chosen, rows, strict=True):
        expected = pair.peer(**pair.process(text, images)).logits[0]
        assert normwise(pair.peer.lm_head(pair.peer.model.language_model.norm(last)), expected) <= BOUND


def test_calibration_on_images(pair):
    """Fitted to what the full model makes of these prompts: nearer to it than its own weights, on prompts held out."""
    text, depth = f"the {pair.mark} and then", max(pair.deepstack, 2)
    encoded = [pair.ours(text, [picture(40, 30, seed)]) for seed in range(64)]
    visuals = [images for _, images in encoded]
    result = calibrate(pair.model, [ids for ids, _ in encoded], [depth], visuals=visuals)
    entry = result.provenance["depths"][str(depth)]
    assert all(entry["error_after"][layer] < 0.9 * before for layer, before in entry["error_before"].items())
    without = calibrate(pair.model, [pair.ours("the an and then", [])[0]] * 64, [depth])
    assert normwise(without.at(depth)[0], result.at(depth)[0]) > 0.01
