"""Reading image and video files, within limits."""

from __future__ import annotations

import base64
import io
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ..checkpoints.files import one_line, some_of

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
MAX_PIXELS = 2**26  # of an image file, checked before anything is decoded
MAX_FRAMES = 4096  # of a video
MAX_VIDEO_PIXELS = 2**28  # of all its frames, which are in memory together
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that starts another program, as EPS does


def open_image(image, name: str) -> Image.Image:
    """An RGB image from a file's path, a file: or data: address, a file's bytes, a PIL image, or an array or tensor
    [height, width] or [height, width, channels] of uint8 or uint16; ValueError if it is no image, or a gigantic one.

    The same pixels give the same image, however they come: upright by their EXIF orientation, 16 bits a channel reduced
    to 8, and what is transparent laid on white.
    """
    from PIL import Image

    where = name
    if isinstance(image, str) and (scheme := re.match(r"(data|file|https?):", image)):
        image, where = _of_address(image, scheme[1], name), f"{name}: {image:.60}"
    if isinstance(image, str | Path):
        where = f"{name}: {image}"
        if not Path(image).is_file():
            raise FileNotFoundError(f"{where}: no such file")
        picture = _opened(image, where)
    elif isinstance(image, Image.Image):
        picture = image
    elif isinstance(image, bytes):
        return open_image(_opened(io.BytesIO(image), where), where)
    elif hasattr(image, "__array__"):
        picture = _image_of_array(image, name)
    else:
        raise TypeError(f"{name} is {image!r:.80}, expected an image file's path, a PIL image or an array")
    width, height = picture.size
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"{where}: {width} x {height} pixels, expected 1 to {MAX_PIXELS}")
    try:
        return _plain(picture)
    except Exception as error:  # a decoder's complaint about a damaged file is of any kind
        raise ValueError(f"{where}: cannot be read: {one_line(error)}") from error


def _opened(file, where: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{where}: not an image of a known format ({', '.join(FORMATS)})") from error


def _of_address(address: str, scheme: str, name: str) -> str | bytes:
    """The path of a file: address, the bytes of a data: one. Nothing is fetched."""
    if scheme == "file":
        return unquote(urlsplit(address).path)
    if scheme != "data":
        raise ValueError(f"{name}: {address:.60} is a web address: download it, and pass the file's path")
    head, comma, data = address.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("expected data:image/...;base64,...")
        return base64.b64decode(unquote(data), validate=True)
    except ValueError as error:
        raise ValueError(f"{name}: {address:.60}: {one_line(error)}") from error


def _plain(picture: Image.Image) -> Image.Image:
    """A picture of any mode as upright, opaque RGB; the one given is left as it is."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _eight_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits a pixel: PIL's own conversion would cut off all above 255."""
    import numpy as np
    from PIL import Image

    grey, given = np.asarray(picture), picture.info.get("transparency")
    if picture.mode == "F" or grey.min(initial=0) < 0 or grey.max(initial=0) > 65535:
        raise ValueError(f"mode {picture.mode}, values {grey.min()} to {grey.max()}, expected 0 to 65535")
    narrow = Image.fromarray(_narrowed(grey))
    if given is not None:  # one grey level is transparent
        narrow.putalpha(Image.fromarray(np.where(grey == given, 0, 255).astype(np.uint8)))
    return narrow


def _narrowed(values):
    """16 bits -> 8, rounded: 65535 is 255."""
    import numpy as np

    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _image_of_array(array, name: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    values = np.asarray(array)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or values.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"{name} is an array {list(values.shape)} of {values.dtype}, expected [height, width] or [height, width, "
            "1 to 4 channels] of uint8 or uint16"
        )
    if 0 in values.shape:
        raise ValueError(f"{name}: {values.shape[1]} x {values.shape[0]} pixels, expected 1 to {MAX_PIXELS}")
    return Image.fromarray(np.ascontiguousarray(values if values.dtype == np.uint8 else _narrowed(values)))


def read_video(path: str | Path, fps: float | None = None) -> tuple[list[Image.Image], float]:
    """(frames, frames per second) of a folder of image files, in the order of their names, in which 2 goes before 10,
    or of an animated GIF, PNG or WebP file, whose own rate is taken where `fps` is None. Files of a folder that are no
    images by their names are left out, with one warning.
    """
    from PIL import Image, ImageSequence

    path, name = Path(path), f"video {path}"
    if path.is_dir():
        if fps is None:
            raise ValueError(f"{name}: a folder does not say how fast its frames follow: expected frames per second")
        files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
        known = {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS}
        images = sorted((file for file in files if file.suffix.lower() in known), key=_natural)
        if others := {file.name for file in files} - {file.name for file in images}:
            logger.warning("%s: %s left out, no image by its name", name, some_of(others))
        if not 1 <= len(images) <= MAX_FRAMES:
            raise ValueError(f"{name} has {len(images)} images, expected 1 to {MAX_FRAMES}, each a frame")
        return open_frames(images, name), fps
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


def _natural(file: Path) -> tuple[list, str]:
    """The key by which names sort as people count: numbers in them by value."""
    parts = re.split(r"([0-9]+)", file.name)
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)], file.name


def open_frames(frames, name: str) -> list[Image.Image]:
    """`open_image` of every frame; ValueError as soon as they have too many pixels together."""
    result, pixels = [], 0
    for i, frame in enumerate(frames):
        result.append(open_image(frame, f"{name}, frame {i}"))
        pixels += result[-1].width * result[-1].height
        if pixels > MAX_VIDEO_PIXELS:
            raise ValueError(f"{name}: more than {MAX_VIDEO_PIXELS} pixels in its first {i + 1} frames together")
    return result
