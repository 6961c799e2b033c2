"""Prompts and continuations of the uses that `verify` checks, from Python's own texts and from what is written here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

import numpy as np

from ..runtime.kv_cache import BLOCK_SIZE, block_count
from ..runtime.prompts import encode_prompt
from . import text as texting
from .tasks import synthetic_task

USES = ("chat", "prose", "code", "maths", "retrieval", "copying")
CONTINUATION = 32  # tokens
CHARACTERS = 8  # of text that are tokenized for each token that is used: more than any tokenizer needs
MODULES = (  # of the standard library, written by many hands
    "bisect", "calendar", "cmd", "configparser", "csv", "difflib", "fractions", "heapq", "random", "sched", "shelve",
    "statistics", "textwrap", "zipfile",
)  # fmt: skip
REQUESTS = (
    "Summarise this text in two sentences:\n\n{text}",
    "{text}\n\nExplain the text above to somebody who has never written a program.",
    "I am reading this:\n\n{text}\n\nWhat is it about, and when would I need it?",
    "Write three questions that this text answers.\n\n{text}",
    "{text}\n\nGive me an example of what the text above describes.",
    "Here is a passage of a manual. Rewrite it as a list of short points.\n\n{text}",
)
Pairs = tuple[list[list[int]], list[list[int]]]


def use_pairs(use: str, model, prompts: int, prompt_tokens: int, seed: int) -> Pairs:
    """Token ids of `prompts` prompts of a use, and of the continuations that are scored after them."""
    if use in ("retrieval", "copying"):
        filler, _ = _windows(model, prose, prompts, prompt_tokens, use)
        return synthetic_task(use, filler, model.tokenizer, seed)
    if use == "chat":
        return chats(model, prompts, prompt_tokens)
    if use == "maths":
        return maths(model, prompts, prompt_tokens, seed)
    return _windows(model, prose if use == "prose" else code, prompts, prompt_tokens, use)


def prose(characters: int) -> str:
    """Running text of Python's help, neither code nor headings: paragraphs from all of it, about `characters` or what
    there is.
    """
    paragraphs = [p for p in texting.pydoc_text().split("\n\n") if not p.startswith(" ") and len(p) > 200]
    step = max(1, sum(map(len, paragraphs)) // characters)
    return "\n\n".join(" ".join(p.split()) for p in paragraphs[::step])


def code(characters: int) -> str:
    """Sources of the standard library: the beginnings of modules, `characters` in all or what there is."""
    share = characters // len(MODULES)
    return "\n\n\n".join(inspect.getsource(importlib.import_module(name))[:share] for name in MODULES)


def chats(model, prompts: int, prompt_tokens: int) -> Pairs:
    """Requests about a passage, in the model's chat template where it has one, and the full model's own answers, as
    those are what users read.
    """
    bos, ids = texting.encode(model.tokenizer, prose(CHARACTERS * prompts * prompt_tokens))
    room = max(8, prompt_tokens - 64)  # the rest is the request and the template
    passages = [p[len(bos) :] for p in texting.cut(bos, ids, room + len(bos), prompts, "Python's help")]
    texts = [REQUESTS[i % len(REQUESTS)].format(text=model.tokenizer.decode(p)) for i, p in enumerate(passages)]
    if model.tokenizer.chat_template:
        asked: list = [[{"role": "user", "content": text}] for text in texts]
    else:
        asked = [f"Question: {text}\n\nAnswer:" for text in texts]
    encoded = [encode_prompt(model, one, f"chat {i}", [])[0] for i, one in enumerate(asked)]
    longest = max(map(len, encoded)) + CONTINUATION
    rows, answers = max(1, min(8, model.max_cache_tokens // (block_count(longest) * BLOCK_SIZE))), []
    for start in range(0, len(encoded), rows):
        answers += model.generate(
            encoded[start : start + rows], prefill_depth=1.0, max_new_tokens=CONTINUATION, do_sample=False
        ).tokens
    return encoded, answers


def maths(model, prompts: int, prompt_tokens: int, seed: int) -> Pairs:
    """School problems: as many worked examples as there is room for, a question, and its worked answer."""
    generator, bos = np.random.default_rng(seed), texting.encode(model.tokenizer, "")[0]

    def ids(text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False).input_ids

    found, answers = [], []
    for _ in range(prompts):
        question, answer = problem(generator)
        last, examples = ids(f"Question: {question}\nAnswer:"), list[int]()
        while len(more := ids("Question: {}\nAnswer: {}\n\n".format(*problem(generator)))) <= prompt_tokens - sum(
            map(len, (bos, examples, last))
        ):
            examples += more
        found.append(bos + examples + last)
        answers.append(ids(f" {answer}\n"))
    return found, answers


def problem(generator: np.random.Generator) -> tuple[str, str]:
    """A question and its answer, in steps."""
    kinds: tuple[Callable, ...] = (_shopping, _sharing, _travel, _area, _savings)
    name = str(generator.choice(["Ada", "Ben", "Cleo", "Dina", "Emil", "Fay", "Gus", "Hana"]))
    a, b, c = (int(x) for x in generator.integers(3, 30, 3))
    return kinds[int(generator.integers(len(kinds)))](name, a, b, c)


def _shopping(name: str, a: int, b: int, c: int) -> tuple[str, str]:
    return (
        f"{name} buys {a} pencils for {b} cents each and a ruler for {c} cents. How many cents is that?",
        f"The pencils cost {a} * {b} = {a * b} cents. With the ruler it is {a * b} + {c} = {a * b + c} cents.",
    )


def _sharing(name: str, a: int, b: int, c: int) -> tuple[str, str]:
    return (
        f"{name} has {a * b + c} cards, gives {c} away and shares the rest equally among {b} friends. "
        "How many cards does each friend get?",
        f"After giving away {c} there are {a * b + c} - {c} = {a * b} cards. Each friend gets {a * b} / {b} = {a}.",
    )


def _travel(name: str, a: int, b: int, c: int) -> tuple[str, str]:
    return (
        f"{name} rides {a} km an hour for {b} hours and then walks {c} km. How far is that in all?",
        f"The ride is {a} * {b} = {a * b} km. With the walk it is {a * b} + {c} = {a * b + c} km.",
    )


def _area(name: str, a: int, b: int, c: int) -> tuple[str, str]:
    return (
        f"{name}'s garden is {a} m by {b} m, and {c} square metres of another one are added. What is the area?",
        f"The garden has {a} * {b} = {a * b} square metres. In all there are {a * b} + {c} = {a * b + c}.",
    )


def _savings(name: str, a: int, b: int, c: int) -> tuple[str, str]:
    return (
        f"{name} saves {a} coins a week for {b} weeks and spends {min(c, a)} of them. How many are left?",
        f"In {b} weeks that makes {a} * {b} = {a * b} coins. {a * b} - {min(c, a)} = {a * b - min(c, a)} are left.",
    )


def _windows(model, source: Callable[[int], str], prompts: int, prompt_tokens: int, use: str) -> Pairs:
    length = prompt_tokens + CONTINUATION
    text = source(CHARACTERS * prompts * length)
    found = texting.windows(model.tokenizer, text, length, prompts, f"the text for {use}")
    return [w[:prompt_tokens] for w in found], [w[prompt_tokens:] for w in found]
