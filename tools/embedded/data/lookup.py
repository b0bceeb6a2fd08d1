"""Find the value of a key in a list of up to about 400 tokens."""

from __future__ import annotations

import random

from data.task import Sample, answer, is_held_out, user
from data.words import CITIES, COLOURS, NAMES, WORDS

ASK = [
    "What is the value of {k}?",
    "What is {k}?",
    "Which value belongs to {k}?",
    "Look up {k}.",
    "Find {k} in the list.",
    "Tell me the entry for {k}.",
    "And {k}?",
]
LEAD = ["Here is a list:", "List:", "Data:", "Look at this list.", "These are the values:", ""]


def make(rng: random.Random, difficulty: float) -> Sample:
    longest = max(3, int(44 * difficulty))
    count = rng.randint(*rng.choices([(2, 6), (4, 14), (8, 44)], [0.5, 0.35, 0.15 * difficulty])[0])
    count = min(count, longest)
    kind = rng.randrange(4)
    keys = rng.sample(NAMES if kind == 0 else WORDS, count)
    values = {0: [str(rng.randrange(10, 1000)) for _ in keys], 1: [rng.choice(COLOURS) for _ in keys],
              2: [rng.choice(CITIES) for _ in keys], 3: [str(rng.randrange(10, 100)) for _ in keys]}[kind]  # fmt: skip
    mark, bullet = rng.choice([": ", " = ", ": ", " - "]), rng.choice(["- ", "- ", "* "])
    # behind a bullet a key is the same token as inside the question: a word after a space
    lines = [f"{bullet}{k}{mark}{v}" for k, v in zip(keys, values, strict=True)]
    chosen = rng.randrange(len(keys))
    question = rng.choice(ASK).format(k=keys[chosen])
    body = "\n".join(lines)
    lead = rng.choice(LEAD)
    text = f"{lead}\n{body}\n{question}" if rng.random() < 0.7 else f"{question}\n{lead}\n{body}"
    thinking = rng.random() < 0.5
    instances = [f"{k}/{v}/{len(keys)}" for k, v in zip(keys, values, strict=True)]
    free = [i for i in range(len(keys)) if not is_held_out("lookup", instances[i])]
    asked = [user(text.strip())]
    if chosen in free and len(free) > 1 and rng.random() < 0.75:
        # several questions about one list: trained on each answer, where the list alone would give one
        first, *more = rng.sample([i for i in free if i != chosen], rng.randint(1, min(7, len(free) - 1)))
        asked = [user(text.strip().replace(question, question.replace(keys[chosen], keys[first])))]
        for i in more:
            asked += [answer(values[first]), user(rng.choice(ASK).format(k=keys[i]))]
            first = i
        asked += [answer(values[first]), user(question)]
    messages = [*asked, answer(values[chosen], lines[chosen] if thinking else "")]
    return Sample("lookup", messages, instances[chosen], thinking)
