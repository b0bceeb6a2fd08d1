"""Sort words by the alphabet, or reverse their order."""

from __future__ import annotations

import random

from data.task import Sample, answer, user
from data.words import WORDS

SORT = ["Sort these words: {}", "Sort alphabetically: {}", "Put these words in alphabetical order: {}",
        "Order the words {} from A to Z.", "Please sort: {}", "alphabetical order: {}"]  # fmt: skip
REVERSE = ["Reverse the order of these words: {}", "Reverse: {}", "Write these words backwards, last word first: {}",
           "Turn the list around: {}", "Please reverse the list {}.", "reverse order: {}"]  # fmt: skip


def make(rng: random.Random, difficulty: float) -> Sample:
    words = rng.sample(WORDS, rng.randint(3, 4 if difficulty < 0.4 else 6))
    sort = rng.random() < 0.55
    result = sorted(words) if sort else words[::-1]
    thinking = rng.random() < 0.6
    # the first letters in order are what has to be worked out
    thought = " ".join(f"{w[:2]}" for w in result) if sort else f"last is {words[-1]}"
    request = rng.choice(SORT if sort else REVERSE).format(rng.choice([", ", " "]).join(words))
    return Sample(
        "sort_reverse",
        [user(request), answer(", ".join(result), thought if thinking else "")],
        f"{sort}/{' '.join(words)}",
        thinking,
    )
