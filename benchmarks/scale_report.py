"""What `scale.py` measured, read from the rows of results: tables for people, one object for programs, pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from sides import PROGRAMS

from moelocal.bench.header import Header
from moelocal.bench.results import Row
from moelocal.errors import RequestError
from moelocal.units import size

OURS, THEIRS = PROGRAMS
FIGURES: Final = ("prefill", "decode")


def last_run(rows: Sequence[Row], axis: str = "context") -> list[Row]:
    """The rows of the latest run that has this axis."""
    dates = [row.header.date for row in rows if row.benchmark == "scale" and row.settings.get("axis") == axis]
    return [row for row in rows if row.benchmark == "scale" and dates and row.header.date == max(dates)]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """For --json."""
    ratios: dict[str, Any] = {}
    exponents: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    equal = total = 0
    for row in rows:
        axis = row.settings["axis"]
        x, side = point_of(row), row.program.split()[0]
        ends = [None if end is None else round(end, 3) for end in (row.low, row.high)]
        if row.unit == "ratio":
            ratios.setdefault(axis, {}).setdefault(x, {})[row.figure.removesuffix(" ratio")] = [
                round(row.value, 3),
                *ends,
            ]
            words = row.remark.split()
            equal, total = equal + int(words[-3]), total + int(words[-1])
        elif row.unit == "exponent":
            exponents.setdefault(axis, {}).setdefault(row.figure, {})[side] = [
                round(row.value, 3),
                *ends,
            ]
        elif row.unit == "bytes" and axis in ("context", "slice"):
            memory.setdefault(row.figure, {}).setdefault(side, {})[x] = int(row.value)
    return {"ratio": ratios, "exponents": exponents, "memory": memory, "agree": round(equal / total, 5)}


def show(header: Header, rows: Sequence[Row]) -> None:
    """Tables for people."""
    console = Console()
    console.print("\n".join(header.as_lines()), highlight=False)
    for axis in dict.fromkeys(row.settings["axis"] for row in rows):
        table = Table(title=f"{axis}: tokens/s, and the most resident", title_justify="left")
        for column in (axis, "figure", "moelocal", "mlx-lm", "ratio", "95 %"):
            table.add_column(column, justify="right" if column != "figure" else "left")
        found = [row for row in rows if row.settings["axis"] == axis]
        for x, figure, mine, other, pair in pairs(found):
            if mine.unit == "bytes":
                table.add_row(x, figure, size(int(mine.value)), size(int(other.value)),
                              f"{mine.value / other.value:.2f}", "")  # fmt: skip
            else:
                assert pair is not None
                table.add_row(x, figure, f"{mine.value:,.1f}", f"{other.value:,.1f}", f"{pair.value:.2f}",
                              f"{pair.low or 0:.2f} .. {pair.high or 0:.2f}")  # fmt: skip
        console.print(table)
        slopes = [row for row in found if row.unit == "exponent"]
        if slopes:
            table = Table(title=f"exponents over {axis}", title_justify="left")
            for column in ("figure", "program", "exponent", "95 %"):
                table.add_column(column)
            for row in slopes:
                ends = "" if row.low is None or row.high is None else f"{row.low:+.3f} .. {row.high:+.3f}"
                table.add_row(row.figure, row.program, f"{row.value:+.3f}", ends)
            console.print(table)


def pairs(rows: Sequence[Row]) -> Iterator[tuple[str, str, Row, Row, Row | None]]:
    """By point and figure: x, figure, ours, theirs, and their ratio (of speeds)."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        x = point_of(row)
        if x and row.program != "work":
            kind = "ratio" if row.unit == "ratio" else row.program.split()[0]
            groups.setdefault((x, row.figure.removesuffix(" ratio")), {})[kind] = row
    for (x, figure), each in groups.items():
        yield x, figure, each[OURS], each[THEIRS], each.get("ratio")


def point_of(row: Row) -> str:
    """x of a row; empty for what is about all points."""
    return row.settings.get("context" if row.settings["axis"] == "slice" else row.settings["axis"], "")


def draw(rows: Sequence[Row], folder: Path) -> None:
    """One picture per axis that has several points in `rows`, and one of memory."""
    for axis in dict.fromkeys(row.settings["axis"] for row in rows):
        if axis == "slice":
            continue
        found = [row for row in rows if row.settings["axis"] == axis]
        head = found[0].header
        title = f"{head.chip}, {head.cores} cores, {head.date[:10]}, MLX {head.mlx} on {head.device}"
        label = {"context": "tokens of context"}.get(axis, axis)
        speeds = {f"{figure}: ms per token": _costs(found, figure) for figure in FIGURES}
        plot(folder / f"scale-{axis}.png", title, label, speeds)
        if axis == "context":
            memory = {f"{figure}, MB": _bytes(found, figure) for figure in ("MLX memory", "resident memory")}
            plot(folder / "scale-memory.png", title, label, memory, linear=True)


def _costs(rows: Sequence[Row], figure: str) -> list[Curve]:
    """Milliseconds per token of each program, and how they would grow with the work from our first point on."""
    curves = []
    for program in dict.fromkeys(row.program for row in rows if row.unit == "tokens/s"):
        found = [row for row in rows if (row.program, row.figure, row.unit) == (program, figure, "tokens/s")]
        x, y = [float(point_of(row)) for row in found], [1000 / row.value for row in found]
        low = [1000 / (row.high or row.value) for row in found]
        curves.append(Curve(program, x, y, low, [1000 / (row.low or row.value) for row in found]))
    work = [row for row in rows if row.figure == f"{figure} work"]
    line = [row.value / work[0].value * curves[0].y[0] for row in work]
    return [*curves, Curve("growth of the work", [float(point_of(row)) for row in work], line, [], [], True)]


def _bytes(rows: Sequence[Row], figure: str) -> list[Curve]:
    curves = []
    for program in dict.fromkeys(row.program for row in rows if row.figure == figure):
        found = [row for row in rows if (row.program, row.figure) == (program, figure)]
        x, y = [float(point_of(row)) for row in found], [row.value / 1e6 for row in found]
        curves.append(Curve(program, x, y, y, y))
    return curves


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a picture: medians with their least and largest."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    dashed: bool = False


def plot(
    file: Path, title: str, x_label: str, panels: Mapping[str, Sequence[Curve]], linear: bool = False
) -> None:
    """Draw one panel per entry (its key says what y is), both axes logarithmic, y not if `linear`. Raises
    `RequestError` if the file cannot be written."""
    # here: a run without pictures needs no matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(5.2 * len(panels), 3.9), layout="constrained")
    figure.suptitle(title, fontsize=9)
    for axes, (y_label, curves) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for curve in curves:
            style: dict[str, Any] = {"color": "gray", "linestyle": "--"} if curve.dashed else {"marker": "o"}
            line = axes.plot(curve.x, curve.y, markersize=4, label=curve.label, **style)[0]
            if not curve.dashed:
                axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.2)
        axes.set_xscale("log")
        ticks = sorted({x for curve in curves for x in curve.x})
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], fontsize=7)
        if not linear:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        else:
            axes.set_ylim(bottom=0)
        axes.minorticks_off()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    part = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=110)
        part.replace(file)
    except OSError as error:
        raise RequestError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
