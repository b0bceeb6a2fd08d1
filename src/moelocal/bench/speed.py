"""How fast programs are on one checkpoint: runs in turns, their medians and spread, ratios of pairs.

A run reads a prompt of a known number of tokens on an empty cache, then decodes greedily. The sides take turns within
every round and in going first, so that a slow moment of the machine falls on all of them; a ratio is that of a pair of
runs on the same prompt, one after the other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from moelocal.bench.peers import OURS, Loaded, Prompt, Sample, Side, SideFailed
from moelocal.errors import RequestError
from moelocal.evaluate.statistics import Estimate

CONTEXTS: Final = (0, *(512 << i for i in range(9)))
"""0 to 131,072 tokens in doublings."""

TOKENS: Final = 128
ROUNDS: Final = 5
LOADS: Final = 3

Report = Callable[[str, int, int], None]
"""What is being done, and how much of how much is done."""


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of `count` measurements, the least and the largest."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Figure | None:
        """Of those that are numbers; None if there are none."""
        found = [value for value in values if value is not None]
        return cls(statistics.median(found), min(found), max(found), len(found)) if found else None


@dataclass
class Measured:
    """`starts` of each side; `runs` by (context, round) and side; `notes`: what went wrong, in words; `interrupted`:
    somebody pressed Ctrl-C; `together`: all sides were loaded at the same time."""

    sides: tuple[str, ...]
    contexts: tuple[int, ...]
    tokens: int
    together: bool
    starts: dict[str, list[Loaded]] = field(default_factory=dict)
    runs: dict[tuple[int, int], dict[str, Sample]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def samples(self, side: str, context: int) -> list[Sample]:
        """The runs of a side at a context, by round."""
        return [
            run[side] for (where, _), run in sorted(self.runs.items()) if where == context and side in run
        ]

    def pairs(self, side: str, context: int) -> list[tuple[Sample, Sample]]:
        """Ours and another side's runs on the same prompts."""
        return [
            (run[OURS], run[side])
            for (where, _), run in sorted(self.runs.items())
            if where == context and OURS in run and side in run
        ]

    def figure(self, side: str, context: int, value: Callable[[Sample], float | None]) -> Figure | None:
        """What the runs of a side at a context give."""
        return Figure.of(value(sample) for sample in self.samples(side, context))

    def ratio(
        self, side: str, context: int, value: Callable[[Sample], float | None]
    ) -> tuple[Estimate, int] | None:
        """Ours over another side's: the median over pairs with its 95 % interval, and how many pairs."""
        found = [(value(ours), value(theirs)) for ours, theirs in self.pairs(side, context)]
        ratios = [a / b for a, b in found if a and b]
        return (paired(ratios), len(ratios)) if ratios else None


