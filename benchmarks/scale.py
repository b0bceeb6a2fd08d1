"""How cost grows with context, experts and layers: moelocal beside mlx-lm on random checkpoints.

    python benchmarks/scale.py [--quick] [--minutes N] [--json]       # at most 15 minutes on two cores, or about 4
    python benchmarks/scale.py --slice [--minutes N] [--json]         # 4 layers in the flagship's shape, 2.5 GB
    python benchmarks/scale.py --redraw                               # pictures of the last run in the results

Needs the extra `compare`. The checkpoints are those of benchmarks/synthetic.py: the shape `small`, 4 bits, with
another number of experts or layers. What a run does, and why both do the same work, says benchmarks/sides.py.

- In a round each program takes each point once, the two one right after the other, first the one, next time the other.
  Rounds go on while the time lasts (at least three); a figure is the median. Ratios are ours over mlx-lm in speed, the
  geometric mean over the pairs with its 95 % interval (Student's t of their logarithms); above 1 we are faster.
- Exponents are slopes of log seconds per token over log context, experts or layers, with 95 % intervals. Beside them
  stands that of the work, multiply-adds counted from the config (benchmarks/growth.py). Cost grows faster than the work
  where the interval of the excess, the exponent of cost over work, lies above 0.
- Memory: the most that MLX held in a run; the most that the process had resident, in the first round, in which contexts
  grow. NumPy's memory, which our prompt reading uses on the CPU, is in the second alone.

Rows are added to benchmarks/results/<machine>.tsv and pictures drawn to docs/images, unless --quick; --results and
--images name other folders, also then. On a busy machine the seconds are noise; ratios suffer less.

With --json the last line is one object: `ratio` by axis, point and figure; `exponents` by axis, figure and program;
`memory` in bytes by program and context; `agree`: the share of greedy choices that are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import synthetic
from growth import decode_work, exponent, prefill_work
from rich.console import Console
from rich.progress import Progress
from scale_report import FIGURES, draw, last_run, show, summary
from sides import PROGRAMS, Run, Side

from moelocal import machine
from moelocal.bench import results
from moelocal.bench.header import Header, Identity, command_line
from moelocal.bench.results import Row
from moelocal.bench.speed import Figure, paired
from moelocal.chat.command import exit_code
from moelocal.config import ModelConfig
from moelocal.errors import RequestError
from moelocal.evaluate.statistics import Estimate
from moelocal.units import size

HERE: Final = Path(__file__).parent
OURS, THEIRS = PROGRAMS
WARM_UP: Final = (48, 4)
"""Prompt and tokens of a first run, which compiles; rounds begin after it."""

LEAST_ROUNDS, MOST_ROUNDS = 3, 12


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint and a length. `x` is what the axis is about."""

    x: int
    changes: dict[str, int]
    context: int

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


def axes_of(quick: bool, longest: int) -> list[Axis]:
    """The default run, or one with fewer and shorter points."""
    contexts = [length for length in (256 << i for i in range(16)) if length <= longest]
    experts = (16, 64, 256) if quick else (16, 32, 64, 128, 256, 512)
    layers = (4, 8, 12) if quick else (4, 8, 16, 24)
    length = 256 if quick else 512
    base = {"layers": 4, "experts": 64}
    return [
        Axis("context", "small", tuple(Point(n, base, n) for n in contexts), 32, 0.5),
        Axis("experts", "small", tuple(Point(n, base | {"experts": n}, length) for n in experts), 48, 0.25),
        Axis("layers", "small", tuple(Point(n, base | {"layers": n}, length) for n in layers), 32, 0.25),
    ]


def slice_of(layers: int) -> list[Axis]:
    """A few layers of the flagship."""
    points = tuple(Point(n, {"layers": layers}, n) for n in (128, 512))
    return [Axis("slice", "flagship", points, 24, 1.0)]


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 after an error of ours, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer points, about 4 minutes, nothing noted")
    parser.add_argument("--longest", type=int, metavar="N", help="context; default 8192, with --quick 4096")
    parser.add_argument("--slice", action="store_true", help="the flagship's shape instead of growing axes")
    parser.add_argument("--layers", type=int, default=4, help="of the slice; default 4")
    parser.add_argument(
        "--minutes", type=float, help="of measuring; default 12, with --quick 3, with --slice 8"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the checkpoints, kept; default: one that is removed"
    )
    parser.add_argument("--results", type=Path, help="default benchmarks/results, with --quick nowhere")
    parser.add_argument("--images", type=Path, help="default docs/images, with --quick nowhere")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw the last run again")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return exit_code(run, parser.parse_args(arguments))


