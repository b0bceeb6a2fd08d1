"""Large products on all cores of the CPU device (docs/decisions/0009-cores.md).

MLX computes an op of the CPU device on one thread, but streams beside each other. Every number of a product depends on
one row of the matrix alone, so that cutting the rows into parts, a stream for each, changes no bit of the result.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Final, TypeVar

import mlx.core as mx

from moelocal.ops.op import on_cpu

T = TypeVar("T")

LEAST = 1 << 18
"""Weights from which a part pays for a thread of its own. On one core of an AMD EPYC they take 180 microseconds,
handing them over and waiting takes about 50 (2026-11-21, `python benchmarks/cores.py`)."""

AHEAD: Final = 2
"""Results that are made while the caller of `ahead` works on another. Each takes memory: `engine/plan.py` counts it."""


def cut(count: int, weights: int) -> list[slice]:
    """`count` rows, which are as much work as a product with `weights` weights, in a part for each core; nothing where
    one core has them done as soon."""
    if not on_cpu() or (number := min(count, weights // LEAST, cores())) < 2:
        return []
    return [slice(*each) for each in pairwise(count * i // number for i in range(number + 1))]


def on_cores(part: Callable[[slice], mx.array], parts: list[slice], axis: int) -> mx.array:
    """`part` of each of the parts, on a core of its own, joined along `axis`."""
    found = []
    for number, some in enumerate(parts):
        with _core(number):
            found.append(part(some))
    return mx.concatenate(found, axis)


def ahead(make: Callable[[T], mx.array], items: Iterable[T]) -> Iterator[mx.array]:
    """`make(item)` of each item in order, evaluated on other cores while the caller works on those before."""
    waiting: deque[mx.array] = deque()
    for i, item in enumerate(items):
        with _core(i % min(cores(), AHEAD)):
            waiting.append(make(item))
        mx.async_eval(waiting[-1])  # type: ignore[no-untyped-call]  # MLX has no annotation for it
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


@cache
def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _core(number: int) -> AbstractContextManager[object]:
    """What is built in it runs beside the others; number 0 where it would run anyway, without a hand-over."""
    return mx.stream(_stream(number)) if number else nullcontext()


@cache
def _stream(_: int) -> mx.ThreadLocalStream:
    """A stream besides the default one. Each thread that computes gets its own of it."""
    return mx.new_thread_local_stream(mx.cpu)
