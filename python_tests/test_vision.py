"""Vision-language models: full depth against transformers, truncated depth against `ReferenceVisionPOP`, prompts
against transformers' processors, and what is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import normwise
from PIL import Image
from reference_pop import ReferenceVisionPOP
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from typer.testing import CliRunner
from vision_models import TINY_VISION, picture, transformers_processor
from vision_models import tokenizer as tiny_tokenizer

import pop_ext
from pop_ext import cli
from pop_ext.analysis.calibration import calibrate
from pop_ext.analysis.importance import truncation_kl
from pop_ext.analysis.refinement import refine
from pop_ext.analysis.samples import load_samples
from pop_ext.runtime.prompts import encode_prompt
from pop_ext.vision.encoder import transformers_inputs
from pop_ext.vision.images import read_video

BOUND = 1e-5
SIZES = [(40, 30), (25, 61), (33, 33), (90, 14), (9, 9), (12, 70)]  # wide, tall, odd, smaller than a patch group
CONTINUATION = [5, 97, 30, 201, 2, 64]


class Pair:
    """Ours and transformers' model and processor of one checkpoint, with prompts to try."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.gemma = name, folder, TINY_VISION[name].gemma
        self.model = pop_ext.load(folder, dtype=torch.float32)
        self.peer = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers_processor(folder)
        self.mark = self.model.vision.written("image", self.model.tokenizer)
        self.deepstack = 0 if self.gemma else len(self.peer.config.vision_config.deepstack_visual_indexes)
        self.layers = self.peer.config.text_config.num_hidden_layers

    def process(self, text: str, images: list) -> dict[str, torch.Tensor]:
        """transformers' inputs."""
        if not images:
            return dict(self.processor.tokenizer(text, return_tensors="pt"))
        return dict(self.processor(images=[images] if self.gemma else images, text=text, return_tensors="pt"))

    def ours(self, prompt, images=(), videos=(), history=()) -> tuple[list[int], list]:
        """Our token ids, and the images' Visuals."""
        token_ids, media = encode_prompt(self.model, prompt, "prompt", list(history), images, videos)
        visuals = [visual for item in media for visual in self.model.vision.encode(item)]
        return token_ids, sorted(visuals, key=lambda visual: visual.start)

    @torch.no_grad()
    def plain(self, inputs: dict, continuation: list[int]) -> torch.Tensor:
        """transformers at full depth, all at once: the logits that predict the continuation."""
        length = inputs["input_ids"].shape[1]
        inputs = extend(inputs, continuation[:-1])
        return self.peer(**inputs).logits[0, length - 1 :]

    def reference(self, depth: int, boundary: int = 1, anchors: int = 1) -> ReferenceVisionPOP:
        return ReferenceVisionPOP(self.peer, depth, boundary, anchors)


def extend(inputs: dict, token_ids: list[int]) -> dict:
    ids = torch.cat([inputs["input_ids"], torch.tensor([token_ids], dtype=torch.int64)], 1)
    result = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            kinds = inputs[key]
            result[key] = torch.cat([kinds, kinds.new_zeros(1, len(token_ids))], 1)
    return result


def pixels(inputs: dict) -> dict:
    return {key: value for key, value in inputs.items() if key in ("pixel_values", "image_grid_thw")}


def restore(pair: Pair) -> Pair:
    pair.model.chunk_tokens, pair.model.boundary_tokens, pair.model.anchor_tokens = 2048, 1, 1
    return pair


_pairs: dict[str, Pair] = {}


def pair_of(name: str, factory) -> Pair:
    if name not in _pairs:
        folder = TINY_VISION[name].make(factory.mktemp("vision") / name, seed=list(TINY_VISION).index(name))
        _pairs[name] = Pair(name, folder)
    return restore(_pairs[name])


@pytest.fixture(params=list(TINY_VISION))
def pair(request, tmp_path_factory) -> Pair:
    return pair_of(request.param, tmp_path_factory)


@pytest.fixture(params=["qwen3_vl", "qwen3_vl_tied"])
def qwen(request, tmp_path_factory) -> Pair:
    return pair_of(request.param, tmp_path_factory)


