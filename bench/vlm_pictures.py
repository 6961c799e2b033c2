"""The pictures of bench/vlm_synthetic.py, the questions about them, and both as a model's inputs."""

import math
import random

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 230), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle", "star")
GRID = 4  # cells in a row and in a column
CELLS = tuple(row + column for row in "abcd" for column in "1234")
WORDS = (*COLOURS, *SHAPES, *CELLS, "below", "?", "<end>", "<unknown>")
SPECIAL = {
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "gemma3": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
}
SIDE = 64  # pixels of a picture
IMAGE_TOKENS = 64  # each of 8 x 8 pixels, four to a cell
ITEMS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class Picture:
    """Sixteen different figures, in places, sizes and shades of their own, and what can be asked about them."""

    def __init__(self, rng: random.Random):
        self.items = rng.sample(ITEMS, GRID**2)
        ground = rng.randrange(150, 256)
        self.image = Image.new("RGB", (SIDE, SIDE), tuple(ground + rng.randrange(-10, 1) for _ in range(3)))
        draw = ImageDraw.Draw(self.image)
        for index, (colour, shape) in enumerate(self.items):
            radius = rng.uniform(5, 6.5)
            cell = SIDE / GRID
            x = cell * (index % GRID + 0.5) + rng.uniform(-1, 1)
            y = cell * (index // GRID + 0.5) + rng.uniform(-1, 1)
            shade = tuple(max(0, min(255, value + rng.randrange(-25, 26))) for value in COLOURS[colour])
            draw_figure(draw, shape, x, y, radius, shade)

    def question(self, rng: random.Random) -> tuple[str, str]:
        """A question of a random kind, and its answer."""
        if rng.randrange(2):
            index = rng.randrange(GRID**2)
            return f"{CELLS[index]} ?", " ".join(self.items[index])
        index = rng.randrange(GRID**2 - GRID)
        return f"below {CELLS[index]} ?", " ".join(self.items[index + GRID])


def draw_figure(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        draw.rectangle((x - radius * 0.85, y - radius * 0.85, x + radius * 0.85, y + radius * 0.85), fill=fill)
    else:
        points, inner = (3, 1.0) if shape == "triangle" else (4, 0.35)
        corners = []
        for i in range(points * 2 if inner < 1 else points):
            step = math.pi / points * (i if inner < 1 else 2 * i)
            length = radius * (inner if inner < 1 and i % 2 else 1.1)
            corners.append((x + length * math.sin(step), y - length * math.cos(step)))
        draw.polygon(corners, fill=fill)


def make_tokenizer(family: str):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>", *SPECIAL[family]])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unknown>")


def batch_of(family: str, asked: list[tuple[Picture, list[tuple[str, str]]]], tokenizer, processor) -> dict:
    """transformers' inputs: pictures, each followed by its questions and answers. Beside them, what training needs:

    labels [B, T]: the answers' tokens where they stand, -100 elsewhere; cells [B, T]: the index of the cell asked for
    at the tokens that its colour and shape come after, -100 elsewhere; figures [B * IMAGE_TOKENS, 3]: colour, shape and
    cell under each image token, as indices.
    """
    import torch

    special = tokenizer.convert_tokens_to_ids(list(SPECIAL[family]))
    image = [special[0], *[special[2]] * IMAGE_TOKENS, special[1]]
    rows, labels, cells, figures = [], [], [], []
    places = [index * GRID // 8 for index in range(8)]  # of the eight tokens in a row or column
    for picture, questions in asked:
        ids, wanted, known = list(image), [-100] * len(image), [-100] * len(image)
        for question, answer in questions:
            cell = picture.items.index(tuple(answer.split()))
            question, answer = tokenizer(question).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
            ids += question + answer
            wanted += [-100] * len(question) + answer
            known += [-100] * (len(question) - 1) + [cell, cell, -100, -100]
        rows.append(ids)
        labels.append(wanted)
        cells.append(known)
        for cell in (GRID * row + column for row in places for column in places):
            colour, shape = picture.items[cell]
            figures.append((list(COLOURS).index(colour), SHAPES.index(shape), cell))
    width = max(map(len, rows))
    input_ids = torch.tensor([ids + [tokenizer.eos_token_id] * (width - len(ids)) for ids in rows])
    inputs = dict(processor([picture.image for picture, _ in asked], return_tensors="pt"))
    inputs.pop("num_crops", None)
    return inputs | {
        "input_ids": input_ids,
        "token_type_ids" if family == "gemma3" else "mm_token_type_ids": (input_ids == special[2]).int(),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
        "cells": torch.tensor([row + [-100] * (width - len(row)) for row in cells]),
        "figures": torch.tensor(figures),
    }
