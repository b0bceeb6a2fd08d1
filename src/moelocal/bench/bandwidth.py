"""How fast this machine copies memory: a token that reads so many bytes of weights takes at least so long."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from statistics import median
from time import perf_counter
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.ops.cores import cores
from moelocal.ops.op import on_cpu

NBYTES: Final = 1 << 29
"""Of the array that is copied: several times the largest cache of any Apple chip."""

REPETITIONS: Final = 9
WARM_UP: Final = 2


def measure(
    nbytes: int = NBYTES, repetitions: int = REPETITIONS, clock: Callable[[], float] = perf_counter
) -> float:
    """Bytes read and written per second, the median of so many copies of an array of `nbytes` where MLX computes.

    On a GPU each element is one larger in the copy, since MLX copies nothing that need not be. On the CPU all cores
    copy, as all compute a large product (`moelocal.ops.cores`), and NumPy does it: MLX would ask the system for fresh
    memory each time, and measure that.
    """
    copy = _on_cpu(nbytes) if on_cpu() else _on_gpu(nbytes)
    seconds = []
    for turn in range(WARM_UP + repetitions):
        begin = clock()
        copy()
        if turn >= WARM_UP:
            seconds.append(clock() - begin)
    return 2 * nbytes / median(seconds)


def _on_cpu(nbytes: int) -> Callable[[], object]:
    source = np.arange(nbytes, dtype=np.uint8)
    target = np.zeros_like(source)
    parts = [np.array_split(whole, cores()) for whole in (target, source)]
    threads = ThreadPoolExecutor(cores())
    return lambda: list(threads.map(np.copyto, *parts))


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
