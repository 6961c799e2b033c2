"""What is measured and calibrated on: running text, or chats and samples, cut into prompts and continuations.

What turns them into tokens is an encoder: a model, or `Encoder`, which needs no weights, so that data that will not do
is refused before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..checkpoints.config import load_config
from ..checkpoints.families import ModelSpec
from ..checkpoints.files import resolve_folder
from ..checkpoints.tokenizer import load_tokenizer
from . import calibration as calibrations
from . import text as texting
from .samples import Pairs, check_sample, encode_samples, read_samples

HELD_OUT = 4  # `split` holds out one part in so many
LEAST_PROMPTS = 8  # held out: fewer say nothing of their spread


class Encoder:
    """A checkpoint's tokenizer and spec; of a model that POP does not run (`any_model`), what of a spec data needs."""

    def __init__(self, path: str | Path, any_model: bool = False):
        folder = resolve_folder(path)
        self.spec: Any = _any_spec(folder) if any_model else ModelSpec.from_config(load_config(folder))
        self.tokenizer, self.vision = load_tokenizer(folder), None
        if self.tokenizer is None:
            raise ValueError(f"{path} has no tokenizer: text cannot be turned into tokens")


@dataclass
class Data:
    """Running text, or samples, each with a name for messages (`read_samples`)."""

    text: str | None = None
    samples: list[tuple[str, dict]] | None = None
    name: str = "the text"

    @classmethod
    def of(cls, texts: Sequence[str] | None, chats: Sequence | None) -> Data:
        """Of a list of texts, or of chats: lists of messages, or objects as in `read_samples`' files. TypeError for a
        string in place of a list of strings, ValueError for both or neither.
        """
        if (texts is None) == (chats is None):
            raise ValueError("texts and chats: expected one of them")
        if texts is not None:
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"texts is {texts!r:.60}, expected a list of strings")
            return cls("\n\n".join(texts))
        samples = []
        for i, chat in enumerate(chats or []):
            sample = {"messages": list(chat)} if isinstance(chat, list | tuple) else chat
            check_sample(f"chats[{i}]", sample)
            samples.append((f"chats[{i}]", sample))
        if not samples:
            raise ValueError("chats is empty, expected at least one")
        return cls(samples=samples, name="the chats")

    @classmethod
    def read(cls, text: Sequence[Path] | None, chats: Sequence[Path] | None) -> Data:
        """Of files: text, or JSON lines of chats and samples."""
        files = list(text or chats or [])
        name = ", ".join(map(str, files))
        if chats:
            return cls(samples=read_samples(*files), name=name)
        return cls("\n\n".join(texting.read_text(file) for file in files), name=name)

    @property
    def has_images(self) -> bool:
        return any(sample.get("images") for _, sample in self.samples or [])

    def windows(self, encoder, tokens: int) -> Pairs:
        """What to calibrate on, of `tokens` tokens at most: windows of text, or whole chats. A window of text is a
        pair's prompt.
        """
        if self.samples is not None:
            pairs = encode_samples(self.samples, encoder)
            return pairs.take(_first(pairs.windows, range(len(pairs)), tokens))
        length = min(calibrations.WINDOW, encoder.spec.max_position_embeddings)
        return _only_prompts(
            texting.windows(encoder.tokenizer, self.text or "", length, name=self.name)[: max(2, tokens // length)]
        )

    def pairs(self, encoder, prompts: int, prompt_tokens: int, continuation_tokens: int) -> Pairs:
        """`prompts` prompts, evenly spread, with continuations: of text `prompt_tokens` long, of chats as they are, and
        all that there are if these are fewer; their continuations have `continuation_tokens` at most.
        """
        if self.samples is not None:
            chosen = [self.samples[i] for i in spread(prompts, len(self.samples))]
            return encode_samples(chosen, encoder).shortened(continuation_tokens)
        length = _length(encoder, prompt_tokens, continuation_tokens)
        found = texting.windows(encoder.tokenizer, self.text or "", length, prompts, self.name)
        return Pairs([w[:prompt_tokens] for w in found], [w[prompt_tokens:] for w in found])

    def split(
        self, encoder, tokens: int, prompts: int, prompt_tokens: int, continuation_tokens: int
    ) -> tuple[Pairs, Pairs]:
        """`windows` to calibrate on and, held out from them, `pairs`: of text the last quarter, which has nothing of
        the rest nearby; of chats every fourth. ValueError for too little of either.
        """
        least = min(LEAST_PROMPTS, prompts)
        if self.samples is not None:
            return self._split_samples(
                encode_samples(self.samples, encoder), tokens, prompts, least, continuation_tokens
            )
        bos, ids = texting.encode(encoder.tokenizer, self.text or "")
        length = _length(encoder, prompt_tokens, continuation_tokens)
        rest, held_out = ids[: len(ids) - len(ids) // HELD_OUT], ids[len(ids) - len(ids) // HELD_OUT :]
        step, window = length - len(bos), min(calibrations.WINDOW, encoder.spec.max_position_embeddings)
        count = min(prompts, len(held_out) // max(1, step))
        if count < least or len(rest) < 2 * window:
            raise ValueError(
                f"{self.name} has {len(ids)} tokens, expected at least {max(HELD_OUT * least * step, 3 * window)}: "
                f"a quarter is held out, for {least} prompts of {prompt_tokens} tokens and continuations of "
                f"{continuation_tokens}. Give more text, or lower prompt_tokens"
            )
        fit = texting.cut(bos, rest, window, None)[: max(2, tokens // window)]
        held = texting.cut(bos, held_out, length, count)
        return _only_prompts(fit), Pairs([w[:prompt_tokens] for w in held], [w[prompt_tokens:] for w in held])

    def _split_samples(self, pairs: Pairs, tokens: int, prompts: int, least: int, continuation_tokens: int):
        if len(pairs) < HELD_OUT * least:
            raise ValueError(
                f"{self.name} has {len(pairs)} chats, expected at least {HELD_OUT * least}: one in {HELD_OUT} is held "
                f"out, and fewer than {least} of these say nothing. Give more chats"
            )
        held_out = range(HELD_OUT - 1, len(pairs), HELD_OUT)
        rest = [i for i in range(len(pairs)) if i not in held_out]
        held = pairs.take([held_out[i] for i in spread(prompts, len(held_out))]).shortened(continuation_tokens)
        return pairs.take(_first(pairs.windows, rest, tokens)), held


def _any_spec(folder: Path) -> SimpleNamespace:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    return SimpleNamespace(
        num_layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        max_position_embeddings=getattr(text, "max_position_embeddings", 2**31),
        model_type=config.model_type,
    )


def spread(count: int, among: int) -> list[int]:
    """`count` indices, at most `among`, evenly spread over range(among)."""
    count = min(count, among)
    return [i * among // count for i in range(count)]


def _length(encoder, prompt_tokens: int, continuation_tokens: int) -> int:
    length, context = prompt_tokens + continuation_tokens, encoder.spec.max_position_embeddings
    if length > context:
        raise ValueError(
            f"prompt_tokens is {prompt_tokens}, expected at most {context - continuation_tokens}: with the "
            f"continuation the model's context, {context} tokens"
        )
    return length


def _only_prompts(windows: list[list[int]]) -> Pairs:
    return Pairs(windows, [[]] * len(windows))


def _first(windows: list[list[int]], among: Sequence[int], tokens: int) -> list[int]:
    """The first of `among` whose windows have `tokens` tokens in all, two at least."""
    chosen, total = [], 0
    for i in among:
        if total >= tokens and len(chosen) >= 2:
            break
        chosen.append(i)
        total += len(windows[i])
    return chosen
