"""Image-text samples for measuring."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoints.bounds import truncated_repr
from ..checkpoints.files import one_line
from ..runtime.prompts import encode_prompt
from ..vision.processing import Media


def load_samples(path: str | Path, model) -> tuple[list[list[int]], list[list[int]], list[list[Media]]]:
    """Image-text samples for measuring: token ids of the prompts and of their continuations, and the prompts' images.

    The file has a JSON object a line: {"images": [paths, relative to the file], "prompt": text or chat messages,
    "continuation": text}. ValueError names the line that is wrong.
    """
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
            raise ValueError(f"{name}: not JSON: {one_line(error)}") from error
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
