"""Vision: pictures become features in the decoder's hidden space, and placeholder tokens in the prompt.

The vision towers are transformers' modules, their weights read from the same safetensors as the decoder's, and images
are resized and normalised by transformers' image processors for PIL. What stands in the prompt for an image is laid out
here as the models were trained on it. Videos are frames that are resized like images and cut into patches of several
frames here, as transformers' own processor for them needs torchvision.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoints.families import ModelSpec, check_number, truncated_repr
from ..checkpoints.weights import CONFIG_LIMIT, CheckpointError, _file, _one_line, _read_json, load_vision_weights
from ..runtime.kv_cache import ImageSpan

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**26  # of an image file, looked at before anything is decoded
MAX_FRAMES = 4096  # of a video
MAX_VIDEO_PIXELS = 2**28  # of all its frames, which are in memory together
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that starts another program, as EPS does
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
PROCESSED_PIXELS = (1, 2**26)  # that a folder may ask an image to be enlarged to


@dataclass
class Media:
    """An image or a video, ready for the vision tower.

    pixel_values: float32, as transformers' processor makes them: patches [P, 3 * frames * size^2] for Qwen3-VL, crops
    [C, 3, size, size] for Gemma-3. spans: for each image, crop or temporal patch that gets tokens of its own, the index
    of the first in the prompt and one past the last.
    """

    pixel_values: Tensor
    grid_thw: tuple[int, int, int] | None  # Qwen3-VL: temporal patches, rows and columns of patches
    spans: list[tuple[int, int]]


class Vision:
    """The vision tower of a model, and its processing. ValueError and CheckpointError name what is wrong."""

    def __init__(self, folder: Path, config, spec: ModelSpec, dtype: torch.dtype):
        self.folder, self.config, self.dtype = Path(folder), config, dtype
        self.image_token_id = config.image_token_id
        self.video_token_id = getattr(config, "video_token_id", None)
        self.is_gemma = spec.vision_type == "gemma3"
        self.modules = _load_modules(self.folder, config, spec, dtype)
        self.image_processor = _load_image_processor(self.folder, config, self.is_gemma)
        self.video_settings = None if self.is_gemma else _load_video_settings(self.folder, config)

    # What stands in the text

    def placeholder(self, kind: str, tokenizer) -> str:
        """The token that the user, or the chat template, writes where an image or video goes."""
        ids = {
            "image": self.config.boi_token_id if self.is_gemma else self.image_token_id,
            "video": self.video_token_id,
        }
        return tokenizer.convert_ids_to_tokens(ids[kind])

    def written(self, kind: str, tokenizer) -> str:
        """The placeholder as it stands in a prompt that has no chat template to write it."""
        token = self.placeholder(kind, tokenizer)
        if self.is_gemma:
            return token
        start, end = tokenizer.convert_ids_to_tokens(
            [self.config.vision_start_token_id, self.config.vision_end_token_id]
        )
        return start + token + end

    def expand(self, text: str, media: dict[str, list[tuple[Media, str]]], name: str, tokenizer) -> str:
        """The text with each placeholder replaced by its image's or video's tokens (`process_image`)."""
        found = {kind: text.count(self.placeholder(kind, tokenizer)) for kind in self.kinds}
        for kind, count in found.items():
            if count != len(media[kind]):
                raise ValueError(
                    f"{name} has {count} placeholders {self.placeholder(kind, tokenizer)}, but there are "
                    f"{len(media[kind])} {kind}s: expected one for each"
                )
        waiting = {self.placeholder(kind, tokenizer): iter(media[kind]) for kind in self.kinds}
        pattern = "|".join(map(re.escape, waiting))
        return re.sub(pattern, lambda match: self._layout(next(waiting[match[0]]), tokenizer), text)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("image",) if self.is_gemma else ("image", "video")

    def _layout(self, entry: tuple[Media, list[float]], tokenizer) -> str:
        media, times = entry
        if self.is_gemma:
            start, image, end = tokenizer.convert_ids_to_tokens(
                [self.config.boi_token_id, self.image_token_id, self.config.eoi_token_id]
            )
            whole = f"\n\n{start}{image * self.config.mm_tokens_per_image}{end}\n\n"
            crops = len(media.pixel_values) - 1
            if not crops:
                return whole
            return f"Here is the original image {whole} and here are some crops to help you see better " + " ".join(
                [whole] * crops
            )
        tokens = self._tokens(media)
        if not times:
            return self.placeholder("image", tokenizer) * tokens
        start, end = tokenizer.convert_ids_to_tokens(
            [self.config.vision_start_token_id, self.config.vision_end_token_id]
        )
        patch = start + self.placeholder("video", tokenizer) * tokens + end
        return "".join(f"<{time:.1f} seconds>{patch}" for time in times)

    def _tokens(self, media: Media) -> int:
        """Of each span."""
        if self.is_gemma:
            return self.config.mm_tokens_per_image
        _, rows, columns = media.grid_thw
        return rows * columns // self.config.vision_config.spatial_merge_size**2

    def locate(self, token_ids: list[int], images: list[Media], videos: list[Media], name: str) -> None:
        """Sets the spans of all images and videos from where the placeholder tokens stand in the prompt.

        ValueError unless each has its number of consecutive placeholder tokens, in order, and none is left over.
        """
        for kind, token_id, media in (("image", self.image_token_id, images), ("video", self.video_token_id, videos)):
            at = [index for index, token in enumerate(token_ids) if token == token_id] if token_id is not None else []
            parts = [
                item for item in media for _ in range(len(item.pixel_values) if self.is_gemma else item.grid_thw[0])
            ]
            expected = sum(map(self._tokens, parts))
            if len(at) != expected:
                raise ValueError(
                    f"{name} has {len(at)} {kind} placeholder tokens (id {token_id}), but its {len(media)} {kind}s "
                    f"take {expected}"
                )
            used = 0
            for item in media:
                item.spans = []
            for item in parts:
                count = self._tokens(item)
                start, last = at[used], at[used + count - 1]
                if last - start != count - 1:
                    raise ValueError(
                        f"{name}: the {count} placeholder tokens of the {kind} at {start} are not consecutive"
                    )
                item.spans.append((start, last + 1))
                used += count

    # Pictures

    def process_image(self, image, name: str) -> tuple[Media, list[float]]:
        """image: a file's path or a PIL image. Returns it ready for the tower, and no times."""
        if self.image_processor is None:
            raise CheckpointError(f"{self.folder}: has no {PROCESSOR_FILES[0]}, so images cannot be processed")
        picture = open_image(image, name)
        settings = {"do_convert_rgb": True, "return_tensors": "pt"}
        try:
            processed = self.image_processor(picture, **settings)
        except (ValueError, TypeError, ZeroDivisionError) as error:  # no aspect ratio above 200, ...
            raise ValueError(f"{name}: cannot be processed: {_one_line(error)}") from error
        grid = None if self.is_gemma else tuple(processed["image_grid_thw"][0].tolist())
        return Media(processed["pixel_values"], grid, []), []

    def process_video(self, video, name: str) -> tuple[Media, list[float]]:
        """video: (frames, frames per second), frames being image files or PIL images of one size, all of which are
        used. Returns it ready for the tower, and the time in seconds of each temporal patch.

        Frames are resized, bicubic, to the size at which the whole video has about as many pixels as the folder's video
        processor allows; patches of `temporal_patch_size` frames, the last frame repeated where it does not divide.
        """
        if self.is_gemma:
            raise ValueError(f"{name}: gemma3 takes images only; pass the frames as images")
        if self.image_processor is None:
            raise CheckpointError(f"{self.folder}: has no {PROCESSOR_FILES[0]}, so videos cannot be processed")
        if not isinstance(video, tuple | list) or len(video) != 2 or not isinstance(video[0], list | tuple):
            raise TypeError(f"{name} is {video!r:.80}, expected (list of frames, frames per second)")
        frames, fps = video
        if not 1 <= len(frames) <= MAX_FRAMES:
            raise ValueError(f"{name} has {len(frames)} frames, expected 1 to {MAX_FRAMES}")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not (isfinite(fps) and fps > 0):
            raise ValueError(f"{name}: frames per second is {fps!r:.80}, expected a positive number")
        frames = _within_limits(frames, name)
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise ValueError(f"{name} has frames of different sizes: {', '.join(map(str, sorted(sizes)[:3]))}")
        return _patches(frames, self.video_settings, name), _patch_times(len(frames), fps, self.video_settings)

    @torch.no_grad()
    def encode(self, media: Media) -> list[ImageSpan]:
        """Runs the vision tower: an ImageSpan for each of its spans, features [1 + d, tokens, D] in `dtype`."""
        pixels = media.pixel_values.to(self.dtype)
        if self.is_gemma:
            hidden = self.modules["vision_tower"](pixel_values=pixels).last_hidden_state
            parts, grid = self.modules["multi_modal_projector"](hidden).unsqueeze(1), None
        else:
            merge = self.config.vision_config.spatial_merge_size
            time, rows, columns = media.grid_thw
            output = self.modules["visual"](pixels, grid_thw=torch.tensor([media.grid_thw]))
            features = torch.stack([output.pooler_output, *output.deepstack_features])
            parts, grid = features.unflatten(1, (time, -1)).transpose(0, 1), (rows // merge, columns // merge)
        return [ImageSpan(*span, grid, part) for span, part in zip(media.spans, parts, strict=True)]


def load_samples(path: str | Path, model) -> tuple[list[list[int]], list[list[int]], list[list[Media]]]:
    """Image-text samples for measuring: token ids of the prompts and of their continuations, and the prompts' images.

    The file has a JSON object a line: {"images": [paths, relative to the file], "prompt": text or chat messages,
    "continuation": text}. ValueError names the line that is wrong.
    """
    from ..runtime.generation import encode_prompt

    path, prompts, continuations, media = Path(path), [], [], []
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: text cannot be turned into tokens")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}: not JSON: {_one_line(error)}") from error
        keys = {"images": list, "prompt": (str, list), "continuation": str}
        if not isinstance(sample, dict) or any(not isinstance(sample.get(key), kind) for key, kind in keys.items()):
            raise ValueError(
                f"{name}: {truncated_repr(sample)}, expected an object with images (list), prompt, continuation"
            )
        images = [path.parent / image if isinstance(image, str) else image for image in sample["images"]]
        prompt, pictures = encode_prompt(model, sample["prompt"], name, [], images)
        continuation = model.tokenizer(sample["continuation"], add_special_tokens=False).input_ids
        if not continuation:
            raise ValueError(f"{name}: the continuation is empty")
        prompts.append(prompt)
        continuations.append(continuation)
        media.append(pictures)
    if not prompts:
        raise ValueError(f"{path}: no samples")
    return prompts, continuations, media