@pytest.fixture(params=["gemma3", "gemma3_pan"])
def gemma(request, tmp_path_factory) -> Pair:
    return pair_of(request.param, tmp_path_factory)


@pytest.fixture
def folder(pair, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(pair.folder, tmp_path / "copy")


def prompts(pair: Pair) -> list[tuple[str, list]]:
    """Text with an image of every size, two and three images, one at the very start, and none."""
    mark, pictures = pair.mark, [picture(*size, seed=3) for size in SIZES]
    return [
        *((f"the {mark} and\n\n", [image]) for image in pictures),
        (f"{mark}", pictures[:1]),
        (f"a\n{mark}\n\n\n{mark} an", pictures[1:3]),
        (f"{mark}{mark}the{mark}\n?", pictures[3:]),
        ("the an and then", []),
    ]


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
@pytest.mark.parametrize(("boundary", "anchors"), [(1, 1), (1, 0), (3, 2), (17, 5), (9, 12), (1, 30)])
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


# Video


def frames_of(count: int, size=(37, 29)) -> list[Image.Image]:
    return [picture(*size, seed=i) for i in range(count)]


@pytest.mark.parametrize(("count", "fps"), [(1, 1.0), (2, 2), (5, 24), (8, 0.5)])
@torch.no_grad()
def test_video(qwen, count, fps):
    """Layout and logits are transformers', on the same pixel values; each temporal patch stands at its own position."""
    model, config = qwen.model, qwen.peer.config
    mark = model.vision.written("video", model.tokenizer)
    image, text = picture(25, 61), f"the {mark} and {qwen.mark}\n{mark}"
    clips = [(frames_of(count), fps), (frames_of(3, (20, 44)), 2)]
    token_ids, media = encode_prompt(model, text, "prompt", [], [image], clips)
    videos = media[1:]
    grid = torch.tensor([item.grid_thw for item in videos])
    assert grid[0, 0] == -(-count // 2)

    # the layout, by transformers' processor
    processor = qwen.processor
    processor.video_processor = SimpleNamespace(merge_size=config.vision_config.spatial_merge_size,
                                                temporal_patch_size=2)  # fmt: skip
    metadata = [SimpleNamespace(fps=rate, frames_indices=list(range(len(clip)))) for clip, rate in clips]
    inputs = {"video_grid_thw": grid, "video_metadata": metadata}
    expanded, _ = processor.get_text_with_replacements(
        [text],
        [processor.replace_image_token({"image_grid_thw": torch.tensor([media[0].grid_thw])}, 0)],
        [processor.replace_video_token(inputs, i) for i in range(2)],
    )
    assert token_ids == processor.tokenizer(expanded[0]).input_ids

    # the decoder, on our pixels
    ids = torch.tensor([token_ids + CONTINUATION[:-1]])
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    values = {
        "pixel_values": media[0].pixel_values,
        "image_grid_thw": torch.tensor([media[0].grid_thw]),
        "pixel_values_videos": torch.cat([item.pixel_values for item in videos]),
        "video_grid_thw": grid,
    }
    qwen.peer.model.rope_deltas = None
    expected = qwen.peer(input_ids=ids, mm_token_type_ids=kinds, **values).logits[0, len(token_ids) - 1 :]
    visuals = sorted((v for item in media for v in model.vision.encode(item)), key=lambda visual: visual.start)
    assert len(visuals) == 1 + int(grid[:, 0].sum())
    (logits,) = model.logits([token_ids], [CONTINUATION], visuals=[visuals])
    assert normwise(logits, expected) <= BOUND
    depth = qwen.deepstack
    reference = qwen.reference(depth)
    expected = torch.cat([reference.prompt(token_ids, **values)[None], reference.decode(CONTINUATION[:-1])])
    (logits,) = model.logits([token_ids], [CONTINUATION], visuals=[visuals], prefill_depth=depth)
    assert normwise(logits, expected) <= BOUND


def test_video_patches(qwen):
    """Patches are transformers' patches of the same frames, in its order; one frame of a still is the image itself."""
    vision = qwen.peer.config.vision_config
    frames = frames_of(5)
    media, times = qwen.model.vision.process_video((frames, 4), "video")
    settings = qwen.model.vision.video_settings
    _, rows, columns = media.grid_thw
    size, merge = vision.patch_size, vision.spatial_merge_size
    shape = (columns * size, rows * size)
    resized = [torch.from_numpy(np.array(f.resize(shape, Image.Resampling.BICUBIC))) for f in frames]
    video = torch.stack(resized).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("image_mean", "image_std"))
    video = ((video / 255 - mean) / std)[None]
    expected, *grid = Qwen3VLVideoProcessor.patchify(None, video, size, merge, 2)
    assert tuple(grid) == media.grid_thw
    assert normwise(media.pixel_values, expected[0]) < 1e-6
    assert times == [0.125, 0.625, 1.0]  # the last frame stands twice


def test_a_second_turn_adds_a_video(qwen):
    """At full depth, the whole conversation at once by transformers; truncated, the reference turn by turn."""
    model, clip = qwen.model, (frames_of(3), 2)
    first, visuals = qwen.ours(f"a{qwen.mark}", [picture(25, 61)])
    for depth in (qwen.deepstack, qwen.layers):
        sequence, reference = model.new_sequence(), qwen.reference(depth)
        rows = [model.prefill([sequence], [first], visuals=[visuals], prefill_depth=depth)[0][0]]
        expected = [reference.prompt(first, **pixels(qwen.process(f"a{qwen.mark}", [picture(25, 61)])))]
        second, media = encode_prompt(
            model, f"the {model.vision.written('video', model.tokenizer)}", "prompt", sequence.token_ids, [], [clip]
        )
        values = {
            "pixel_values_videos": media[0].pixel_values,
            "video_grid_thw": torch.tensor([media[0].grid_thw]),
        }
        spans = [visual for item in media for visual in model.vision.encode(item)]
        rows.append(model.prefill([sequence], [second], visuals=[spans], prefill_depth=depth)[0][0])
        rows += [model.decode([sequence], [token])[0] for token in CONTINUATION[:-1]]
        expected += [reference.prompt(second, **values), *reference.decode(CONTINUATION[:-1])]
        model.free(sequence)
        assert normwise(torch.stack(rows), torch.stack(expected)) <= BOUND
        if depth == qwen.layers:
            ids = torch.tensor([[*first, *second, *CONTINUATION[:-1]]])
            config = qwen.peer.config
            kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
            values |= pixels(qwen.process(f"a{qwen.mark}", [picture(25, 61)]))
            qwen.peer.model.rope_deltas = None
            with torch.no_grad():
                logits = qwen.peer(input_ids=ids, mm_token_type_ids=kinds, **values).logits[0]
            assert normwise(torch.stack(rows[1:]), logits[len(first) + len(second) - 1 :]) <= BOUND


def test_batches_by_generate(pair):
    """Rows with an image, with two, with none: each as if it were alone."""
    texts = [f"the {pair.mark} and", "the an and", f"{pair.mark} a {pair.mark}"]
    images = [[picture(40, 30)], None, [picture(25, 61), picture(9, 9)]]
    depth = max(pair.deepstack, 2)
    together = pair.model.generate(texts, images=images, max_new_tokens=6, prefill_depth=depth)
    for text, pictures, tokens in zip(texts, images, together.tokens, strict=True):
        alone = pair.model.generate(text, images=pictures or [], max_new_tokens=6, prefill_depth=depth)
        assert alone.tokens == [tokens]


def test_video_by_generate(qwen):
    clip = (frames_of(3), 2)
    model, text = qwen.model, f"{qwen.model.vision.written('video', qwen.model.tokenizer)} the"
    output = model.generate([text, "an"], videos=[[clip], None], max_new_tokens=3)
    assert output.tokens[1] == model.generate("an", max_new_tokens=3).tokens[0]
    assert model.generate(text, videos=[clip], max_new_tokens=3).tokens[0] == output.tokens[0]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations(tmp_path, suffix):
    """Frames and rate of a file are those that it was made of; a folder's are its files, by name."""
    frames = [frame.quantize(64).convert("RGB") for frame in frames_of(5)]  # what a GIF can hold
    path = tmp_path / f"clip.{suffix}"
    lossless = {"lossless": True, "exact": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, loop=0, **lossless)
    found, fps = read_video(path)
    assert [frame.tobytes() for frame in found] == [frame.tobytes() for frame in frames] and abs(fps - 5) < 1e-9
    assert read_video(str(path), 2.5)[1] == 2.5
    (tmp_path / "folder").mkdir()
    for i in (3, 0, 4, 1, 2):
        frames[i].save(tmp_path / "folder" / f"{i:02}.png")
    (tmp_path / "folder" / ".hidden").write_text("not a frame")
    found, fps = read_video(tmp_path / "folder", 3)
    assert [frame.tobytes() for frame in found] == [frame.tobytes() for frame in frames] and fps == 3


def test_bad_video_files(tmp_path, monkeypatch):
    frames = frames_of(4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    frames[0].save(tmp_path / "folder" / "0.png")
    (tmp_path / "folder" / "1.png").write_text("not an image")
    (tmp_path / "text.gif").write_text("not an image")
    frames[0].save(tmp_path / "still.png")
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], duration=200)
    frames[0].save(tmp_path / "clip.png", save_all=True, append_images=frames[1:], duration=200)
    (tmp_path / "cut.png").write_bytes((tmp_path / "clip.png").read_bytes()[:-600])
    for name, fps, error, message in [
        ("empty", 1, ValueError, "empty has 0 images, expected 1 to"),
        ("folder", None, ValueError, "does not say how fast its frames follow"),
        ("folder", 1, ValueError, "frame 1: .*1.png: not an image"),
        ("text.gif", None, ValueError, "text.gif: not an image"),
        ("none.gif", None, FileNotFoundError, "none.gif: no such file"),
        ("still.png", None, ValueError, "still.png does not say how fast its frames follow"),
        ("cut.png", None, ValueError, "cut.png.*cannot be read"),
    ]:
        with pytest.raises(error, match=message):
            read_video(tmp_path / name, fps)
    monkeypatch.setattr(pop_ext.vision.images, "MAX_FRAMES", 3)
    with pytest.raises(ValueError, match=r"clip.webp has 4 frames, expected 1 to 3"):
        read_video(tmp_path / "clip.webp")
    monkeypatch.setattr(pop_ext.vision.images, "MAX_FRAMES", 4)
    monkeypatch.setattr(pop_ext.vision.images, "MAX_VIDEO_PIXELS", 3 * 37 * 29)
    with pytest.raises(ValueError, match=r"more than 3219 pixels in its first 4 frames"):
        read_video(tmp_path / "clip.webp")


