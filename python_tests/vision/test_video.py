"""Video: frames and times as transformers takes them, in turns, batches and files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import normwise
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from vision_models import picture
from vision_pairs import BOUND, CONTINUATION, frames_of, pixels

import pop_ext
from pop_ext.runtime.prompts import encode_prompt
from pop_ext.vision.images import read_video


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
