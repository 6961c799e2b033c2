"""Reading pictures: the same pixels give the same image, whether they come as a file, a PIL image or an array."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from pop_ext.vision.images import open_image, read_video

RANDOM = np.random.default_rng(0)


def pixels(image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def all_ways(picture, path, **settings) -> np.ndarray:
    """Of the file and the PIL image read from it and the PIL image itself, which must agree."""
    picture.save(path, **settings)
    found = pixels(open_image(path, "image"))
    with Image.open(path) as again:
        assert (pixels(open_image(again, "image")) == found).all()
    return found


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits(tmp_path, suffix):
    grey = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)
    wanted = np.round(grey / 257).astype(np.uint8)
    for found in (all_ways(Image.fromarray(grey), tmp_path / f"a.{suffix}"), pixels(open_image(grey, "image"))):
        assert (found == wanted[:, :, None]).all()
    wide = Image.fromarray(grey.astype(np.int32))  # mode I, as older PIL opens such files
    assert (pixels(open_image(wide, "image")) == wanted[:, :, None]).all()
    wide = Image.fromarray(grey.astype(np.int32) - 5)
    with pytest.raises(ValueError, match=r"image: cannot be read: mode I, values -5 to 65530, expected 0 to 65535"):
        open_image(wide, "image")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGBa"])
def test_alpha_lies_on_white(tmp_path, mode):
    values = RANDOM.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    picture = Image.fromarray(values)
    if mode == "P":
        picture = picture.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=7)
        picture.info["transparency"] = 3
        opaque = np.asarray(picture)[:, :, None] != 3
        wanted = np.where(opaque, np.asarray(picture.convert("RGB")), 255)
        assert (all_ways(picture, tmp_path / "a.png", transparency=3) == wanted).all()
        assert (pixels(open_image(picture, "image")) == wanted).all()
        return
    picture = picture.convert(mode)
    colour = np.asarray(picture.convert("RGBA")).astype(float)
    alpha = colour[:, :, 3:] / 255
    wanted = colour[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(open_image(picture, "image")) - wanted).max() <= 1
    if mode != "RGBa":
        assert np.abs(all_ways(picture, tmp_path / "a.png") - wanted).max() <= 1
        array = np.asarray(picture)
        assert np.abs(pixels(open_image(array, "image")) - wanted).max() <= 1


@pytest.mark.parametrize(("mode", "clear"), [("L", 7), ("RGB", (1, 2, 3)), ("I;16", 700)])
def test_one_transparent_colour(tmp_path, mode, clear):
    """A PNG's tRNS chunk: a colour that is not there."""
    if mode == "I;16":
        picture = Image.fromarray(np.full((4, 5), 700, np.uint16))
        picture.putpixel((1, 2), 30_000)
    else:
        picture = Image.new(mode, (5, 4), clear)
        picture.putpixel((1, 2), 90 if mode == "L" else (90, 80, 70))
    found = all_ways(picture, tmp_path / "a.png", transparency=clear)
    wanted = np.full((4, 5, 3), 255)
    wanted[2, 1] = {"L": 90, "RGB": (90, 80, 70), "I;16": round(30_000 / 257)}[mode]
    assert (found == wanted).all()


def test_orientation(tmp_path):
    picture = Image.fromarray(RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    found = all_ways(picture, tmp_path / "a.png", exif=exif)
    assert (found == np.rot90(np.asarray(picture), -1)).all()
    with Image.open(tmp_path / "a.png") as given:
        open_image(given, "image")
        assert given.size == (30, 20)  # the caller's is not turned


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes(mode):
    picture = Image.fromarray(RANDOM.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    picture = picture.convert("RGB" if mode == "LAB" else mode)
    assert (pixels(open_image(picture, "image")) == np.asarray(picture.convert("RGB"))).all()


def test_arrays():
    values = RANDOM.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for array in (values, torch.from_numpy(values), np.asfortranarray(values)):
        assert (pixels(open_image(array, "image")) == values).all()
    for array in (values[:, :, 0], values[:, :, :1], torch.from_numpy(values[:, :, 0])):
        assert (pixels(open_image(array, "image")) == values[:, :, :1]).all()
    for array in (values / 255, values[None], values.transpose(2, 0, 1), values.astype(int), np.uint8(3)):
        with pytest.raises(ValueError, match=r"image is an array .*, expected"):
            open_image(array, "image")
    with pytest.raises(ValueError, match=r"image: 0 x 5 pixels"):
        open_image(np.zeros((5, 0), np.uint8), "image")


def test_frames_in_natural_order(tmp_path, caplog):
    for number in (1, 2, 9, 10, 11, 100):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    for name in ("Thumbs.db", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        frames, _ = read_video(tmp_path, 2.0)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [1, 2, 9, 10, 11, 100]
    (record,) = caplog.records
    assert record.getMessage().endswith("'Thumbs.db', 'notes.txt' left out, no image by its name")
    (tmp_path / "frame3.PNG").write_text("no image in spite of its name")
    with pytest.raises(ValueError, match=r"frame 2: .*frame3.PNG: not an image"):
        read_video(tmp_path, 2.0)