# Checkpoints


def test_published_names(pair, folder):
    """Tensor names as they are published, and as transformers names its modules."""
    tensors = load_file(folder / "model.safetensors")
    expected = pair.ours(f"a{pair.mark}", [picture(33, 33)])
    logits = pair.model.logits([expected[0]], [CONTINUATION], visuals=[expected[1]])[0]
    if pair.gemma:
        assert any(name.startswith("language_model.model.layers") for name in tensors)
        siglip = {n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in tensors.items()}
        modules = {"model." + n.replace("language_model.model.", "language_model."): t for n, t in tensors.items()}
        layouts = [siglip, modules]
    else:
        layouts = [tensors]
    for layout in layouts:
        save_file(layout, folder / "model.safetensors")
        model = pop_ext.load(folder, dtype=torch.float32)
        assert torch.equal(model.logits([expected[0]], [CONTINUATION], visuals=[expected[1]])[0], logits)


def test_text_alone_needs_no_processor(pair, folder):
    (folder / "preprocessor_config.json").unlink()
    model = pop_ext.load(folder, dtype=torch.float32)
    assert model.generate("the an", max_new_tokens=3).tokens == pair.model.generate("the an", max_new_tokens=3).tokens
    with pytest.raises(
        pop_ext.CheckpointError, match=r"has no preprocessor_config.json, so images cannot be processed"
    ):
        model.generate("the", images=[picture(9, 9)], max_new_tokens=2)