def transformers_inputs(config, token_ids: list[int], media: list[Media]) -> dict[str, Tensor]:
    """What transformers' model of `config` takes beside these token ids for their images: {} without any."""
    if not media:
        return {}
    kinds = (torch.tensor([token_ids]) == config.image_token_id).int()
    inputs = {"pixel_values": torch.cat([item.pixel_values for item in media])}
    if media[0].grid_thw is None:
        return inputs | {"token_type_ids": kinds}
    grids = torch.tensor([item.grid_thw for item in media])
    return inputs | {"image_grid_thw": grids, "mm_token_type_ids": kinds}


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
            raise ValueError(f"{where}: {_one_line(error)}") from error
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
        raise ValueError(f"{where}: cannot be read: {_one_line(error)}") from error


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
        return _within_limits(files, name), fps
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
            result = _within_limits(frames(), name)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{name}: cannot be read: {_one_line(error)}") from error
    if fps is None and seconds <= 0:
        raise ValueError(f"{name} does not say how fast its frames follow: expected frames per second")
    return result, len(result) / seconds if fps is None else fps


def _within_limits(frames, name: str) -> list[Image.Image]:
    """`open_image` of every frame; ValueError as soon as they have too many pixels together."""
    result, pixels = [], 0
    for i, frame in enumerate(frames):
        result.append(open_image(frame, f"{name}, frame {i}"))
        pixels += result[-1].width * result[-1].height
        if pixels > MAX_VIDEO_PIXELS:
            raise ValueError(f"{name}: more than {MAX_VIDEO_PIXELS} pixels in its first {i + 1} frames together")
    return result


