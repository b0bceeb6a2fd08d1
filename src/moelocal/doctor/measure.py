"""Kernels against references and stock MLX: is it right, is it faster. What is timed and by which clock is given, so
that tests decide both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Final

import mlx.core as mx

from moelocal.doctor.cases import Case
from moelocal.doctor.shapes import arrays
from moelocal.ops.choice import Entry, words

WIN: Final = 1.03
"""Portable time over metal time from which a kernel is kept."""

PAIRS: Final = 21
WARM_UP: Final = 2

BOUNDS: Final = {mx.float32: 1e-4, mx.float16: 2**-11, mx.bfloat16: 2**-8}
"""Root mean square of the difference from the reference, relative to that of the reference. For the 16-bit types twice
the most that one rounding changes a value, four times what kernels differ by that round an intermediate result (2^-10
for the experts in bfloat16); for float32 the order of long sums and a fast exponential. The least of eight experts
lost, with a weight of 0.01, is off by more. The largest difference would not tell that from a value that was rounded
the other way."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a kernel is from its reference: `error` of the output that is worst against its `bound`; None if it gave
    no numbers to compare, and `problem` says why."""

    error: float | None
    bound: float
    problem: str = ""

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= self.bound


def agreement(case: Case) -> Agreement:
    """Run the kernel of a case and its reference on the same arguments. Raises what MLX raises where that is not the
    kernel's fault: for want of memory, above all."""
    assert case.op.metal is not None
    arguments = case.step(0, None)
    expected = arrays(case.expected() if case.expected else case.op.reference(*arguments))
    mx.eval(expected, arrays(arguments))
    try:
        got = arrays(case.op.metal(*arguments))
        mx.eval(got)
    except (RuntimeError, ValueError) as error:  # what MLX raises, a compiler's messages among it
        return Agreement(None, 0.0, one_line(error))
    if [(a.shape, a.dtype) for a in got] != [(a.shape, a.dtype) for a in expected]:
        return Agreement(None, 0.0, "outputs of another shape or dtype than the reference")
    found = [_difference(a, b) for a, b in zip(got, expected, strict=True)]
    return max(found, key=lambda a: (not a.right, (a.error or 0.0) / (a.bound or 1.0)))


def one_line(error: BaseException) -> str:
    """What an error says, short enough for a row."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _difference(got: mx.array, expected: mx.array) -> Agreement:
    if got.dtype not in BOUNDS:  # indices
        return Agreement(float(mx.mean(got != expected)), 0.0)
    a, b = got.astype(mx.float32), expected.astype(mx.float32)
    if not mx.all(mx.isfinite(a)).item():
        return Agreement(None, BOUNDS[got.dtype], "gives NaN or infinite values")
    error = mx.sqrt(mx.mean(mx.square(a - b))) / mx.maximum(mx.sqrt(mx.mean(mx.square(b))), 1e-30)
    return Agreement(float(error), BOUNDS[got.dtype])


Start = Callable[[], Any]
"""Builds what an evaluation then computes: arrays, or a function where a form evaluates in its midst."""


def chain(case: Case, form: str) -> Start:
    """Calls of a form, each on the result of the one before, compiled as the layers compile them."""
    call = getattr(case.op, form)

    def run() -> list[mx.array]:
        last, outputs = None, []
        for i in range(case.length):
            last = call(*case.step(i, last))
            outputs += arrays(last)
        return outputs

    mx.eval(arrays([case.step(i, None) for i in range(case.length)]))
    return mx.compile(run) if case.lazy else lambda: run


def evaluate(built: Any) -> None:
    """Compute what a `Start` gave."""
    mx.eval(built() if callable(built) else built)


def _seconds(start: Start, clock: Callable[[], float], evaluate: Callable[[Any], None]) -> float:
    built = start()
    before = clock()
    evaluate(built)
    return clock() - before


def pairs(
    portable: Start, metal: Start, clock: Callable[[], float], evaluate: Callable[[Any], None] = evaluate
) -> list[tuple[float, float]]:
    """Seconds of (portable, metal), `PAIRS` times after a warm-up. They take turns in going first, so that neither a
    slow moment nor what the other left in the caches falls on one of them alone."""
    found = []
    for i in range(WARM_UP + PAIRS):
        if i % 2:
            m, p = _seconds(metal, clock, evaluate), _seconds(portable, clock, evaluate)
        else:
            p, m = _seconds(portable, clock, evaluate), _seconds(metal, clock, evaluate)
        found.append((p, m))
    return found[WARM_UP:]


def tune(
    case: Case,
    clock: Callable[[], float] = perf_counter,
    prepare: Callable[[Case, str], Start] = chain,
    evaluate: Callable[[Any], None] = evaluate,
    check: Callable[[Case], Agreement] = agreement,
) -> tuple[Entry, Agreement]:
    """Measure a case whose op has a kernel that supports it. A kernel that is not right is not timed. Raises what MLX
    raises where that is not the kernel's fault."""
    found = check(case)
    kept, ratio, p, m = False, None, None, None
    if found.right:
        timed = pairs(prepare(case, "portable"), prepare(case, "metal"), clock, evaluate)
        ratio = median(portable / metal for portable, metal in timed)
        p, m = (median(each) / case.length for each in zip(*timed, strict=True))
        kept = ratio >= WIN
    entry = Entry(
        op=case.op.name,
        case=case.name,
        shapes=words(case.op.key(*case.step(0, None))),
        form="metal" if kept else "portable",
        ratio=ratio,
        portable_seconds=p,
        metal_seconds=m,
        error=found.error,
        bound=found.bound,
    )
    return entry, found


def supported(case: Case) -> bool:
    """Whether the op of a case has a kernel for its arguments."""
    op = case.op
    return op.metal is not None and (op.supports is None or op.supports(*case.step(0, None)))


@dataclass(frozen=True, slots=True)
class Speed:
    """A kernel at one shape: seconds of a call, and bytes that a call must read and write."""

    seconds: float
    nbytes: int

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9


def speed(
    case: Case,
    clock: Callable[[], float] = perf_counter,
    prepare: Callable[[Case, str], Start] = chain,
    evaluate: Callable[[Any], None] = evaluate,
) -> Speed:
    """Median over `PAIRS` chains of the kernel of a case."""
    start, op = prepare(case, "metal"), case.op
    seconds = [_seconds(start, clock, evaluate) for _ in range(WARM_UP + PAIRS)][WARM_UP:]
    arguments = case.step(0, None)
    moved = sum(array.nbytes for array in [*arrays(arguments), *arrays(op.portable(*arguments))])
    return Speed(median(seconds) / case.length, moved - case.unread)