def test_chat_template_of_the_processor(pair, folder):
    """Where older checkpoints keep it."""
    template = tiny_tokenizer(pair.gemma).chat_template
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    model = pop_ext.load(folder, dtype=torch.float32)
    assert model.tokenizer.chat_template == template


def edit(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("table", "key", "value", "message"),
    [
        (None, "text_config", [1], r"text_config is \[1\], expected a table"),
        (None, "vision_config", None, "vision_config is None, expected a table"),
        (None, "quantization_config", {"bits": 4}, "quantization_config is {'bits': 4}"),
        ("text_config", "model_type", "llama", "text_config: model_type is 'llama'"),
        ("text_config", "hidden_size", 10**9, "hidden_size is 1000000000, expected 1 to"),
        ("vision_config", "model_type", "clip", "vision_config: model_type is 'clip'"),
        ("vision_config", "hidden_size", 31, "hidden_size is 31, not a multiple of its"),
        ("vision_config", "hidden_size", 1.5, "vision_config: hidden_size is 1.5, expected an integer"),
        ("vision_config", "intermediate_size", 10**9, "intermediate_size is 1000000000, expected 1 to"),
        ("vision_config", "hidden_act", "nonsense", "vision_config: "),
        ("vision_config", "hidden_act", 3, "vision_config: hidden_act is 3, expected a name"),
    ],
)
def test_config_defects(folder, table, key, value, message):
    edit(folder / "config.json", lambda config: (config[table] if table else config).update({key: value}))
    with pytest.raises(pop_ext.CheckpointError, match=message) as error:
        pop_ext.load(folder)
    assert str(error.value).startswith(str(folder / "config.json"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("out_hidden_size", 8, "out_hidden_size is 8, expected hidden_size"),
        ("deepstack_visual_indexes", [1, 0], r"deepstack_visual_indexes is \[1, 0\], expected ascending"),
        ("deepstack_visual_indexes", [5], r"deepstack_visual_indexes is \[5\]"),
        ("deepstack_visual_indexes", "all", "deepstack_visual_indexes"),
        ("num_position_embeddings", 10, "num_position_embeddings is 10, not a square"),
        ("rope_parameters", {"rope_type": "linear"}, "rope_parameters"),
        ("image_token_id", 5000, "image_token_id is 5000, expected less than vocab_size"),
        ("mrope_section", [9, 9, 9], r"mrope_section is \[9, 9, 9\], expected three counts with the sum"),
        ("mrope_interleaved", False, "mrope_interleaved is False, expected true"),
    ],
)
def test_qwen_config_defects(qwen, tmp_path, key, value, message):
    folder = shutil.copytree(qwen.folder, tmp_path / "copy")

    def change(config):
        table = config if key == "image_token_id" else config["vision_config"]
        (config["text_config"]["rope_parameters"] if key.startswith("mrope") else table)[key] = value

    edit(folder / "config.json", change)
    with pytest.raises(pop_ext.CheckpointError, match=message):
        pop_ext.load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("mm_tokens_per_image", 15, "mm_tokens_per_image is 15, expected a square"),
     ("mm_tokens_per_image", 25, "mm_tokens_per_image is 25, expected a square whose side divides"),
     ("image_token_index", 10**7, "image_token_index is 10000000, expected less than")],
)  # fmt: skip
def test_gemma_config_defects(gemma, tmp_path, key, value, message):
    folder = shutil.copytree(gemma.folder, tmp_path / "copy")
    edit(folder / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(pop_ext.CheckpointError, match=message):
        pop_ext.load(folder)


def test_tensor_defects(pair, folder, caplog):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tower = next(name for name in tensors if "vision_tower" in name or "visual" in name)
    for change, message in (
        ({tower: None}, "lacks"),
        ({tower + "_extra": torch.zeros(1)}, "unknown to this model"),
        ({tower: torch.zeros(3)}, "expected .* by config.json"),
    ):
        spoilt = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(spoilt, path)
        with pytest.raises(pop_ext.CheckpointError, match=message):
            pop_ext.load(folder)
    save_file(tensors | {"stray.weight": torch.zeros(1)}, path)  # of neither tower nor decoder: named, and left alone
    pop_ext.load(folder)
    assert "has 'stray.weight', which this model does not use" in caplog.text
    if pair.gemma:
        name = "language_model.model.norm.weight"
        save_file(tensors | {"model.language_model.norm.weight": tensors[name].clone()}, path)
        with pytest.raises(pop_ext.CheckpointError, match="under another name"):
            pop_ext.load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "(patch_size is 5|size.height is 31), expected .* by config.json"),
        ({"do_normalize": False}, "do_normalize is False, expected true"),
        ({"image_std": [0, 0, 0]}, "image_std is 0"),
        ({"rescale_factor": "x"}, "rescale_factor is 'x'|cannot be loaded"),
    ],
)
def test_processor_defects(pair, folder, values, message):
    values = values or ({"size": {"height": 31, "width": 31}} if pair.gemma else {"patch_size": 5})
    edit(folder / "preprocessor_config.json", lambda config: config.update(values))
    with pytest.raises(pop_ext.CheckpointError, match=message):
        pop_ext.load(folder)


