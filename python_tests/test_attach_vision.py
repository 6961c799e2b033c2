"""POP inside the generate of transformers' image-text models, against the runner."""

from __future__ import annotations

import pytest
import torch
import transformers
from attach_cases import answer, check, load_peer, load_runner
from vision_models import TINY_VISION, picture, transformers_processor

import pop_ext

SIZES = [(40, 30), (25, 61), (90, 14)]


class Case:
    """transformers' model and processor of one checkpoint, and what the runner calls an image in a prompt."""

    def __init__(self, name: str, folder):
        self.folder, self.gemma = (
            TINY_VISION[name].make(folder, seed=list(TINY_VISION).index(name)),
            TINY_VISION[name].gemma,
        )
        self.processor = transformers_processor(self.folder)
        runner = load_runner(self.folder, 1.0)
        self.mark = runner.vision.written("image", runner.tokenizer)

    def prompts(self) -> list[tuple[str, list]]:
        mark, pictures = self.mark, [picture(*size, seed=3) for size in SIZES]
        return [
            (f"the {mark} and\n\n", pictures[:1]),
            (f"{mark}{mark}the{mark}\n?", pictures),  # an image at the very start
            (f"an\n{mark}", pictures[1:2]),  # and at the very end
            ("the an and then", []),
        ]

    def process(self, text: str, images: list) -> dict[str, torch.Tensor]:
        if not images:
            return dict(self.processor.tokenizer(text, return_tensors="pt"))
        return dict(self.processor(images=[images] if self.gemma else images, text=text, return_tensors="pt"))

    def batch(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        """Prompts with images in one batch, padded on the left."""
        width = max(one["input_ids"].shape[1] for one in inputs)
        pad = lambda row: torch.nn.functional.pad(row, (width - row.shape[1], 0))  # noqa: E731
        text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        return {key: torch.cat([pad(one[key]) if key in text else one[key] for one in inputs]) for key in inputs[0]}


@pytest.fixture(scope="module", params=list(TINY_VISION))
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("vision") / request.param)


def peer_of(case: Case):
    return load_peer(case.folder, kind=transformers.AutoModelForImageTextToText)


# 5 anchors end in the image that a prompt begins with, and 3 boundary tokens begin in the one it ends with
@pytest.mark.parametrize("boundary, anchors", [(1, 1), (3, 5), (2, 0)])
def test_images_are_the_runner(case, boundary, anchors):
    peer, settings = peer_of(case), {"boundary_tokens": boundary, "anchor_tokens": anchors}
    for depth in (2, 4) if boundary == 1 else (3,):
        runner = load_runner(case.folder, depth, **settings)
        pop_ext.attach(peer, prefill_depth=depth, **settings)
        for text, images in case.prompts():
            inputs, expected = case.process(text, images), answer(runner, text, images=images)
            ways = [{}, {"cache_implementation": "static"}]
            if not case.gemma:  # transformers cuts Gemma's images in two, whose tokens see one another
                ways.append({"prefill_chunk_size": 11})
            for way in ways if depth == 4 else ways[:1]:
                check(peer, inputs, expected, f"{text!r} at {depth}, {way}", **way)


def test_batches_and_a_second_turn(case):
    """Prompts of unequal length with images; then text after them, from the returned cache."""
    peer, runner = peer_of(case), load_runner(case.folder, 3)
    pop_ext.attach(peer, prefill_depth=3)
    with_images = case.prompts()[:3]
    texts, images = [text for text, _ in with_images], [images for _, images in with_images]
    inputs = case.batch([case.process(*one) for one in with_images])
    expected = answer(runner, texts, images=images, keep=True)
    output = check(peer, inputs, expected, num_return_sequences=1)
    more = [[7, 30, 81, 5], [64, 9, 3, 250], [11, 12, 13, 14]]
    ids = torch.cat([output.sequences, torch.tensor(more)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, ids.shape[1] - inputs["input_ids"].shape[1]).long()], 1)
    second = {"input_ids": ids, "attention_mask": mask, "past_key_values": output.past_key_values}
    check(peer, second, answer(runner, more, expected.sequences))


def test_full_depth_is_the_untouched_model(case):
    text, images = case.prompts()[1]
    inputs, untouched, peer = case.process(text, images), peer_of(case), pop_ext.attach(peer_of(case), 1.0)
    expected = untouched.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert peer.generate(**inputs, max_new_tokens=6, do_sample=False).equal(expected)


def test_depth_below_deepstack(case):
    """Layers that visual features are added behind must see the tokens of images; text alone may go without."""
    peer, (text, images) = peer_of(case), case.prompts()[0]
    stages = 0 if case.gemma else len(peer.config.vision_config.deepstack_visual_indexes)
    if stages < 2:
        pop_ext.attach(peer, prefill_depth=2)
        assert peer.generate(**case.process(text, images), max_new_tokens=2).shape[0] == 1
        return
    pop_ext.attach(peer, prefill_depth=stages - 1)
    with pytest.raises(ValueError, match=f"prefill_depth is {stages - 1} layers, expected at least {stages} for"):
        peer.generate(**case.process(text, images), max_new_tokens=2)
    expected = answer(load_runner(case.folder, stages - 1), "the an and")
    check(peer, case.process("the an and", []), expected)
