"""Our vision-language model and transformers' of one tiny checkpoint, with prompts, images and frames to try."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from PIL import Image
from reference_pop import ReferenceVisionPOP
from vision_models import TINY_VISION, picture, transformers_processor

import pop_ext
from pop_ext.runtime.prompts import encode_prompt

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


def frames_of(count: int, size=(37, 29)) -> list[Image.Image]:
    return [picture(*size, seed=i) for i in range(count)]
