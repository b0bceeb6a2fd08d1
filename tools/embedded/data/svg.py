"""Pictures as SVG: shapes that the request describes completely, and a pelican on a bicycle."""

from __future__ import annotations

import random

from data.task import Sample, answer, user
from data.words import COLOURS

ASK = ["Draw {} as SVG.", "Generate an SVG of {}.", "SVG: {}", "Make an SVG picture of {}.", "Please draw {} as SVG.",
       "Write SVG for {}.", "Create an SVG with {}."]  # fmt: skip
PLACES = {"in the middle": (50, 50), "on the left": (25, 50), "on the right": (75, 50), "at the top": (50, 25),
          "at the bottom": (50, 75), "in the top left": (25, 25), "in the top right": (75, 25),
          "in the bottom left": (25, 75), "in the bottom right": (75, 75)}  # fmt: skip
SIZES = {"small": 8, "": 14, "big": 20}
KINDS = ["circle", "square", "triangle", "ellipse"]
OPEN = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">'


def shape(kind: str, x: int, y: int, r: int, colour: str) -> str:
    """One element with centre x, y and half-size r."""
    if kind == "circle":
        return f'<circle cx="{x}" cy="{y}" r="{r}" fill="{colour}"/>'
    if kind == "square":
        return f'<rect x="{x - r}" y="{y - r}" width="{2 * r}" height="{2 * r}" fill="{colour}"/>'
    if kind == "ellipse":
        return f'<ellipse cx="{x}" cy="{y}" rx="{r}" ry="{r // 2}" fill="{colour}"/>'
    return f'<polygon points="{x},{y - r} {x + r},{y + r} {x - r},{y + r}" fill="{colour}"/>'


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def shapes(rng: random.Random, difficulty: float) -> tuple[str, str, str]:
    """Description, SVG text, thought."""
    count = rng.choice([1, 1, 2, 2, 3] if difficulty > 0.4 else [1, 1, 2])
    phrases, elements, plan = [], [], []
    for place in rng.sample(list(PLACES), count):
        kind, colour, size = rng.choice(KINDS), rng.choice(COLOURS), rng.choice(list(SIZES))
        x, y = PLACES[place]
        phrases.append(f"{article(f'{size} {colour} {kind}'.strip())} {place}")
        elements.append(shape(kind, x, y, SIZES[size], colour))
        plan.append(f"{colour} {kind} {x},{y} size {SIZES[size]}")
    described = " and ".join(phrases) if count < 3 else f"{phrases[0]}, {phrases[1]} and {phrases[2]}"
    return described, f"{OPEN}\n" + "\n".join(elements) + "\n</svg>", "; ".join(plan)


def pelican(body: str, bicycle: str) -> str:
    """A pelican riding to the right: wheels, frame, legs, body, wing, neck, head, eye, beak with pouch."""
    return "\n".join([
        OPEN,
        f'<g fill="none" stroke="{bicycle}" stroke-width="2">',
        '<circle cx="25" cy="75" r="16"/>',
        '<circle cx="75" cy="75" r="16"/>',
        '<path d="M25 75 L42 52 L68 52 L50 75 Z M42 52 L50 75 M75 75 L66 46 L73 43 M37 50 L46 50"/>',
        "</g>",
        '<path d="M44 46 L52 62 L48 76 M48 46 L43 62 L53 74" fill="none" stroke="orange" stroke-width="2"/>',
        f'<ellipse cx="44" cy="38" rx="17" ry="11" fill="{body}" stroke="black"/>',
        f'<path d="M56 36 Q68 30 60 14" fill="none" stroke="{body}" stroke-width="6"/>',
        '<path d="M34 36 Q46 50 56 36 Z" fill="lightgray" stroke="black"/>',
        f'<circle cx="60" cy="14" r="6" fill="{body}" stroke="black"/>',
        '<path d="M65 12 L92 18 Q78 32 64 18 Z" fill="orange" stroke="black"/>',
        '<circle cx="61" cy="13" r="1.5" fill="black"/>',
        "</svg>",
    ])  # fmt: skip


PELICAN = ["a pelican riding a bicycle", "a pelican on a bicycle", "a pelican that rides a bicycle",
           "a pelican on a bike", "a pelican riding a bike"]  # fmt: skip


def make(rng: random.Random, difficulty: float) -> Sample:
    thinking = rng.random() < 0.5
    if rng.random() < 0.15 + 0.1 * difficulty:
        body, bicycle = "white", "black"
        subject = rng.choice(PELICAN)
        if rng.random() < 0.6:
            body = rng.choice(COLOURS)
            subject = subject.replace("pelican", f"{body} pelican").replace("a orange", "an orange")
        if rng.random() < 0.6:
            bicycle = rng.choice(COLOURS)
            subject = subject.replace("a bi", f"a {bicycle} bi").replace("a orange", "an orange")
        text, thought = pelican(body, bicycle), f"{body} pelican, {bicycle} bicycle."
    else:
        subject, text, thought = shapes(rng, difficulty)
    request = rng.choice(ASK).format(subject)
    return Sample("svg", [user(request), answer(text, thought if thinking else "")], subject, thinking)
