"""A sentence to JSON with the keys asked for."""

from __future__ import annotations

import json
import random
from typing import Any

from data.task import Sample, answer, user
from data.words import CITIES, NAMES, WORDS

ASK = ["Extract {} as JSON: {}", "Give {} as JSON. {}", "{1}\nReturn JSON with {0}.", "JSON with the keys {}: {}",
       "Read: {1} Write {0} as JSON."]  # fmt: skip
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def person(rng: random.Random) -> tuple[str, dict[str, Any]]:
    name, age, city = rng.choice(NAMES), rng.randint(7, 98), rng.choice(CITIES)
    text = rng.choice(["{n} is {a} years old and lives in {c}.", "{n}, {a}, comes from {c}.",
                       "My friend {n} from {c} is {a}.", "In {c} lives {n}, aged {a}."])  # fmt: skip
    return text.format(n=name, a=age, c=city), {"name": name, "age": age, "city": city}


def product(rng: random.Random) -> tuple[str, dict[str, Any]]:
    item, price, count = rng.choice(WORDS), rng.randint(2, 99), rng.randint(2, 20)
    text = rng.choice(["We sold {k} of the item {i} for {p} euros each.", "Order: {k} times {i}, price {p}.",
                       "The {i} costs {p}, and {k} are left."])  # fmt: skip
    return text.format(i=item, p=price, k=count), {"item": item, "price": price, "count": count}


def meeting(rng: random.Random) -> tuple[str, dict[str, Any]]:
    day, hour, name = rng.choice(DAYS), rng.randint(8, 19), rng.choice(NAMES)
    text = rng.choice(["Meet {n} on {d} at {h}.", "{d}, {h} o'clock: meeting with {n}.",
                       "The meeting with {n} is at {h} on {d}."])  # fmt: skip
    return text.format(n=name, d=day, h=hour), {"day": day, "hour": hour, "name": name}


def make(rng: random.Random, difficulty: float) -> Sample:
    text, fields = rng.choice([person, product, meeting])(rng)
    keys = rng.sample(list(fields), rng.randint(2, 3) if difficulty > 0.2 else 2)
    chosen = {key: fields[key] for key in keys}
    content = json.dumps(chosen)
    thinking = rng.random() < 0.5
    thought = ", ".join(f"{k} is {v}" for k, v in chosen.items())
    request = rng.choice(ASK).format(" and ".join(keys) if len(keys) == 2 else ", ".join(keys), text)
    return Sample("json", [user(request), answer(content, thought if thinking else "")], text, thinking)