def test_a_processor_that_is_no_json(folder):
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(pop_ext.CheckpointError, match="not JSON"):
        pop_ext.load(folder)


# Refused requests


def test_images_for_a_text_model(tiny_llama):
    model = pop_ext.load(tiny_llama, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"prompts\[0\] has images, but this model \(llama\) reads text only"):
        model.generate([[5, 6]], images=[[picture(9, 9)]], max_new_tokens=2)


def test_placeholders_that_do_not_match(pair):
    model, image, mark = pair.model, picture(33, 33), pair.mark
    token = model.vision.image_token_id
    ids = pair.ours(mark, [image])[0]
    cases = [
        (f"{mark}{mark}", [image], "has 2 placeholders .*, but there are 1 images"),
        (f"{mark}", [image, image], "has 1 placeholders .*, but there are 2 images"),
        (f"{mark} the", [], "has 1 placeholders .*, but there are 0 images"),
        ([5, token], [], "has 1 image placeholder tokens .*, but its 0 images take 0"),
        ([i for i in ids if i != token], [image], "has 0 image placeholder tokens"),
        ([*ids, token], [image], "image placeholder tokens"),
        ([token, 5, *ids[: len(ids) - ids[::-1].index(token) - 1]], [image], "not consecutive|placeholder tokens"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "more parts of type image than images"),
        ([{"role": "user", "content": [{"type": "image"}]}], [image, image], "but 1 more images are given"),
        ([{"role": "user", "content": [{"type": "audio"}]}], [], "expected text, image or video"),
    ]
    free = len(model.cache.free_blocks)
    for prompt, images, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate(prompt, images=images, max_new_tokens=2)
    assert len(model.cache.free_blocks) == free