# 0.975 quantiles of Student's t by degrees of freedom; those between are rounded down to the next smaller one
_T: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
             12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980}  # fmt: skip


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t, at most a few percent too large between the rows of the table."""
    return _T[max(each for each in _T if each <= freedom)]


def paired(ratios: Sequence[float]) -> Estimate:
    """The geometric mean of ratios of pairs, and its 95 % interval by Student's t for the mean of their logarithms; no
    interval for one pair. A bootstrap over so few pairs would be far too narrow."""
    logarithms = np.log(np.asarray(ratios, np.float64))
    count, middle = len(logarithms), float(logarithms.mean())
    if count == 1:
        return Estimate(math.exp(middle), None, None)
    half = t_quantile(count - 1) * float(logarithms.std(ddof=1)) / math.sqrt(count)
    return Estimate(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def contexts_of(named: Sequence[int] | None, tokens: int, context: int, room: int) -> tuple[int, ...]:
    """The contexts to measure: those named, or the doublings that are possible. `context`: of the model; `room`: the
    positions that fit into memory. Raises `RequestError` for a named one that does not fit, saying what would."""
    most = min(context, room) - tokens
    why = f"the model's context is {context:,}" if context <= room else f"memory has room for {room:,}"
    if named is None:
        found = tuple(c for c in CONTEXTS if c <= most)
        if not found:
            raise RequestError(f"--tokens {tokens}: {why} tokens; decode fewer")
        return found
    for wanted in named:
        if wanted > most:
            raise RequestError(
                f"--contexts {wanted}: {why} tokens, {tokens} of them for the answer; at most {max(most, 0):,} is "
                "possible"
            )
    return tuple(sorted(set(named)))


def measure(
    sides: Sequence[Side],
    prompt: Callable[[int, int], Prompt],
    contexts: Sequence[int],
    *,
    tokens: int = TOKENS,
    rounds: int = ROUNDS,
    loads: int = LOADS,
    together: bool = True,
    report: Report = lambda what, done, total: None,
) -> Measured:
    """Measure `sides`, of which the first is ours. `prompt`: context and number -> a text unlike all others.
    `together`: all sides may be loaded at once; else each is loaded anew in every round, alone.

    A side that fails at a context is left out there and above, and that is noted. Ctrl-C ends it early with what there
    is, if there is anything. Raises `SideFailed` if ours cannot be loaded, or no run succeeds.
    """
    run = _Running(sides, prompt, tuple(contexts), tokens, rounds, loads, together, report)
    try:
        run.loads()
        run.rounds()
    except KeyboardInterrupt:
        if not run.measured.runs:
            raise
        run.measured.interrupted = True
    finally:
        for side in sides:
            side.stop()
    if not any(OURS in each for each in run.measured.runs.values()):
        raise SideFailed(run.measured.notes[0] if run.measured.notes else f"{OURS}: nothing was measured")
    return run.measured


class _Running:
    """The state of a measurement."""

    def __init__(
        self,
        sides: Sequence[Side],
        prompt: Callable[[int, int], Prompt],
        contexts: tuple[int, ...],
        tokens: int,
        rounds: int,
        loads: int,
        together: bool,
        report: Report,
    ) -> None:
        self.sides, self.prompt, self.tokens = sides, prompt, tokens
        self.count, self.starts, self.report = rounds, loads, report
        self.measured = Measured(tuple(side.name for side in sides), contexts, tokens, together)
        self.measured.starts = {side.name: [] for side in sides}
        self.limits: dict[str, float] = {}  # contexts from which a side fails
        self.warm: set[tuple[str, int]] = set()
        self.up: set[str] = set()
        warm_ups = 1 if together else rounds
        self.done, self.total = 0, len(sides) * sum(map(self.weight, contexts)) * (rounds + warm_ups)

    def weight(self, context: int) -> int:
        """Of a run, in the progress that is shown: a decoded token takes as long as several that are read."""
        return context + 10 * self.tokens

    def turns(self, number: int) -> Iterator[Side]:
        """The sides in an order that changes with every round."""
        every = self.sides if number % 2 == 0 else self.sides[::-1]
        return (side for side in every if self.limits.get(side.name) != 0)

    def loads(self) -> None:
        """Start every side some times. In the end all are up, if they may be."""
        for number in range(self.starts):
            for side in self.turns(number):
                self.start(side)
                if not self.measured.together or number < self.starts - 1:
                    self.stop(side)

    def rounds(self) -> None:
        for number in range(self.count):
            if self.measured.together:
                for context in self.measured.contexts:
                    for side in self.turns(number):
                        self.one(side, context, number)
                continue
            for side in self.turns(number):
                for context in self.measured.contexts:
                    self.one(side, context, number)
                self.stop(side)

    def one(self, side: Side, context: int, number: int) -> None:
        """A measured run, behind one that is not if this process has not yet been at this context."""
        if context >= self.limits.get(side.name, float("inf")):
            return
        place = self.measured.contexts.index(context) * (self.count + 1)
        try:
            if side.name not in self.up and not self.start(side):
                return
            if (side.name, context) not in self.warm:
                self.say(side, f"{context:,} tokens, warm-up")
                side.run(self.prompt(context, place + self.count), self.tokens)
                self.warm.add((side.name, context))
                self.done += self.weight(context)
            self.say(side, f"{context:,} tokens, round {number + 1} of {self.count}")
            sample = side.run(self.prompt(context, place + number), self.tokens)
        except SideFailed as error:
            self.fail(side, context, error)
            return
        self.done += self.weight(context)
        if any(where > context for name, where in self.warm if name == side.name):
            # the system tells the most since the process began, and that was there
            sample = replace(sample, resident_nbytes=None)
        self.measured.runs.setdefault((context, number), {})[side.name] = sample

    def start(self, side: Side) -> bool:
        self.say(side, "loading")
        try:
            loaded = side.start()
        except SideFailed as error:
            if side.name == OURS:
                raise
            self.fail(side, 0, error)
            return False
        self.up.add(side.name)
        self.measured.starts[side.name].append(loaded)
        return True

    def stop(self, side: Side) -> None:
        side.stop()
        self.up.discard(side.name)
        self.warm = {(name, context) for name, context in self.warm if name != side.name}

    def fail(self, side: Side, context: int, error: SideFailed) -> None:
        self.limits[side.name] = context
        where = f"at {context:,} tokens; not measured from there on" if context else "not measured"
        self.measured.notes.append(f"{error} ({where})")
        self.stop(side)  # what is left of it may be of no use; where it is needed it starts anew

    def say(self, side: Side, what: str) -> None:
        self.report(f"{side.name}: {what}", self.done, self.total)
