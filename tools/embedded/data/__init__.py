"""Training data: eight skills, each made by a generator with a held-out split and judged by exact match."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data import arithmetic, extraction, greetings, lookup, naming, sort_reverse, svg, tool_use
from data.task import Sample as Sample

MAKERS: dict[str, Callable[[random.Random, float], Sample]] = {
    "arithmetic": arithmetic.make,
    "lookup": lookup.make,
    "sort_reverse": sort_reverse.make,
    "json": extraction.make,
    "tools": tool_use.make,
    "svg": svg.make,
    "name": naming.make,
    "greetings": greetings.make,
}
SKILLS = list(MAKERS)


def sample(skill: str, rng: random.Random, difficulty: float = 1.0, split: str = "train") -> Sample:
    """A random instance of `skill` from one side of the split; `difficulty` 0..1 lengthens the tasks."""
    while True:
        made = MAKERS[skill](rng, difficulty)
        if made.held_out == (split == "held-out"):
            return made


def talk(skill: str, rng: random.Random, difficulty: float = 1.0) -> Sample:
    """A training sample inside a longer chat, as people have them: one to four tasks of other kinds come before one of
    its turns. Only the last answer is trained."""
    made = sample(skill, rng, difficulty)
    if made.tools is not None:
        return made
    # not of its own kind: a second name or list would make the question ambiguous
    kinds = [kind for kind in SKILLS if kind != skill]
    others = [sample(rng.choice(kinds), rng, difficulty * rng.random()) for _ in range(rng.randint(1, 4))]
    filler = [message for other in others if other.tools is None for message in other.messages]
    turns = sum(message["role"] == "user" for message in made.messages)
    # what a chat was told stays true over other tasks: they go before it, or between its turns
    questions = [i for i, message in enumerate(made.messages) if message["role"] == "user"]
    cut = questions[rng.randrange(turns)]
    return replace(made, messages=made.messages[:cut] + filler + made.messages[cut:])


def prompt_text(sample: Sample, template: Any) -> str:
    """The prompt before the last assistant turn, as the library renders it."""
    return template.render(sample.messages[:-1], tools=sample.tools, thinking=sample.thinking)


def answer_text(sample: Sample, template: Any) -> str:
    """What the model has to write after the prompt, `<|im_end|>` included."""
    last = sample.messages[-1]
    written = f"{last['reasoning_content']}\n</think>\n\n" if sample.thinking else ""
    if not last.get("tool_calls"):
        return f"{written}{last['content']}<|im_end|>"
    # the template alone knows how a call is written
    whole = template.render(sample.messages, tools=sample.tools, add_generation_prompt=False)
    call = whole[whole.rindex("<tool_call>") :].removesuffix("\n")
    return written + call


def encode(
    sample: Sample, tokenizer: Any, template: Any, history: bool = False
) -> tuple[list[int], list[float]]:
    """Token ids of prompt and answer, and weights: 0 on the prompt; on the answer more per token where it is short,
    or a picture of 160 tokens would outweigh a looked-up value of 7. With `history`, earlier answers count too."""
    prompt = tokenizer.encode(prompt_text(sample, template))
    written = tokenizer.encode(answer_text(sample, template))
    weight = (24 / len(written)) ** 0.5
    before = earlier_answers(prompt, tokenizer) if history else [False] * len(prompt)
    return prompt + written, [weight * part for part in before] + [weight] * len(written)


def earlier_answers(prompt: list[int], tokenizer: Any) -> list[bool]:
    """Which tokens of a prompt an assistant wrote, `<|im_end|>` included."""
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    head = tokenizer.encode("<|im_start|>assistant\n")
    marks, inside = [False] * len(prompt), False
    for i, token in enumerate(prompt):
        if token == start:
            inside = False
        marks[i] = inside
        if token == end:
            inside = False
        if i + 1 >= len(head) and prompt[i + 1 - len(head) : i + 1] == head:
            inside = end in prompt[i:]  # the last one is open: what follows is the answer itself
    return marks


def judge(sample: Sample, written: str, template: Any) -> bool:
    """Whether the answer after the thinking part equals the reference exactly."""
    expected = answer_text(sample, template).removesuffix("<|im_end|>")

    def after(text: str) -> str:
        return text.rpartition("</think>")[2].strip()

    return after(written) == after(expected)