def run(parsed: argparse.Namespace) -> None:
    """Measure, note, draw, tell. Raises what a user can cause as one of our errors."""
    noted = parsed.results or (None if parsed.quick else HERE / "results")
    images = parsed.images or (None if parsed.quick else HERE.parent / "docs" / "images")
    if parsed.redraw:
        for file in sorted((noted or HERE / "results").glob("*.tsv")):
            draw(last_run(results.read(file)), images or HERE.parent / "docs" / "images")
        return
    longest = parsed.longest or (4096 if parsed.quick else 8192)
    if longest < 512:
        raise RequestError(f"--longest: expected at least 512 tokens, two contexts, got {longest}")
    if parsed.layers < 4:
        raise RequestError(
            f"--layers: expected at least 4, one of them attention (mlx-lm needs it), got {parsed.layers}"
        )
    if find_spec("mlx_lm") is None:
        raise RequestError(f"mlx-lm is not installed here: {sys.executable} -m pip install 'mlx-lm==0.32.2'")
    axes = slice_of(parsed.layers) if parsed.slice else axes_of(parsed.quick, longest)
    minutes = parsed.minutes or (8.0 if parsed.slice else 3.0 if parsed.quick else 12.0)
    header = Header.now(command_line())
    with ExitStack() as stack:
        work = parsed.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moelocal-scale-")))
        measured = [measure(axis, work, 60 * minutes * axis.share) for axis in axes]
    rows = [row for each in measured for row in each.rows(header)]
    if noted is not None:
        results.append(noted, rows)
    if images is not None:
        draw(rows, images)
    show(header, rows)
    if parsed.json:
        print(json.dumps({"header": header.as_dict()} | summary(rows)))


# measuring


@dataclass(frozen=True, slots=True)
class Measured:
    """The runs of an axis: by point and program, one per round."""

    axis: Axis
    configs: dict[Any, ModelConfig]
    identities: dict[Any, Identity]
    runs: dict[tuple[int, str], list[Run]]

    def rates(self, x: int, program: str, figure: str) -> list[float]:
        """Tokens per second, by round."""
        return [run.prefill_rate if figure == "prefill" else run.decode_rate for run in self.runs[x, program]]

    def rows(self, header: Header) -> Iterator[Row]:
        """All figures."""
        peer = f"{THEIRS} {version('mlx-lm')}"
        names = {OURS: OURS, THEIRS: peer, "work": "work"}
        for point in self.axis.points:
            facts = (header, self.identities[point.key], "scale")
            where = f"axis={self.axis.name} context={point.context}"
            if self.axis.name not in ("context", "slice"):
                where += f" {self.axis.name}={point.x}"
            ours, theirs = (self.runs[point.x, program] for program in PROGRAMS)
            same = [a == b for pair in zip(ours, theirs, strict=True)
                    for a, b in zip(*(run.chosen for run in pair), strict=True)]  # fmt: skip
            for figure in FIGURES:
                sides = {program: self.rates(point.x, program, figure) for program in PROGRAMS}
                for program, found in sides.items():
                    yield _row(*facts, names[program], where, figure, "tokens/s", found)
                value = paired(
                    [ours / theirs for ours, theirs in zip(sides[OURS], sides[THEIRS], strict=True)]
                )
                yield Row(
                    *facts, f"{OURS} : {peer}", where, f"{figure} ratio", "ratio", value.value, value.low,
                    value.high, len(ours), f"same greedy choice: {sum(same)} of {len(same)}",
                )  # fmt: skip
                work = self.work(point, figure)
                yield Row(*facts, "work", where, f"{figure} work", "multiply-adds/token", work)
            for program in PROGRAMS:
                runs = self.runs[point.x, program]
                most = [float(run.mlx_nbytes) for run in runs]
                yield _row(*facts, names[program], where, "MLX memory", "bytes", most)
                resident = [float(runs[0].resident_nbytes)]
                yield _row(*facts, names[program], where, "resident memory", "bytes", resident)
        if self.axis.name == "slice":
            return
        model = self.identities[self.axis.points[0].key] if len(self.identities) == 1 else None
        where = f"axis={self.axis.name}"
        for figure in FIGURES:
            for program in (*PROGRAMS, "work"):
                yield self._exponent((header, model, "scale"), names[program], program, where, figure)
            for program in PROGRAMS:
                yield self._exponent(
                    (header, model, "scale"), names[program], program, where, figure, excess=True
                )

    def work(self, point: Point, figure: str) -> float:
        """Multiply-adds per token."""
        config = self.configs[point.key]
        if figure == "prefill":
            return prefill_work(config, point.context)
        return decode_work(config, point.context + self.axis.decode / 2)

    def _exponent(
        self,
        facts: tuple[Header, Identity | None, str],
        name: str,
        program: str,
        where: str,
        figure: str,
        excess: bool = False,
    ) -> Row:
        points = self.axis.points
        x = [float(point.x) for point in points]
        works = [self.work(point, figure) for point in points]
        if program == "work":
            value, count = exponent(x, [[each] for each in works]), len(points)
            value = Estimate(value.value, None, None)  # counted: there is nothing to be unsure of
        else:
            costs = [[1 / rate for rate in self.rates(point.x, program, figure)] for point in points]
            if excess:
                costs = [[cost / work for cost in each] for each, work in zip(costs, works, strict=True)]
            value, count = exponent(x, costs), sum(map(len, costs))
        what = f"{figure} {'excess' if excess else 'cost'}"
        return Row(*facts, name, where, what, "exponent", value.value, value.low, value.high, count)


