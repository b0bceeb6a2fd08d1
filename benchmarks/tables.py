"""The tables of README.md and docs/*.md that hold measured figures, made from the files of benchmarks/results.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # exits with 1 where a page differs from the results, and says which

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what is between is replaced. Each is of the
last run that has its figures, one table per machine (and model), and names machine, date, versions and command. Names:
`speed`, `scale-slice`, `scale-context`, `scale-experts`, `scale-layers`, `scale-exponents`, `scale-memory`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from scale_report import FIGURES, pairs

from moelocal.bench import results
from moelocal.bench.results import Row
from moelocal.chat.command import exit_code
from moelocal.errors import ConfigError, RequestError
from moelocal.units import size

ROOT: Final = Path(__file__).parents[1]
BEGIN: Final = re.compile(r"^<!-- table: (.*?) -->$", re.MULTILINE)
END: Final = "<!-- end of table -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 after an error of ours, with --check for a page that differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a page differs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--pages", type=Path, default=ROOT, metavar="FOLDER", help="has README.md and docs")
    return exit_code(run, parser.parse_args(arguments))


def run(parsed: argparse.Namespace) -> None:
    """Write, or check. Raises `RequestError` for a page that differs, `ConfigError` for a broken one."""
    rows = [row for file in sorted(parsed.results.glob("*.tsv")) for row in results.read(file)]
    different = []
    for page in pages(parsed.pages):
        text = page.read_text(encoding="utf-8")
        new = filled(text, rows, str(page.relative_to(parsed.pages)))
        if new != text:
            different.append(str(page.relative_to(parsed.pages)))
            if not parsed.check:
                part = page.with_name(f".{os.getpid()}.{page.name}")
                part.write_text(new, encoding="utf-8")
                part.replace(page)
    if parsed.check and different:
        raise RequestError(
            f"{', '.join(different)}: tables differ from {parsed.results}; run python benchmarks/tables.py"
        )
    if not parsed.check:
        print("written: " + ", ".join(different) if different else "all tables are those of the results")


def pages(root: Path) -> list[Path]:
    """README.md and the pages of docs that are there."""
    return [page for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if page.exists()]


def filled(text: str, rows: Sequence[Row], where: str = "page") -> str:
    """A page with its tables made from `rows`. Raises `ConfigError` for a marker that is not closed, names no table, or
    has no rows to make one from."""
    parts, position = [], 0
    for begin in BEGIN.finditer(text):
        if begin.start() < position:
            raise ConfigError(f"{where}: table {begin[1]}: begins before the one in front of it ends")
        end = text.find(END, begin.end())
        if end < 0:
            raise ConfigError(f"{where}: table {begin[1]}: expected {END} behind it")
        if begin[1] not in TABLES:
            raise ConfigError(f"{where}: no table {begin[1]!r}; expected one of {', '.join(TABLES)}")
        wanted, table = TABLES[begin[1]]
        found = ["\n".join(table(run)) for run in _runs(rows, wanted)]
        if not found:
            raise ConfigError(f"{where}: table {begin[1]}: no file of results has figures for it")
        parts += [text[position : begin.end()], "\n", "\n\n".join(found), "\n"]
        position = end
    return "".join((*parts, text[position:]))


# the tables


ROUNDS: Final = 3
"""A run of fewer was cut short, or is somebody's trial: it is on no page."""


