"""Tasks with a score for each item: those that ship (`uses`), and benchmarks in files as they are published."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints.bounds import truncated_repr
from ..runtime.generation import Model
from .samples import read_json_lines
from .uses import use_pairs

WHOLE = ("retrieval", "copying")  # uses whose answers count as a whole
EXAMPLES = 5  # of GSM8K: the file's first problems stand, solved, before every question
ANSWER_TOKENS = 256  # of GSM8K, at most


@dataclass(frozen=True)
class Continued:
    """A prompt and what follows it. Score: the share of its tokens that are the likeliest; `whole`: 1 if all are."""

    prompt: list[int]
    continuation: list[int]
    whole: bool

    def score(self, model: Model, depth: int) -> float:
        (logits,) = model.logits([self.prompt], [self.continuation], prefill_depth=depth)
        right = logits.argmax(-1).cpu() == torch.tensor(self.continuation)
        return float(right.all() if self.whole else right.float().mean())


@dataclass(frozen=True)
class Chosen:
    """A question and its choices. Score: 1 if the right one has the most log-probability for each of its characters."""

    prompt: list[int]
    choices: list[list[int]]
    characters: list[int]
    answer: int

    def score(self, model: Model, depth: int) -> float:
        found = model.logits([self.prompt] * len(self.choices), self.choices, prefill_depth=depth)
        sums = [
            float(logits.log_softmax(-1).gather(1, torch.tensor(choice, device=logits.device)[:, None]).sum())
            for logits, choice in zip(found, self.choices, strict=True)
        ]
        rates = [total / count for total, count in zip(sums, self.characters, strict=True)]
        return float(rates.index(max(rates)) == self.answer)


@dataclass(frozen=True)
class Worked:
    """A problem whose answer the model writes. Score: 1 if that ends in the right number."""

    prompt: list[int]
    answer: str
    max_new_tokens: int

    def score(self, model: Model, depth: int) -> float:
        output = model.generate(
            [self.prompt], prefill_depth=depth, max_new_tokens=self.max_new_tokens, do_sample=False,
            stop_strings=["Question:"],
        )  # fmt: skip
        assert output.text is not None
        return float(final_number(output.text[0].split("Question:")[0]) == self.answer)


@dataclass
class Task:
    """measure: what a score of 1 is, in words."""

    name: str
    measure: str
    items: list


def final_number(text: str) -> str | None:
    """The number after ####, as GSM8K marks its answers, or else the last one; without separators and a final .0."""
    marked = re.search(r"####\s*\$?(-?[\d.,]+)", text)
    numbers = [marked[1]] if marked else re.findall(r"-?\d[\d.,]*", text)
    return re.sub(r"\.0*$", "", numbers[-1].replace(",", "").rstrip(".")) if numbers else None


def shipped_task(use: str, model: Model, items: int, prompt_tokens: int, seed: int) -> Task:
    """One of `uses.USES`."""
    whole = use in WHOLE
    pairs = zip(*use_pairs(use, model, items, prompt_tokens, seed), strict=True)
    measure = "whole answers right" if whole else "tokens of the continuation right"
    return Task(use, measure, [Continued(prompt, rest, whole) for prompt, rest in pairs])


def choice_task(path: Path, encoder, items: int) -> Task:
    """Multiple choice, JSON lines {question, choices (list of texts), answer (index, letter or text)}; the first
    `items`. ValueError names the line that is wrong.
    """
    found = []
    for name, line in _objects(path):
        question, choices = line.get("question"), line.get("choices")
        if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f"{name}: {truncated_repr(line)}, expected question, choices (2 or more) and answer")
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError(f"{name}: choices is {truncated_repr(choices)}, expected texts")
        answer = _index(line.get("answer"), choices, name)
        ids = [_ids(encoder, f" {choice}") for choice in choices]
        prompt = _ids(encoder, f"Question: {question}\nAnswer:", start=True)
        _check_length(encoder, len(prompt) + max(map(len, ids)), name)
        found.append(Chosen(prompt, ids, list(map(len, choices)), answer))
    return Task(path.stem, "choices right", _some(found, items, path))


def gsm8k_task(path: Path, encoder, items: int, answer_tokens: int = ANSWER_TOKENS) -> Task:
    """GSM8K's lines as published, {question, answer that ends in #### and the number}; the first five are the worked
    examples before every question, the next `items` are asked. ValueError names the line that is wrong.
    """
    problems = []
    for name, line in _objects(path):
        question, answer = line.get("question"), line.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise ValueError(f"{name}: {truncated_repr(line)}, expected question and answer, which has ####")
        problems.append((name, question, answer))
    examples = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for _, question, answer in problems[:EXAMPLES])
    found = []
    for name, question, answer in problems[EXAMPLES : EXAMPLES + items]:
        prompt = _ids(encoder, f"{examples}Question: {question}\nAnswer:", start=True)
        _check_length(encoder, len(prompt) + answer_tokens, name)
        found.append(Worked(prompt, final_number(answer) or "", answer_tokens))
    return Task(path.stem, "final numbers right", _some(found, items, path))


def _objects(path: Path) -> Iterator[tuple[str, dict]]:
    for name, line in read_json_lines(path):
        if not isinstance(line, dict):
            raise ValueError(f"{name}: {truncated_repr(line)}, expected an object")
        yield name, line


def _index(answer, choices: list[str], name: str) -> int:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return letters.index(answer)
    raise ValueError(f"{name}: answer is {answer!r:.60}, expected one of the choices, its letter or its index from 0")


def _ids(encoder, text: str, start: bool = False) -> list[int]:
    """start: with what the tokenizer puts in front of any text."""
    return encoder.tokenizer(text, add_special_tokens=start, verbose=False).input_ids


def _check_length(encoder, length: int, name: str) -> None:
    if length > encoder.spec.max_position_embeddings:
        raise ValueError(
            f"{name}: {length} tokens with the answer, expected at most {encoder.spec.max_position_embeddings}, the "
            "model's context"
        )


def _some(found: list, items: int, path: Path) -> list:
    if not found:
        raise ValueError(f"{path}: no questions, expected at least one (of GSM8K after the first {EXAMPLES})")
    return found[:items]
