"""Remember what the user said of themselves over several turns."""

from __future__ import annotations

import random

from data.task import Sample, answer, user
from data.words import CITIES, COLOURS, NAMES

TELL = [
    "My name is {}.",
    "I am {}.",
    "Hi, I'm {}.",
    "Hello, my name is {}.",
    "You can call me {}.",
    "Call me {}.",
]
ASK = ["What is my name?", "Who am I?", "Do you remember my name?", "What's my name?", "Tell me my name."]
FACTS = {
    "city": (["I live in {}.", "My city is {}."], CITIES,
             ["Where do I live?", "Which city do I live in?"], "You live in {}."),
    "colour": (["My favourite colour is {}.", "I like the colour {}."], COLOURS,
               ["What is my favourite colour?", "Which colour do I like?"], "You like {}."),
}  # fmt: skip
TALK = [
    ("How are you?", "I am fine, thank you."),
    ("Nice weather today.", "Yes, it is."),
    ("Thank you.", "You are welcome."),
    ("Good.", "Good."),
    ("I am tired.", "Take a rest."),
    ("Tell me something nice.", "You are kind."),
]


def make(rng: random.Random, difficulty: float) -> Sample:
    name = rng.choice(NAMES)
    turns = [(rng.choice(TELL).format(name), f"Nice to meet you, {name}.")]
    question, reply = rng.choice(ASK), f"Your name is {name}."
    instance, thought = name, f"The name is {name}."
    if rng.random() < 0.5:
        fact = rng.choice(list(FACTS))
        tell, values, ask, says = FACTS[fact]
        value = rng.choice(values)
        turns.append((rng.choice(tell).format(value), "Good to know."))
        instance += f"/{value}"
        if rng.random() < 0.5:
            question, reply, thought = rng.choice(ask), says.format(value), f"It is {value}."
    for _ in range(rng.randint(0, 2 if difficulty > 0.3 else 1)):
        turns.insert(rng.randint(1, len(turns)), rng.choice(TALK))
    instance += f"/{len(turns)}/{question}"
    if rng.random() < 0.25:  # an earlier turn is the one that is answered
        end = rng.randrange(len(turns))
        question, reply = turns[end]
        turns, thought = turns[:end], "I answer kindly."
    thinking = rng.random() < 0.5
    messages = [m for q, a in turns for m in (user(q), answer(a))]
    messages += [user(question), answer(reply, thought if thinking else "")]
    return Sample("name", messages, instance, thinking)