def _runs(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> Iterator[list[Row]]:
    """For each machine, and what was measured there, the rows of the last run that has what is wanted."""
    runs: dict[tuple[str, str], list[Row]] = {}
    trials = {
        (row.header.machine, row.header.date)
        for row in rows
        if row.benchmark == "speed" and row.figure == "decode" and row.count < ROUNDS
    }
    for row in rows:
        if wanted(row) and (row.header.machine, row.header.date) not in trials:
            runs.setdefault((row.header.machine, row.header.date), []).append(row)
    last: dict[tuple[str, str], list[Row]] = {}
    for (machine, _), found in sorted(runs.items()):
        # growing axes have many checkpoints, and are one measurement whatever these are
        model = next((row.model.name for row in found if row.model is not None), "")
        last[machine, model if found[0].benchmark == "speed" else ""] = found
    yield from (last[key] for key in sorted(last))


def _source(rows: Sequence[Row]) -> str:
    """Where figures come from: machine, date, versions, command."""
    head = rows[0].header
    found = dict.fromkeys(row.program for row in rows if " : " not in row.program and row.program != "work")
    programs = [f"moelocal {head.moelocal}" if each == "moelocal" else each for each in found]
    return (
        f"{head.chip}, {head.cores} cores, {head.memory / 2**30:.0f} GB, {head.system.split(',')[0]}, MLX {head.mlx} "
        f"on {head.device}; {head.date[:10]}; {', '.join(programs)}: `{head.command}`"
    )


def _table(*columns: str) -> list[str]:
    """The head: the first column to the left, the others to the right."""
    return [_line(columns), _line((":--", *["--:"] * (len(columns) - 1)))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _ends(row: Row, form: Callable[[float], str] = lambda value: f"{value:.2f}") -> str:
    """A value with its interval, where it has one."""
    if row.low is None or row.high is None:
        return form(row.value)
    return f"{form(row.value)} ({form(row.low)} to {form(row.high)})"


def _scale(found: Sequence[Row]) -> Iterator[str]:
    """Speeds and ratios by point of an axis of scale.py."""
    axis = found[0].settings["axis"]
    first = "tokens of context" if axis in ("context", "slice") else axis
    sides = ("moelocal", "mlx-lm", "ratio (95 %)")
    heads = [f"{figure}, {side}" for figure in FIGURES for side in sides]
    if axis == "slice":  # a memory of its own: that of `small` says little about it
        heads += [f"resident memory, {side}" for side in sides[:2]]
    yield from _table(first, *heads)
    cells: dict[str, list[str]] = {}
    for x, figure, ours, theirs, ratio in pairs(found):
        if figure in FIGURES:
            assert ratio is not None
            cells.setdefault(x, []).extend((_number(ours.value), _number(theirs.value), _ends(ratio)))
        elif figure == "resident memory" and axis == "slice":
            cells[x] += [size(int(row.value)) for row in (ours, theirs)]
    for x, each in cells.items():
        yield _line((f"{int(x):,}", *each))
    yield ""
    yield f"{_same(found)} {_source(found)}."


def _same(rows: Sequence[Row]) -> str:
    """How many greedy choices were the same, over all runs."""
    counts = [re.search(r"(\d+) of (\d+)$", row.remark) for row in rows if row.figure == "decode ratio"]
    same, total = (sum(int(each[group]) for each in counts if each) for group in (1, 2))
    rounds = min(row.count for row in rows if row.unit == "ratio")
    return f"Tokens/s, medians of {rounds} rounds or more; {same:,} of {total:,} greedy choices are the same."


def _exponents(found: Sequence[Row]) -> Iterator[str]:
    """Growth of seconds per token, beside that of the work."""
    yield from _table("per token, over", "work", "moelocal", "its excess", "mlx-lm", "its excess")
    for axis in dict.fromkeys(row.settings["axis"] for row in found):
        for figure in ("prefill", "decode"):
            by = {
                (row.program.split()[0], row.figure): _ends(row)
                for row in found
                if row.settings["axis"] == axis
            }
            cells = [by["work", f"{figure} cost"]]
            for program in ("moelocal", "mlx-lm"):
                cells += [by[program, f"{figure} cost"], by[program, f"{figure} excess"]]
            yield _line((f"{figure}, {axis}", *cells))
    yield ""
    yield f"Slopes of logarithms with 95 % intervals. {_source(found)}."


def _memory(found: Sequence[Row]) -> Iterator[str]:
    """The most memory by context."""
    names = ("MLX memory", "resident memory")
    heads = [f"{name}, {side}" for name in names for side in ("moelocal", "mlx-lm")]
    yield from _table("tokens of context", *heads)
    cells: dict[str, list[str]] = {}
    for x, figure, ours, theirs, _ in pairs(found):
        if figure in names:
            cells.setdefault(x, []).extend(f"{row.value / 1e6:,.0f} MB" for row in (ours, theirs))
    for x, each in cells.items():
        yield _line((f"{int(x):,}", *each))
    yield ""
    yield f"The most in a run. {_source(found)}."


def _speed(found: Sequence[Row]) -> Iterator[str]:
    """What `moelocal bench` measured: every program, and ratios of ours, by context."""
    wanted = ("decode", "prefill", "first token", "MLX memory")
    programs = list(dict.fromkeys(row.program for row in found if row.figure in wanted))
    others = list(dict.fromkeys(row.program for row in found if row.figure.endswith(" ratio")))
    yield from _table("context", "figure", *programs, *others)
    loads = {row.program: row for row in found if row.figure == "load"}
    if loads:
        cells = [_amount(loads[name]) if name in loads else "" for name in programs]
        yield _line(("", "load, s", *cells, *("" for _ in others)))
    contexts = sorted({int(row.settings["context"]) for row in found if "context" in row.settings})
    for context in contexts:
        here = [row for row in found if row.settings.get("context") == str(context)]
        for figure in wanted:
            by = {row.program: row for row in here if row.figure == figure}
            ratio = {row.program: row for row in here if row.figure == f"{figure} ratio"}
            if by:
                unit = next(iter(by.values())).unit
                cells = [_amount(by[name]) if name in by else "" for name in programs]
                cells += [_ends(ratio[name]) if name in ratio else "" for name in others]
                label = f"{figure}, {'MB' if unit == 'bytes' else unit}"
                yield _line((f"{context:,}", label, *cells))
    model = next(row.model for row in found if row.model is not None)
    yield ""
    yield (
        f"Medians; MLX's memory leaves out what NumPy holds, which we use on the CPU. {model.name}, "
        f"{model.quantization}. {_source(found)}."
    )


def _amount(row: Row) -> str:
    return f"{row.value / 1e6:,.0f}" if row.unit == "bytes" else _number(row.value)


def _axis(name: str) -> Callable[[Row], bool]:
    return lambda row: row.benchmark == "scale" and row.settings.get("axis") == name


TABLES: Final[dict[str, tuple[Callable[[Row], bool], Callable[[Sequence[Row]], Iterator[str]]]]] = {
    "speed": (lambda row: row.benchmark == "speed", _speed),
    **{f"scale-{name}": (_axis(name), _scale) for name in ("slice", "context", "experts", "layers")},
    "scale-exponents": (lambda row: row.benchmark == "scale" and row.unit == "exponent", _exponents),
    "scale-memory": (_axis("context"), _memory),
}
"""By name: which rows it is made of, and its lines from those of one run."""


if __name__ == "__main__":
    sys.exit(main())
