"""How fast this machine copies memory: a token that reads so many bytes of weights takes at least so long."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median
from time import perf_counter
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.ops.op import on_cpu

NBYTES: Final = 1 << 29
"""Of the array that is copied: several times the largest cache of any Apple chip."""

REPETITIONS: Final = 9
WARM_UP: Final = 2


def measure(
    nbytes: int = NBYTES, repetitions: int = REPETITIONS, clock: Callable[[], float] = perf_counter
) -> float:
    """Bytes read and written per second, the median of so many copies of an array of `nbytes` where MLX computes.

    On a GPU each element is one larger in the copy, since MLX copies nothing that need not be. On the CPU one core
    copies, as one core computes there most of a token, and NumPy does it: MLX would ask the system for fresh memory
    each time, and measure that.
    """
    copy = _on_cpu(nbytes) if on_cpu() else _on_gpu(nbytes)
    seconds = []
    for turn in range(WARM_UP + repetitions):
        begin = clock()
        copy()
        if turn >= WARM_UP:
            seconds.append(clock() - begin)
    return 2 * nbytes / median(seconds)


def _on_cpu(nbytes: int) -> Callable[[], None]:
    source = np.arange(nbytes, dtype=np.uint8)
    target = np.zeros_like(source)
    return lambda: np.copyto(target, source)


def _on_gpu(nbytes: int) -> Callable[[], None]:
    source = mx.arange(nbytes // 4, dtype=mx.uint32)
    mx.eval(source)
    return lambda: mx.eval(source + 1)


@cache
def measured() -> float:
    """The same, once in this process."""
    found = measure()
    mx.clear_cache()
    return found