def test_shape_of_images(pair):
    model, image = pair.model, picture(9, 9)
    with pytest.raises(ValueError, match=r"images is .*, expected a list .* for each of the 2 prompts"):
        model.generate(["the", "an"], images=[image, image], max_new_tokens=2)
    with pytest.raises(TypeError, match="images must be a list"):
        model.generate("the", images=image, max_new_tokens=2)
    with pytest.raises(TypeError, match="expected an image file's path, a PIL image or an array"):
        model.generate("the", images=[3], max_new_tokens=2)


def test_files_that_are_no_images(pair, tmp_path):
    picture(200, 100).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "drawing.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "gigantic.png")  # 900 million pixels in 110 kB
    for name, message in [
        ("cut.png", "cannot be read"), ("text.png", "not an image"), ("empty.png", "not an image"),
        ("drawing.eps", "not an image"), ("gigantic.png", "pixels"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            pair.model.generate("the", images=[tmp_path / name], max_new_tokens=2)
    with pytest.raises(FileNotFoundError, match=r"nowhere.png: no such file"):
        pair.model.generate("the", images=["nowhere.png"], max_new_tokens=2)
    with pytest.raises(ValueError, match=r"1 x 0 pixels|0 x 1 pixels"):
        pair.model.generate("the", images=[Image.new("RGB", (0, 1))], max_new_tokens=2)


def test_too_long_an_image(qwen):
    with pytest.raises(ValueError, match="image 0: cannot be processed: absolute aspect ratio"):
        qwen.model.generate("the", images=[picture(500, 2)], max_new_tokens=2)


def test_prefill_depth_below_deepstack(tmp_path_factory):
    pair = pair_of("qwen3_vl", tmp_path_factory)
    with pytest.raises(ValueError, match=r"prefill_depth is 1 layers, expected at least 2 .* DeepStack adds visual"):
        pair.model.generate("the", images=[picture(9, 9)], prefill_depth=1, max_new_tokens=2)
    assert pair.model.generate("the", prefill_depth=1, max_new_tokens=2).tokens  # without images it may be less


def test_bad_videos(qwen, gemma):
    frames = frames_of(2)
    for video, error, message in [
        (frames, TypeError, "expected .list of frames, frames per second"),
        (([], 1), ValueError, "has 0 frames"),
        ((frames, 0), ValueError, "frames per second is 0"),
        ((frames, float("nan")), ValueError, "frames per second is nan"),
        (([frames[0], picture(20, 20)], 1), ValueError, "frames of different sizes"),
        (([frames[0], 5], 1), TypeError, "frame 1 is 5"),
    ]:
        with pytest.raises(error, match=message):
            qwen.model.generate("the", videos=[video], max_new_tokens=2)
    with pytest.raises(ValueError, match="gemma3 takes images only"):
        gemma.model.generate("the", videos=[(frames, 1)], max_new_tokens=2)


def test_bad_visuals(pair):
    model = pair.model
    token_ids, visuals = pair.ours(f"a{pair.mark}", [picture(33, 33)])
    for prompts, images, message in [
        ([token_ids], [], "visuals is .*, expected a list for each of the 1 prompts"),
        ([token_ids[:5]], [visuals], r"expected \[0, 5\)"),
        ([token_ids], [[*visuals, *visuals]], "expected ."),
    ]:
        sequence = model.new_sequence()
        with pytest.raises(ValueError, match=message):
            model.prefill([sequence], prompts, visuals=images)
        assert sequence.token_ids == [] and sequence.blocks == []


# The command


def pop(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_command(pair, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, SIZES, strict=False):
        picture(*size).save(path)
    options = ("--image", paths[0], "--image", paths[1], "--prompt", "the", "--max-new-tokens", 5, "--dtype", "float32")
    result = pop("generate", pair.folder, *options, "--json", "--prefill-depth", 3)
    assert result.exit_code == 0, result.stderr
    chat = [{"role": "user", "content": "the"}]
    wanted = pair.model.generate(chat, images=paths, max_new_tokens=5, prefill_depth=3)
    output = json.loads(result.stdout)
    assert (output["tokens"], output["prompt_tokens"]) == (wanted.tokens[0], wanted.prompt_tokens[0])
    assert output["times"]["vision"] > 0
    result = pop("generate", pair.folder, *options, "--no-chat")
    assert result.stdout.rstrip("\n") == pair.model.generate("the", images=paths, max_new_tokens=5).text[0].rstrip("\n")
    assert "vision tower" in result.stderr
    result = pop("generate", pair.folder, "--prompt", "the", "--image", tmp_path / "none.png")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "none.png: no such file" in result.stderr


def test_command_with_a_video(qwen, gemma, tmp_path):
    frames = [frame.quantize(64).convert("RGB") for frame in frames_of(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
    options = ("--prompt", "the", "--max-new-tokens", 5, "--dtype", "float32", "--video", tmp_path / "clip.gif")
    chat = [{"role": "user", "content": "the"}]
    for extra, fps in ((), 2), (("--fps", 8), 8):
        result = pop("generate", qwen.folder, *options, "--json", *extra)
        assert result.exit_code == 0, result.stderr
        wanted = qwen.model.generate(chat, videos=[(frames, fps)], max_new_tokens=5)
        output = json.loads(result.stdout)
        assert (output["tokens"], output["prompt_tokens"]) == (wanted.tokens[0], wanted.prompt_tokens[0])
    for arguments, message in [
        ((gemma.folder, *options), "gemma3 takes images only"),
        ((qwen.folder, "--prompt", "the", "--fps", 2), "expected it with --video"),
        ((qwen.folder, *options, "--fps", -1), "frames per second is -1.0, expected a positive number"),
    ]:
        result = pop("generate", *arguments)
        assert result.exit_code == 1 and message in result.stderr


# Image-text samples


@pytest.fixture
def samples(pair, tmp_path) -> Path:
    lines = []
    for i in range(12):
        picture(40, 30, i).save(tmp_path / f"{i}.png")
        lines.append({"images": [f"{i}.png"], "prompt": f"the {pair.mark} and {'an' * i}", "continuation": "then the"})
    lines[1] |= {"images": [], "prompt": "the and an"}
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path / "samples.jsonl"


def test_gates_are_the_runner(pair, samples):
    """Closing all prefill gates from P up in transformers' model is POP with own weights, on images too."""
    loaded = load_samples(samples, pair.model)
    prompts, continuations, media, windows = loaded.prompts, loaded.continuations, loaded.media, loaded.windows
    inputs = [transformers_inputs(pair.peer.config, *both) for both in zip(windows, media, strict=True)]
    loaded.encode_images(pair.model)
    visuals = loaded.visuals
    depth = max(pair.deepstack, 2)
    kl = truncation_kl(pair.peer, windows, [len(prompt) for prompt in prompts], depth, images=inputs)
    full, cut = (
        [rows.log_softmax(-1) for rows in pair.model.logits(prompts, continuations, visuals=visuals, prefill_depth=d)]
        for d in (pair.layers, depth)
    )
    ours = sum(float((a.exp() * (a - b)).sum(-1).mean()) for a, b in zip(full, cut, strict=True)) / len(full)
    assert abs(ours / kl - 1) < 1e-3 and kl > 0.01


def test_sample_commands(pair, samples, tmp_path):
    """importance, calibrate and evaluate, one after the other."""
    result = pop("importance", pair.folder, "--samples", samples, "--draws", 1, "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["prompts"] == 12 and len(summary["importance"]) == 2 * pair.layers
    assert all(row["importance"] > 0 for row in summary["importance"] if row["layer"] < pair.layers - 1)
    depth, output = max(pair.deepstack, 2), tmp_path / "calibration.safetensors"
    options = ("--samples", samples, "--prefill-depth", depth, "--dtype", "float32", "--json")
    result = pop("calibrate", pair.folder, *options, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["text"] == ["samples.jsonl"]
    names = ("pop_uncalibrated", "pop_calibrated", "speed", "shortgpt")
    methods = [option for name in names for option in ("--method", name)]
    result = pop("evaluate", pair.folder, *options, "--calibration", output, *methods)
    assert result.exit_code == 0, result.stderr
    kl = {row["method"]: row["kl"] for row in json.loads(result.stdout)}
    assert kl.keys() == {"full", "pop_uncalibrated", "pop_calibrated", "speed", "shortgpt"}
    assert 0 < kl["pop_calibrated"] < kl["pop_uncalibrated"]


def test_refinement_is_refused(pair, samples, tmp_path):
    """Before anything is computed or written."""
    (tmp_path / "text.txt").write_text("the an and " * 200)
    options = ("--prefill-depth", 2, "--refine", 3, "--output", tmp_path / "out.safetensors")
    for source, message in [
        (("--samples", samples), "expected it without --samples"),
        (("--text", tmp_path / "text.txt"), "takes models of text alone"),
    ]:
        result = pop("calibrate", pair.folder, *source, *options)
        assert result.exit_code == 1 and message in result.stderr
        assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(ValueError, match=r"got one with a vision tower \((qwen3_vl|gemma3)\)"):
        refine(pair.model, None, [[5] * 90] * 2, 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"images": "a.png", "prompt": "a", "continuation": "b"}', "line 1: images is .*, expected a list"),
        ('{"images": [], "prompt": "a"}', "expected an object with messages, or with prompt and continuation"),
        ('{"images": [], "prompt": "a", "continuation": ""}', "line 1: the continuation is empty"),
        ('{"images": ["none.png"], "prompt": "a", "continuation": "b"}', "line 1, image 0: .*none.png: no such file"),
        ("", "no samples"),
    ],
)
def test_bad_samples(pair, tmp_path, line, message):
    (tmp_path / "samples.jsonl").write_text(line)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_samples(tmp_path / "samples.jsonl", pair.model)
