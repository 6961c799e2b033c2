"""Text for measuring and calibrating: files cut into windows of tokens, and text that needs no file.

A window is a list of token ids that starts with the tokenizer's beginning-of-sequence token, where the tokenizer adds
one: a model that was trained to see it first behaves differently without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from ..checkpoints.files import atomic_write, read_utf8
from ..runtime.kv_cache import BLOCK_SIZE

logger = logging.getLogger(__name__)

PIECE = 512  # tokens of Python's help that stay together in the default text


def read_text(path: str | Path) -> str:
    """A file's text; ValueError if it is not UTF-8."""
    return read_utf8(Path(path))


def encode(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of any text (one beginning-of-sequence token, or nothing), and the text's token
    ids without it.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer: text cannot be turned into tokens")
    first = tokenizer("").input_ids[:1]
    bos = first if first and first[0] == tokenizer.bos_token_id else []
    return bos, tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def windows(tokenizer, text: str, length: int, count: int | None = None, name: str = "the text") -> list[list[int]]:
    """Windows of `length` tokens that do not overlap: all that fit one after the other, or `count` evenly spread ones.

    ValueError if the text is too short for them.
    """
    return cut(*encode(tokenizer, text), length, count, name)


def cut(bos: list[int], tokens: list[int], length: int, count: int | None, name: str = "the text") -> list[list[int]]:
    """`windows` of `tokens`, each with `bos` in front."""
    step = length - len(bos)
    if step < 1:
        raise ValueError(f"windows of {length} tokens leave no room for text, expected at least {len(bos) + 1}")
    room = len(tokens) // step
    if room < (count or 1):
        raise ValueError(
            f"{name} has {len(tokens)} tokens, expected at least {step * (count or 1)} "
            f"for {count or 1} window{'s' * ((count or 1) > 1)} of {length}"
        )
    if count is not None:
        step = len(tokens) // count
    return [bos + tokens[i * step : i * step + length - len(bos)] for i in range(count or room)]


def pydoc_text() -> str:
    """The topics of Python's help(): 400 kB of technical English and code that every Python ships with."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def default_text(model, tokens: int, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None):
    """Text to calibrate on where none is given: the model's own samples, every other one with its punctuation set
    apart, and a tenth Python's help, in pieces spread over all of it.
    """
    _, pydoc = encode(model.tokenizer, pydoc_text())
    count, piece = max(1, tokens // 10 // PIECE), min(PIECE, len(pydoc))
    starts = [i * (len(pydoc) - piece) // count for i in range(count)]
    pieces = [model.tokenizer.decode(pydoc[start : start + piece]) for start in starts]
    samples = sampled_texts(model, tokens - count * piece, seed, progress)
    samples[1::2] = map(set_apart, samples[1::2])
    return "\n\n".join([*pieces, *samples])


def set_apart(text: str) -> str:
    """`text` with spaces around its punctuation, as in tokenised corpora (Penn Treebank, WikiText): spacing is as much
    of a text's kind as its words are, and models write little text of this one.
    """
    text = re.sub(r"(\w)'(\w)", r"\1 '\2", re.sub(r'([,.;:!?()"“”])', r" \1 ", text))
    return re.sub("  +", " ", text)


def sampled_texts(
    model, tokens: int, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[str]:
    """Texts of about `tokens` tokens in all that the model writes itself at temperature 1, from the beginning of a
    sequence or, where the tokenizer has no token for that, a line break; cached on disk, as it takes a while.
    """
    bos, line_break = encode(model.tokenizer, "\n")
    start = bos or line_break or [0]
    key = f"{model.fingerprint()} {model.dtype} {start} {tokens} {seed}"
    path = cache_folder() / f"samples-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if path.exists():
        return json.loads(read_text(path))
    length = min(512, model.spec.max_position_embeddings)
    rows = max(1, min(64, model.max_cache_tokens // (-(-length // BLOCK_SIZE) * BLOCK_SIZE)))
    texts, done = [], 0
    while done < tokens:
        if texts:  # no more than are missing
            rows = min(rows, -(-(tokens - done) * len(texts) // done))
        output = model.generate(
            [start] * rows, prefill_depth=1.0, max_new_tokens=length - len(start), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, repetition_penalty=1.0, seed=seed + len(texts),
        )  # fmt: skip
        texts += output.text
        done += sum(map(len, output.tokens))
        progress(min(done, tokens), tokens)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda temporary: Path(temporary).write_text(json.dumps(texts), encoding="utf-8"))
    except OSError as error:
        logger.warning("the sampled text is not cached: %s", error)
    return texts


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pop_ext"
