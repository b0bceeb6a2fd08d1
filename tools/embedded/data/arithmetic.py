"""Sums, differences and products, worked out digit by digit in the thought."""

from __future__ import annotations

import random

from data.task import Sample, answer, user

ASK = ["What is {}?", "Calculate {}.", "Compute {}", "{} = ?", "How much is {}?", "Please work out {}.", "{}"]


def add_steps(a: int, b: int) -> str:
    """Column by column from the right: `7+5=12 w2 c1`."""
    x, y, carry, parts = str(a)[::-1], str(b)[::-1], 0, []
    for i in range(max(len(x), len(y))):
        p, q = int(x[i]) if i < len(x) else 0, int(y[i]) if i < len(y) else 0
        total = p + q + carry
        parts.append(f"{p}+{q}+{carry}={total} w{total % 10}")
        carry = total // 10
    if carry:
        parts.append(f"w{carry}")
    return "; ".join(parts)


def subtract_steps(a: int, b: int) -> str:
    """a >= b, column by column with borrow: `(1)2-5-0=7 w7`."""
    x, y, borrow, parts = str(a)[::-1], str(b)[::-1], 0, []
    for i in range(len(x)):
        p, q = int(x[i]), int(y[i]) if i < len(y) else 0
        need = p - q - borrow < 0
        digit = p - q - borrow + 10 * need
        parts.append(f"{'1' if need else '0'}{p}-{q}-{borrow}={digit} w{digit}")
        borrow = int(need)
    return "; ".join(parts)


def multiply_steps(a: int, b: int) -> str:
    """a times a one-digit b, column by column."""
    carry, parts = 0, []
    for digit in str(a)[::-1]:
        total = int(digit) * b + carry
        parts.append(f"{digit}*{b}+{carry}={total} w{total % 10}")
        carry = total // 10
    if carry:
        parts.append(f"w{carry}")
    return "; ".join(parts)


def make(rng: random.Random, difficulty: float) -> Sample:
    top = 10 ** rng.choice([1, 2, 2, 3, 3] if difficulty > 0.5 else [1, 2, 2])
    kind = rng.choice("++--*")
    a, b = rng.randrange(top), rng.randrange(top)
    if kind == "+":
        steps, result = add_steps(a, b), a + b
    elif kind == "-":
        a, b = max(a, b), min(a, b)
        steps, result = subtract_steps(a, b), a - b
    else:
        a, b = rng.randrange(100 if difficulty > 0.3 else 10), rng.randrange(2, 10)
        steps, result = multiply_steps(a, b), a * b
    sign = rng.choice(["*", "×", "times"]) if kind == "*" else kind
    task = f"{a} {sign} {b}" if rng.random() < 0.7 or sign == "times" else f"{a}{sign}{b}"
    thought = f"{a}{kind}{b}: {steps}. {result}"
    return Sample(
        "arithmetic",
        [user(rng.choice(ASK).format(task)), answer(str(result), thought)],
        f"{a}{kind}{b}",
        thinking=True,
    )
