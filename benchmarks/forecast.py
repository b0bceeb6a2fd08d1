"""What `scale.py` measures, and how long that will take: said as soon as one point was measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import synthetic
from growth import decode_work, prefill_work
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from sides import Run

from moelocal.config import ModelConfig

LEAST_ROUNDS: Final = 3
MOST_ROUNDS: Final = 12


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint and a length. `x` is what the axis is about; `once`: no rounds, one run for its memory."""

    x: int
    changes: dict[str, int]
    context: int
    once: bool = False

    @property
    def key(self) -> tuple[tuple[str, int], ...]:
        """Of the checkpoint."""
        return tuple(self.changes.items())


@dataclass(frozen=True, slots=True)
class Axis:
    """Points that differ in one thing. `decode`: tokens; `share` of the time."""

    name: str
    shape: str
    points: tuple[Point, ...]
    decode: int
    share: float

    @property
    def timed(self) -> tuple[Point, ...]:
        """Those that are measured in rounds."""
        return tuple(point for point in self.points if not point.once)


class Forecast:
    """The time of all axes, as a context: with a bar of it on a terminal.

    `seconds` are shared out for rounds; loading, and runs that are taken once, come on top of that. A machine on which
    the least number of rounds takes longer takes longer.
    """

    def __init__(self, axes: Sequence[Axis], seconds: float) -> None:
        self._axes, self._seconds = axes, seconds
        console, columns = (
            Console(stderr=True),
            (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task, self._begin, self._known = self._bar.add_task("", total=None), time.monotonic(), False

    def __enter__(self) -> Forecast:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def seconds(self, axis: Axis) -> float:
        """For the rounds of an axis."""
        return self._seconds * axis.share

    def say(self, text: str) -> None:
        """What is being done."""
        self._bar.update(self._task, description=text, completed=time.monotonic() - self._begin)

    def learn(self, runs: Mapping[str, Run], config: ModelConfig) -> None:
        """From the runs of a point by program: say how long all will take, if it was not said yet."""
        if self._known:
            return
        self._known = True
        paces = {program: _pace(run, config) for program, run in runs.items()}
        elapsed = time.monotonic() - self._begin
        loading = elapsed - sum(run.first_seconds + run.decode_seconds for run in runs.values())
        found = {axis.name: self.predicted(axis, list(paces.values()), loading) for axis in self._axes}
        self._bar.update(self._task, total=sum(found.values()))
        parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in found.items())
        self._bar.console.print(
            f"about {sum(found.values()) / 60:.0f} minutes in all: {parts}", highlight=False
        )

    def predicted(self, axis: Axis, paces: Sequence[tuple[float, float]], loading: float) -> float:
        """Seconds of an axis by programs of these paces, with `loading` seconds for each of its checkpoints."""
        configs = {p.key: ModelConfig.parse(synthetic.shape(axis.shape, p.changes)) for p in axis.points}

        def seconds(points: Sequence[Point]) -> float:
            works = [_work(configs[point.key], point.context, axis.decode) for point in points]
            return sum(read * a + decoded * b for read, decoded in works for a, b in paces)

        one = seconds(axis.timed)
        rounds = min(max(int(self.seconds(axis) / one), LEAST_ROUNDS), MOST_ROUNDS)
        return len(configs) * loading + rounds * one + seconds([p for p in axis.points if p.once])


def _work(config: ModelConfig, context: int, decode: int) -> tuple[float, float]:
    """Multiply-adds of a run: to read its prompt, to decode behind it."""
    read = context * prefill_work(config, context)
    return read, (decode - 1) * decode_work(config, context + decode / 2)


def _pace(run: Run, config: ModelConfig) -> tuple[float, float]:
    """Seconds per multiply-add: reading, decoding."""
    read, decoded = _work(config, run.prompt, run.decode)
    return run.first_seconds / read, run.decode_seconds / decoded
