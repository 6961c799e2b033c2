"""Reading image and video files, within limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.files import one_line

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**26  # of an image file, looked at before anything is decoded
MAX_FRAMES = 4096  # of a video
MAX_VIDEO_PIXELS = 2**28  # of all its frames, which are in memory together
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that starts another program, as EPS does


def open_image(image, name: str) -> Image.Image:
    """An RGB image from a file's path or a PIL image, upright; ValueError if it is no image, or a gigantic one."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, Image.Image):
        picture, where = image, name
    elif isinstance(image, str | Path):
        where = f"{name}: {image}"
        if not Path(image).is_file():
            raise FileNotFoundError(f"{where}: no such file")
        try:
            picture = Image.open(image, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{where}: not an image of a known format ({', '.join(FORMATS)})") from error
    else:
        raise TypeError(f"{name} is {image!r:.80}, expected an image file's path or a PIL image")
    width, height = picture.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"{where}: {width} x {height} pixels, expected 1 to {MAX_PIXELS}")
    try:
        return (ImageOps.exif_transpose(picture) if picture is not image else picture).convert("RGB")
    except Exception as error:  # a decoder's complaint about a damaged file is of any kind
        raise ValueError(f"{where}: cannot be read: {one_line(error)}") from error


def read_video(path: str | Path, fps: float | None = None) -> tuple[list[Image.Image], float]:
    """(frames, frames per second) of a folder of image files, in the order of their names, or of an animated GIF, PNG
    or WebP file, whose own rate is taken where `fps` is None.
    """
    from PIL import Image, ImageSequence

    path, name = Path(path), f"video {path}"
    if path.is_dir():
        if fps is None:
            raise ValueError(f"{name}: a folder does not say how fast its frames follow: expected frames per second")
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not 1 <= len(files) <= MAX_FRAMES:
            raise ValueError(f"{name} has {len(files)} files, expected 1 to {MAX_FRAMES}, each a frame")
        return open_frames(files, name), fps
    open_image(path, name)  # its first frame, and what can be wrong with that
    with Image.open(path, formats=FORMATS) as animation:
        if getattr(animation, "n_frames", 1) > MAX_FRAMES:
            raise ValueError(f"{name} has {animation.n_frames} frames, expected 1 to {MAX_FRAMES}")
        seconds = 0.0

        def frames():
            nonlocal seconds
            for frame in ImageSequence.Iterator(animation):
                yield frame
                seconds += frame.info.get("duration", 0) / 1000

        try:
            result = open_frames(frames(), name)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{name}: cannot be read: {one_line(error)}") from error
    if fps is None and seconds <= 0:
        raise ValueError(f"{name} does not say how fast its frames follow: expected frames per second")
    return result, len(result) / seconds if fps is None else fps


def open_frames(frames, name: str) -> list[Image.Image]:
    """`open_image` of every frame; ValueError as soon as they have too many pixels together."""
    result, pixels = [], 0
    for i, frame in enumerate(frames):
        result.append(open_image(frame, f"{name}, frame {i}"))
        pixels += result[-1].width * result[-1].height
        if pixels > MAX_VIDEO_PIXELS:
            raise ValueError(f"{name}: more than {MAX_VIDEO_PIXELS} pixels in its first {i + 1} frames together")
    return result
