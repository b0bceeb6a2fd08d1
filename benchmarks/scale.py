"""How cost grows with context, experts and layers: moelocal beside mlx-lm on random checkpoints.

    python benchmarks/scale.py [--quick] [--minutes N] [--json]       # about 20 minutes on two cores, or 4
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
- Memory: the most that MLX held in a run; the most that the process had resident, with contexts that grow. Both in the
  first round: one run a point, so contexts go on up to --memory where rounds end at --longest. NumPy's memory, which
  our prompt reading uses on the CPU, is in the second alone.

How long all of it will take is said when the first point was measured (benchmarks/forecast.py).

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
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import synthetic
from forecast import LEAST_ROUNDS, MOST_ROUNDS, Axis, Forecast, Point
from growth import decode_work, exponent, prefill_work
from scale_report import FIGURES, draw, last_run, show, summary
from sides import PROGRAMS, Run, Side, require_mlx_lm

from moelocal import machine
from moelocal.bench import results
from moelocal.bench.header import Header, Identity, command_line
from moelocal.bench.results import Row
from moelocal.bench.speed import Figure, paired
from moelocal.chat.command import exit_code
from moelocal.config import ModelConfig
from moelocal.errors import RequestError
from moelocal.evaluate.statistics import Estimate
from moelocal.flags import integer
from moelocal.units import size

HERE: Final = Path(__file__).parent
OURS, THEIRS = PROGRAMS
WARM_UP: Final = (48, 4)
"""Prompt and tokens of a first run, which compiles; rounds begin after it."""


def axes_of(quick: bool, longest: int, memory: int) -> list[Axis]:
    """The default run, or one with fewer and shorter points. Contexts behind `longest` up to `memory` are run once."""
    contexts = [length for length in (256 << i for i in range(16)) if length <= max(longest, memory)]
    experts = (16, 64, 256) if quick else (16, 32, 64, 128, 256, 512)
    layers = (4, 8, 12) if quick else (4, 8, 16, 24)
    length = 256 if quick else 512
    base = {"layers": 4, "experts": 64}
    return [
        Axis("context", "small", tuple(Point(n, base, n, once=n > longest) for n in contexts), 32, 0.5),
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
    parser.add_argument(
        "--longest", type=integer(512), metavar="N", help="context; default 8192, with --quick 4096"
    )
    parser.add_argument(
        "--memory",
        type=integer(0),
        metavar="N",
        help="longest context of a single run; default 4 x --longest, with --quick none; 0: none",
    )
    parser.add_argument("--slice", action="store_true", help="the flagship's shape instead of growing axes")
    parser.add_argument("--layers", type=integer(1), default=4, help="of the slice; default 4")
    parser.add_argument(
        "--minutes", type=_minutes, metavar="N", help="of rounds; default 12, with --quick 3, with --slice 8"
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the checkpoints, kept; default: one that is removed"
    )
    parser.add_argument("--results", type=Path, help="default benchmarks/results, with --quick nowhere")
    parser.add_argument("--images", type=Path, help="default docs/images, with --quick nowhere")
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw the last run again")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return exit_code(run, parser.parse_args(arguments))


def _minutes(text: str) -> float:
    """More than none, and no more than a day."""
    with suppress(ValueError):
        if 0 < float(text) <= 1440:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected minutes, up to 1440, got {text!r}")


def run(parsed: argparse.Namespace) -> None:
    """Measure, note, draw, tell. Raises what a user can cause as one of our errors."""
    noted = parsed.results or (None if parsed.quick else HERE / "results")
    images = parsed.images or (None if parsed.quick else HERE.parent / "docs" / "images")
    if parsed.redraw:
        for file in sorted((noted or HERE / "results").glob("*.tsv")):
            draw(last_run(results.read(file)), images or HERE.parent / "docs" / "images")
        return
    longest = parsed.longest or (4096 if parsed.quick else 8192)
    if parsed.layers < 4:
        raise RequestError(
            f"--layers: expected at least 4, one of them attention (mlx-lm needs it), got {parsed.layers}"
        )
    require_mlx_lm()
    if images is not None and find_spec("matplotlib") is None:
        raise RequestError(f"matplotlib is not installed here: {sys.executable} -m pip install matplotlib")
    memory = longest * (1 if parsed.quick else 4) if parsed.memory is None else parsed.memory
    axes = slice_of(parsed.layers) if parsed.slice else axes_of(parsed.quick, longest, memory)
    minutes = parsed.minutes or (8.0 if parsed.slice else 3.0 if parsed.quick else 12.0)
    if noted is not None:
        results.require_writable(noted)
    header = Header.now(command_line())
    with ExitStack() as stack:
        work = parsed.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moelocal-scale-")))
        forecast = stack.enter_context(Forecast(axes, 60 * minutes))
        measured = [measure(axis, work, forecast) for axis in axes]
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
            for figure in () if point.once else FIGURES:
                sides = {program: self.rates(point.x, program, figure) for program in PROGRAMS}
                for program, rates in sides.items():
                    found = Figure.of(rates)
                    assert found is not None
                    yield Row(
                        *facts, names[program], where, figure, "tokens/s", found.value, found.low, found.high,
                        found.count,
                    )  # fmt: skip
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
                first = self.runs[point.x, program][0]
                yield Row(*facts, names[program], where, "MLX memory", "bytes", first.mlx_nbytes)
                yield Row(*facts, names[program], where, "resident memory", "bytes", first.resident_nbytes)
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
        points = self.axis.timed
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


def measure(axis: Axis, work: Path, forecast: Forecast) -> Measured:
    """Write the checkpoints of an axis, load both programs on each, and take turns while its time lasts."""
    configs, identities, runs = (
        {},
        {},
        {(point.x, program): list[Run]() for point in axis.points for program in PROGRAMS},
    )
    with ExitStack() as stack:
        sides: dict[Any, dict[str, Side]] = {}
        for point in axis.points:
            if point.key in sides:
                continue
            raw = synthetic.shape(axis.shape, point.changes)
            name = f"{axis.shape} {' '.join(f'{flag}={n}' for flag, n in point.changes.items())}"
            forecast.say(f"{name}: writing and loading")
            written = synthetic.write(raw, work / name.replace(" ", "-"), synthetic.recipe_of(None))
            _check_memory(axis, written)
            configs[point.key] = ModelConfig.parse(raw)
            identities[point.key] = Identity.of(written.folder, name)
            sides[point.key] = {p: stack.enter_context(Side(p, written.folder)) for p in PROGRAMS}
            for side in sides[point.key].values():
                side.run(*WARM_UP, seed=0)

        def take(points: Sequence[Point], turn: int) -> float:
            """One run of each program at each point; the seconds that it took."""
            begin = time.monotonic()
            for number, point in enumerate(points):
                for program in PROGRAMS if (turn + number) % 2 else PROGRAMS[::-1]:
                    forecast.say(f"{axis.name} {point.x:,}, round {turn + 1}: {program}")
                    found = sides[point.key][program].run(point.context, axis.decode, 1000 * turn + point.x)
                    runs[point.x, program].append(found)
                forecast.learn(
                    {program: runs[point.x, program][0] for program in PROGRAMS}, configs[point.key]
                )
            return time.monotonic() - begin

        # the first round goes upwards, for the resident set
        spent = longest = take(axis.timed, 0)
        take([point for point in axis.points if point.once], 0)
        order, points = random.Random(0), list(axis.timed)
        for turn in range(1, MOST_ROUNDS):
            if turn >= LEAST_ROUNDS and spent + longest > forecast.seconds(axis):
                break
            order.shuffle(points)
            seconds = take(points, turn)
            spent, longest = spent + seconds, max(longest, seconds)
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


if __name__ == "__main__":
    sys.exit(main())
