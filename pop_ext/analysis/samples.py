"""Chats and image-text samples for measuring and calibrating."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.bounds import truncated_repr
from ..checkpoints.files import one_line, read_utf8
from ..runtime.prompts import encode_prompt, render_chat
from ..vision.processing import Media
from ..vision.spans import ImageSpan

EXPECTED = "expected an object with messages, or with prompt and continuation, and images (list) where it has any"


@dataclass
class Pairs:
    """Token ids of prompts and of what follows them; media[i] are the images of prompts[i], ready for the vision tower,
    and visuals[i] what it made of them.
    """

    prompts: list[list[int]]
    continuations: list[list[int]]
    media: list[list[Media]] | None = None
    visuals: list[list[ImageSpan]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def windows(self) -> list[list[int]]:
        """Prompts with their continuations."""
        return [prompt + rest for prompt, rest in zip(self.prompts, self.continuations, strict=True)]

    @property
    def prompt_tokens(self) -> int:
        """Of a prompt, the median."""
        return sorted(map(len, self.prompts))[len(self) // 2]

    def take(self, indices: Sequence[int]) -> Pairs:
        """Some of them."""

        def some(values: Any) -> Any:
            return None if values is None else [values[i] for i in indices]

        return Pairs(*map(some, (self.prompts, self.continuations, self.media, self.visuals)))

    def shortened(self, continuation_tokens: int) -> Pairs:
        """With continuations of that many tokens at most."""
        return Pairs(
            self.prompts, [rest[:continuation_tokens] for rest in self.continuations], self.media, self.visuals
        )

    def encode_images(self, model, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Runs the images through the model's vision tower."""
        if self.media is None or not any(self.media):
            return
        self.visuals = []
        for pictures in self.media:
            self.visuals.append([visual for picture in pictures for visual in model.vision.encode(picture)])
            progress(len(self.visuals), len(self.media))


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What the lines of a JSON lines file hold, each with its file and line for messages. ValueError names the line
    that is not JSON.
    """
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):  # not what else Unicode calls a line's end
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}: not JSON: {one_line(error)}") from error
        yield name, found


def read_samples(*paths: str | Path) -> list[tuple[str, dict]]:
    """The samples of JSON lines files, each with its file and line for messages; paths of images are made relative to
    their file. ValueError names the line that is wrong.
    """
    samples = []
    for path in map(Path, paths):
        for name, sample in read_json_lines(path):
            check_sample(name, sample)
            if "images" in sample:
                images = [path.parent / image if isinstance(image, str) else image for image in sample["images"]]
                sample = sample | {"images": images}
            samples.append((name, sample))
    if not samples:
        raise ValueError(f"{', '.join(map(str, paths))}: no samples")
    return samples


def check_sample(name: str, sample) -> None:
    keys = {"messages": list} if isinstance(sample, dict) and "messages" in sample else {
        "prompt": (str, list), "continuation": str
    }  # fmt: skip
    if not isinstance(sample, dict) or any(not isinstance(sample.get(key), kind) for key, kind in keys.items()):
        raise ValueError(f"{name}: {truncated_repr(sample)}, {EXPECTED}")
    if not isinstance(sample.get("images", []), list):
        raise ValueError(f"{name}: images is {truncated_repr(sample['images'])}, expected a list")
    if "messages" in sample:
        last = sample["messages"][-1] if sample["messages"] else None
        if not isinstance(last, dict) or last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise ValueError(
                f"{name}: the last message is {truncated_repr(last)}, expected the assistant's answer, a text"
            )
        if len(sample["messages"]) < 2:
            raise ValueError(f"{name}: messages has one message, expected a question before the answer")


def encode_samples(samples: list[tuple[str, dict]], model) -> Pairs:
    """The samples' tokens; a chat's continuation is its last answer. `model` has a tokenizer, a `vision` or None, and a
    spec. ValueError names the sample that is wrong.
    """
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer: text cannot be turned into tokens")
    prompts, continuations, media = [], [], []
    limit = getattr(model.spec, "max_position_embeddings", None)
    for name, sample in samples:
        chat = sample.get("messages")
        asked = sample["prompt"] if chat is None else chat[:-1]
        prompt, pictures = encode_prompt(model, asked, name, [], sample.get("images", []))
        answer = sample["continuation"] if chat is None else answer_text(model.tokenizer, chat, name)
        continuation = model.tokenizer(answer, add_special_tokens=False, verbose=False).input_ids
        if not continuation:
            raise ValueError(f"{name}: the continuation is empty")
        if limit is not None and len(prompt) + len(continuation) > limit:
            raise ValueError(f"{name}: {len(prompt) + len(continuation)} tokens, expected at most the model's {limit}")
        prompts.append(prompt)
        continuations.append(continuation)
        media.append(pictures)
    return Pairs(prompts, continuations, media)


def answer_text(tokenizer, messages: list[dict], name: str) -> str:
    """What the model would write for the last message: its text, and what the template ends an answer with."""
    before = render_chat(tokenizer, messages[:-1], name)
    whole = render_chat(tokenizer, messages, name, answered=True)
    # a template may show an answer otherwise than it was asked for (without its thoughts)
    return whole.removeprefix(before).rstrip("\n") if whole.startswith(before) else messages[-1]["content"]


def load_samples(path: str | Path, model) -> Pairs:
    """The samples of a JSON lines file, in tokens: chats {"messages": [...]}, or {"prompt": text or chat messages,
    "continuation": text}, with "images": [paths, relative to the file] where a prompt has images.
    """
    return encode_samples(read_samples(path), model)