def _patches(frames: list[Image.Image], settings: dict, name: str) -> Media:
    """[T * rows * columns, 3 * t * size^2] float32: patches by temporal patch, then by groups of merge_size^2 as the
    tower merges them.
    """
    import numpy as np
    from PIL import Image
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    depth, size, merge = (settings[key] for key in ("temporal_patch_size", "patch_size", "merge_size"))
    width, height = frames[0].size
    try:
        height, width = smart_resize(
            max(len(frames), depth),
            height,
            width,
            temporal_factor=depth,
            factor=size * merge,
            min_pixels=settings["size"]["shortest_edge"],
            max_pixels=settings["size"]["longest_edge"],
        )
    except ValueError as error:  # no aspect ratio above 200
        raise ValueError(f"{name}: {_one_line(error)}") from error
    frames = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    frames += frames[-1:] * (-len(frames) % depth)
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).float().movedim(-1, 1)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("image_mean", "image_std"))
    pixels = (pixels * settings["rescale_factor"] - mean) / std
    time, rows, columns = len(frames) // depth, height // size, width // size
    patches = pixels.reshape(time, depth, 3, rows // merge, merge, size, columns // merge, merge, size)
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * rows * columns, -1)
    return Media(patches, (time, rows, columns), [])


def _patch_times(count: int, fps: float, settings: dict) -> list[float]:
    """Seconds: the mean of the first and last frame of each temporal patch."""
    depth = settings["temporal_patch_size"]
    last = count - 1
    return [(start + min(start + depth - 1, last)) / 2 / fps for start in range(0, count, depth)]


