"""Vision: pictures become features in the decoder's hidden space, and placeholder tokens in the prompt.

The vision towers are transformers' modules, their weights read from the same safetensors as the decoder's, and images
are resized and normalised by transformers' image processors for PIL. What stands in the prompt for an image is laid out
here as the models were trained on it. Videos are frames that are resized like images and cut into patches of several
frames here, as transformers' own processor for them needs torchvision.
"""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.families import ModelSpec
from ..checkpoints.files import CheckpointError, one_line
from ..checkpoints.weights import load_vision_weights
from ..transfer import to_device
from .images import MAX_FRAMES, open_frames, open_image
from .processing import (
    PROCESSOR_FILES,
    Media,
    load_image_processor,
    load_video_settings,
    video_patch_times,
    video_patches,
)
from .spans import ImageSpan


class Vision:
    """The vision tower of a model, and its processing. ValueError and CheckpointError name what is wrong."""

    def __init__(self, folder: Path, config, spec: ModelSpec, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.folder, self.config, self.dtype, self.device = Path(folder), config, dtype, torch.device(device)
        self.image_token_id = config.image_token_id
        self.video_token_id = getattr(config, "video_token_id", None)
        self.is_gemma = spec.vision_type == "gemma3"
        modules = _load_modules(self.folder, config, spec, dtype)
        self.modules = {name: module.to(self.device) for name, module in modules.items()}
        self.image_processor = load_image_processor(self.folder, config, self.is_gemma)
        self.video_settings = {} if self.is_gemma else load_video_settings(self.folder, config)

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

    def expand(self, text: str, media: dict[str, list[tuple[Media, list[float]]]], name: str, tokenizer) -> str:
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
        assert media.grid_thw is not None
        _, rows, columns = media.grid_thw
        return rows * columns // self.config.vision_config.spatial_merge_size**2

    def locate(self, token_ids: list[int], images: list[Media], videos: list[Media], name: str) -> None:
        """Sets the spans of all images and videos from where the placeholder tokens stand in the prompt.

        ValueError unless each has its number of consecutive placeholder tokens, in order, and none is left over.
        """
        for kind, token_id, media in (("image", self.image_token_id, images), ("video", self.video_token_id, videos)):
            at = [index for index, token in enumerate(token_ids) if token == token_id] if token_id is not None else []
            parts = [
                item for item in media for _ in range(item.grid_thw[0] if item.grid_thw else len(item.pixel_values))
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
            raise ValueError(f"{name}: cannot be processed: {one_line(error)}") from error
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
        frames = open_frames(frames, name)
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise ValueError(f"{name} has frames of different sizes: {', '.join(map(str, sorted(sizes)[:3]))}")
        patches = video_patches(frames, self.video_settings, name)
        return patches, video_patch_times(len(frames), fps, self.video_settings)

    def _positions(self, media: Media) -> dict[str, Tensor]:
        """Where the patches stand, which Qwen3-VL's tower would work out on the device, waiting for it."""
        if self.is_gemma:
            return {}
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

        tower: Any = self.modules["visual"]
        grid_thw = torch.tensor([media.grid_thw])
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.spatial_merge_size,
        )
        positions = get_vision_position_ids(grid_thw, tower.spatial_merge_size)
        return {"interp_indices": indices, "interp_weights": weights, "position_ids": positions}

    @torch.no_grad()
    def encode(self, media: Media) -> list[ImageSpan]:
        """Runs the vision tower: an ImageSpan for each of its spans, features [1 + d, tokens, D] in `dtype`."""
        inputs = to_device({"pixel_values": media.pixel_values.to(self.dtype)} | self._positions(media), self.device)
        pixels = inputs.pop("pixel_values")
        if media.grid_thw is None:
            hidden = self.modules["vision_tower"](pixel_values=pixels).last_hidden_state
            parts, grid = self.modules["multi_modal_projector"](hidden).unsqueeze(1), None
        else:
            merge = self.config.vision_config.spatial_merge_size
            time, rows, columns = media.grid_thw
            # Lengths of frames stay on the host, which cuts the attention by them.
            frames = torch.arange(time + 1, dtype=torch.int32) * (rows * columns)
            grid_thw = torch.tensor([media.grid_thw])
            output = self.modules["visual"](pixels, grid_thw=grid_thw, cu_seqlens=frames, **inputs)
            features = torch.stack([output.pooler_output, *output.deepstack_features])
            parts, grid = features.unflatten(1, (time, -1)).transpose(0, 1), (rows // merge, columns // merge)
        return [ImageSpan(*span, grid, part) for span, part in zip(media.spans, parts, strict=True)]


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


def vision_bytes(folder: Path, config, spec: ModelSpec, itemsize: int) -> int:
    """Of the weights of the vision tower, with Gemma-3's projector."""
    modules = _build(folder, config, spec, "meta").values()
    return sum(value.numel() * itemsize for module in modules for value in module.state_dict().values())


def _build(folder: Path, config, spec: ModelSpec, device: str) -> dict[str, torch.nn.Module]:
    """The vision tower, and Gemma-3's projector, on the CPU or without memory ("meta")."""
    from transformers.initialization import no_init_weights

    if spec.vision_type == "gemma3":
        from transformers import SiglipVisionModel
        from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector

        kinds = {"vision_tower": (SiglipVisionModel, config.vision_config),
                 "multi_modal_projector": (Gemma3MultiModalProjector, config)}  # fmt: skip
    else:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        kinds = {"visual": (Qwen3VLVisionModel, config.vision_config)}

    try:
        with torch.device(device), no_init_weights():
            return {name: kind(part) for name, (kind, part) in kinds.items()}
    except Exception as error:  # whatever transformers makes of a config
        raise CheckpointError(f"{folder / 'config.json'}: vision_config: {one_line(error)}") from error


def _load_modules(folder: Path, config, spec: ModelSpec, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Built twice: without memory to check the tensors, then around them."""
    weights = load_vision_weights(folder, spec, _build(folder, config, spec, "meta"), dtype)
    modules = _build(folder, config, spec, "cpu")
    for name, module in modules.items():
        module.load_state_dict(weights[name], assign=True)
        module.eval().requires_grad_(False)
    return modules
