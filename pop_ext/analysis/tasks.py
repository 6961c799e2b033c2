"""Synthetic tasks: prompts that hold something that their continuations need."""

from __future__ import annotations

import numpy as np


def synthetic_task(
    kind: str, filler: list[list[int]], tokenizer, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that plant something in `filler` windows, and continuations that need it: kind "retrieval" states a
    number for a name and asks for it at the end, "copying" gives a list of words once and starts it again.

    Prompts keep the windows' length. ValueError if a window is too short.
    """
    if kind not in ("retrieval", "copying"):
        raise ValueError(f"kind is {kind!r}, expected 'retrieval' or 'copying'")
    generator = np.random.default_rng(seed)
    prompts, continuations = [], []
    for window in filler:
        if kind == "retrieval":
            name = " ".join(str(word) for word in generator.choice(WORDS, 2, replace=False))
            number = str(generator.integers(10**5, 10**6))
            fact, question, answer = (
                f"\nThe number of {name} is {number}.\n",
                f"\nThe number of {name} is",
                f" {number}.",
            )
        else:
            words = [str(word) for word in generator.choice(WORDS, 16, replace=False)]
            fact, question, answer = (
                f"\nThe list: {' '.join(words)}.\n",
                f"\nAgain, the list: {' '.join(words[:4])}",
                f" {' '.join(words[4:])}.",
            )
        fact, question, answer = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (fact, question, answer)
        )
        room = len(window) - len(fact) - len(question)
        if room < 3:
            raise ValueError(
                f"prompts of {len(window)} tokens are too short, expected {len(window) + 3 - room} or more"
            )
        cut = int(generator.integers(1, room))
        prompts.append(window[:cut] + fact + window[cut:room] + question)
        continuations.append(answer)
    return prompts, continuations


WORDS = [
    "amber", "anchor", "basin", "beacon", "birch", "bridge", "canyon", "cedar", "cliff", "cloud", "copper", "coral",
    "cotton", "crystal", "delta", "desert", "eagle", "ember", "falcon", "feather", "fern", "forest", "fossil",
    "garden", "glacier", "granite", "harbor", "hazel", "island", "ivory", "jasper", "kettle", "lantern", "lemon",
    "maple", "marble", "meadow", "mirror", "moss", "mountain", "oasis", "olive", "orchard", "otter", "pebble",
    "pepper", "pine", "planet", "prairie", "quartz", "raven", "ribbon", "river", "saddle", "saffron", "shadow",
    "silver", "spruce", "summit", "thunder", "timber", "valley", "velvet", "violet", "walnut", "willow", "winter",
]  # fmt: skip