def _load_modules(folder: Path, config, spec: ModelSpec, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The vision tower, and Gemma-3's projector. Built twice: without memory to check the tensors, then around them."""
    from transformers.initialization import no_init_weights

    if spec.vision_type == "gemma3":
        from transformers import SiglipVisionModel
        from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

        kinds = {"vision_tower": (SiglipVisionModel, config.vision_config),
                 "multi_modal_projector": (Gemma3MultiModalProjector, config)}  # fmt: skip
    else:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        kinds = {"visual": (Qwen3VLVisionModel, config.vision_config)}

    def build(device: str) -> dict[str, torch.nn.Module]:
        with torch.device(device), no_init_weights():
            return {name: kind(part) for name, (kind, part) in kinds.items()}

    try:
        shapes = build("meta")
    except Exception as error:  # whatever transformers makes of a config
        raise CheckpointError(f"{folder / 'config.json'}: vision_config: {_one_line(error)}") from error
    weights = load_vision_weights(folder, spec, shapes, dtype)
    modules = build("cpu")
    for name, module in modules.items():
        module.load_state_dict(weights[name], assign=True)
        module.eval().requires_grad_(False)
    return modules


def _load_image_processor(folder: Path, config, is_gemma: bool):
    """transformers' processor with PIL; None where the folder has none. It must fit the tower."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    try:
        if is_gemma:
            from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil as Processor
        else:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor
        for name in PROCESSOR_FILES:
            if (folder / name).is_file():
                _read_json(_file(folder, name), CONFIG_LIMIT)
        processor = Processor.from_pretrained(folder, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: the image processor cannot be loaded: {_one_line(error)}") from error
    vision, size = config.vision_config, processor.size
    try:
        if is_gemma:
            expected = {"size.height": (size.height, vision.image_size), "size.width": (size.width, vision.image_size)}
        else:
            expected = {
                "patch_size": (processor.patch_size, vision.patch_size),
                "merge_size": (processor.merge_size, vision.spatial_merge_size),
                "temporal_patch_size": (processor.temporal_patch_size, vision.temporal_patch_size),
            }
            for key in ("shortest_edge", "longest_edge"):
                check_number(f"size.{key}", getattr(size, key), PROCESSED_PIXELS, integer=True)
        for key, (found, wanted) in expected.items():
            if found != wanted:
                raise ValueError(f"{key} is {truncated_repr(found)}, expected {wanted} by config.json")
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if getattr(processor, key) is not True:
                raise ValueError(f"{key} is {truncated_repr(getattr(processor, key))}, expected true")
        check_number("rescale_factor", processor.rescale_factor, (1e-6, 1.0))
        for key in ("image_mean", "image_std"):
            _check_channels(key, getattr(processor, key))
        if is_gemma and processor.do_pan_and_scan:
            check_number("pan_and_scan_min_crop_size", processor.pan_and_scan_min_crop_size, (1, 2**16), integer=True)
            check_number("pan_and_scan_max_num_crops", processor.pan_and_scan_max_num_crops, (1, 64), integer=True)
            check_number("pan_and_scan_min_ratio_to_activate", processor.pan_and_scan_min_ratio_to_activate, (1, 1e6))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / PROCESSOR_FILES[0]}: {_one_line(error)}") from error
    return processor


def _load_video_settings(folder: Path, config) -> dict:
    """How frames are processed: what the folder says, else what transformers' class for Qwen3-VL says."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor as Defaults

    keys = ("size", "image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
    settings = {key: getattr(Defaults, key) for key in keys} | {"rescale_factor": 1 / 255}
    path = folder / "video_preprocessor_config.json"
    if path.is_file():
        given = _read_json(_file(folder, path.name), CONFIG_LIMIT)
    else:
        path = folder / "processor_config.json"
        given = _read_json(_file(folder, path.name), CONFIG_LIMIT).get("video_processor") if path.is_file() else None
    vision = config.vision_config
    expected = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size,
                "temporal_patch_size": vision.temporal_patch_size}  # fmt: skip
    if not given:
        return settings | expected
    try:
        settings |= {key: given[key] for key in settings if given.get(key) is not None}
        for key, value in expected.items():
            if settings[key] != value:
                raise ValueError(f"{key} is {truncated_repr(settings[key])}, expected {value} by config.json")
        for key in ("shortest_edge", "longest_edge"):
            check_number(f"size.{key}", settings["size"].get(key), PROCESSED_PIXELS, integer=True)
        check_number("rescale_factor", settings["rescale_factor"], (1e-6, 1.0))
        for key in ("image_mean", "image_std"):
            _check_channels(key, settings[key])
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {_one_line(error)}") from error
    return settings


def _check_channels(name: str, value) -> None:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{name} is {truncated_repr(value)}, expected three numbers")
    for number in value:
        check_number(name, number, (1e-6, 1e3) if name == "image_std" else (-1e3, 1e3))
