"""Requests with images that are refused, and what they leave behind."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from vision_models import picture
from vision_pairs import frames_of, pair_of

import pop_ext


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
    with pytest.raises(TypeError, match=r"images is of type .*, expected a list"):
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
