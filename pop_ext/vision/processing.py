"""How a folder says that its images and videos are processed, and the patches of a video."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoints.bounds import check_number, truncated_repr
from ..checkpoints.files import CONFIG_LIMIT, CheckpointError, one_line, read_json, regular_file

if TYPE_CHECKING:
    from PIL import Image

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


def video_patches(frames: list[Image.Image], settings: dict, name: str) -> Media:
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
        raise ValueError(f"{name}: {one_line(error)}") from error
    frames = [frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    frames += frames[-1:] * (-len(frames) % depth)
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).float().movedim(-1, 1)
    mean, std = (torch.tensor(settings[key])[:, None, None] for key in ("image_mean", "image_std"))
    pixels = (pixels * settings["rescale_factor"] - mean) / std
    time, rows, columns = len(frames) // depth, height // size, width // size
    patches = pixels.reshape(time, depth, 3, rows // merge, merge, size, columns // merge, merge, size)
    patches = patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * rows * columns, -1)
    return Media(patches, (time, rows, columns), [])


def video_patch_times(count: int, fps: float, settings: dict) -> list[float]:
    """Seconds: the mean of the first and last frame of each temporal patch."""
    depth = settings["temporal_patch_size"]
    last = count - 1
    return [(start + min(start + depth - 1, last)) / 2 / fps for start in range(0, count, depth)]


def load_image_processor(folder: Path, config, is_gemma: bool) -> Any:
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
                read_json(regular_file(folder, name), CONFIG_LIMIT)
        processor: Any = Processor.from_pretrained(folder, local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: the image processor cannot be loaded: {one_line(error)}") from error
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
        raise CheckpointError(f"{folder / PROCESSOR_FILES[0]}: {one_line(error)}") from error
    return processor


def load_video_settings(folder: Path, config) -> dict:
    """How frames are processed: what the folder says, else what transformers' class for Qwen3-VL says."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor as Defaults

    keys = ("size", "image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
    settings: dict[str, Any] = {key: getattr(Defaults, key) for key in keys} | {"rescale_factor": 1 / 255}
    path = folder / "video_preprocessor_config.json"
    if path.is_file():
        given = read_json(regular_file(folder, path.name), CONFIG_LIMIT)
    else:
        path = folder / "processor_config.json"
        given = (
            read_json(regular_file(folder, path.name), CONFIG_LIMIT).get("video_processor") if path.is_file() else None
        )
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
        raise CheckpointError(f"{path}: {one_line(error)}") from error
    return settings


def _check_channels(name: str, value) -> None:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{name} is {truncated_repr(value)}, expected three numbers")
    for number in value:
        check_number(name, number, (1e-6, 1e3) if name == "image_std" else (-1e3, 1e3))