def _row(
    header: Header, model: Identity | None, benchmark: str, program: str, where: str, name: str, unit: str,
    found: Sequence[float],
) -> Row:  # fmt: skip
    figure = Figure.of(found)
    assert figure is not None
    low, high = (figure.low, figure.high) if figure.count > 1 else (None, None)
    return Row(header, model, benchmark, program, where, name, unit, figure.value, low, high, figure.count)


def measure(axis: Axis, work: Path, seconds: float) -> Measured:
    """Write the checkpoints of an axis, load both programs on each, and take turns for `seconds`."""
    configs, identities, runs = (
        {},
        {},
        {(point.x, program): list[Run]() for point in axis.points for program in PROGRAMS},
    )
    with ExitStack() as stack, _bar(axis) as advance:
        sides: dict[Any, dict[str, Side]] = {}
        for point in axis.points:
            if point.key in sides:
                continue
            raw = synthetic.shape(axis.shape, point.changes)
            name = f"{axis.shape} {' '.join(f'{flag}={n}' for flag, n in point.changes.items())}"
            written = synthetic.write(raw, work / name.replace(" ", "-"), synthetic.recipe_of(None))
            _check_memory(axis, written)
            configs[point.key] = ModelConfig.parse(raw)
            identities[point.key] = Identity.of(written.folder, name)
            sides[point.key] = {p: stack.enter_context(Side(p, written.folder)) for p in PROGRAMS}
            for side in sides[point.key].values():
                side.run(*WARM_UP, seed=0)
        order, began = random.Random(0), time.monotonic()
        points, longest = list(axis.points), 0.0
        for turn in range(MOST_ROUNDS):
            started = time.monotonic()
            if turn >= LEAST_ROUNDS and started - began + longest > seconds:
                break
            for number, point in enumerate(points):
                both = PROGRAMS if (turn + number) % 2 else PROGRAMS[::-1]
                for program in both:
                    seed = 1000 * turn + point.x
                    runs[point.x, program].append(
                        sides[point.key][program].run(point.context, axis.decode, seed)
                    )
                    advance(f"{axis.name} {point.x:,}, round {turn + 1}")
            longest = max(longest, time.monotonic() - started)
            order.shuffle(points)  # the first round goes upwards, for the resident set
    return Measured(axis, configs, identities, runs)


def _check_memory(axis: Axis, written: synthetic.Written) -> None:
    """Raise `RequestError` if two processes with this checkpoint would not fit."""
    # what both took together for the slice on the CPU: not quite five times the weights in their file
    needed, total = 5 * written.nbytes, machine.memory()
    if axis.shape == "flagship" and total and needed > 0.9 * total:
        raise RequestError(
            f"--layers: two programs with {size(written.nbytes)} of weights each need about {size(needed)}, "
            f"this machine has {size(total)}; take fewer layers"
        )


@contextmanager
def _bar(axis: Axis) -> Iterator[Any]:
    """What is being measured, on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{axis.name}: writing and loading", total=None)
        yield lambda text: bar.update(task, description=text)


if __name__ == "__main__":
    sys.exit(main())
