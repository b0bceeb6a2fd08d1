"""The tables of README.md and docs/*.md that hold measured figures, made from the files of benchmarks/results.

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # exits with 1 where a page differs from the results, and says which

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what is between is replaced. It is of the
last complete run that has its figures, per machine (and model), Macs first, with machine, date, versions and command.
Names: `speed`, `scale-slice`, `scale-context`, `scale-experts`, `scale-layers`, `scale-exponents`, `scale-memory`,
`unpacking`, `predicted`, `cost`. Each has a place on some page.
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
from moelocal.bench.results import STOPPED, Row
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
    rows = rows_of(parsed.results)
    different, seen = [], set[str]()
    for page in pages(parsed.pages):
        text = page.read_text(encoding="utf-8")
        seen.update(BEGIN.findall(text))
        new = filled(text, rows, str(page.relative_to(parsed.pages)))
        if new != text:
            different.append(str(page.relative_to(parsed.pages)))
            if not parsed.check:
                part = page.with_name(f".{os.getpid()}.{page.name}")
                part.write_text(new, encoding="utf-8")
                part.replace(page)
    if missing := [name for name in TABLES if name not in seen]:
        raise ConfigError(
            f"no page has the table {missing[0]}; write {_marker(missing[0])} and {END} where it belongs, each on a "
            "line of its own, and run python benchmarks/tables.py"
        )
    if parsed.check and different:
        raise RequestError(
            f"{', '.join(different)}: tables differ from {parsed.results}; run python benchmarks/tables.py"
        )
    if not parsed.check:
        print("written: " + ", ".join(different) if different else "all tables are those of the results")


def pages(root: Path) -> list[Path]:
    """README.md and the pages of docs that are there."""
    return [page for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))) if page.exists()]


def rows_of(folder: Path) -> list[Row]:
    """Of all files in a folder of results. Raises `ConfigError` for a file that is none, or is another machine's."""
    found = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.suffix == ".png":
            continue
        if file.suffix != ".tsv":
            raise ConfigError(f"{file}: expected results (MACHINE.tsv) and plots (.png) here; move it away")
        rows = results.read(file)
        for other in {row.header.machine for row in rows} - {file.stem}:
            raise ConfigError(
                f"{file}: holds figures of {other}; move these lines to {other}.tsv, or the file away"
            )
        found += rows
    return found


def filled(text: str, rows: Sequence[Row], where: str = "page") -> str:
    """A page with its tables made from `rows`. Raises `ConfigError` for a marker that has no other one, names no table,
    or has no rows to make one from; and for lines of a table outside of markers."""
    parts, outside, position = [], [], 0
    for begin in BEGIN.finditer(text):
        if begin.start() < position:
            raise ConfigError(f"{where}: table {begin[1]}: begins before the one in front of it ends")
        end = text.find(END, begin.end())
        if end < 0:
            raise ConfigError(f"{where}: table {begin[1]}: expected {END} behind it")
        if begin[1] not in TABLES:
            raise ConfigError(f"{where}: no table {begin[1]!r}; expected one of {', '.join(TABLES)}")
        found = made(begin[1], rows)
        if not found:
            raise ConfigError(f"{where}: table {begin[1]}: no file of results has figures for it")
        outside.append(text[position : begin.start()])
        parts += [text[position : begin.end()], "\n", found, "\n"]
        position = end
    outside.append(text[position:])
    generated = {line: name for name in TABLES for line in made(name, rows).splitlines() if "--:" not in line}
    for line in "".join(outside).replace(END, "", len(outside) - 1).splitlines():
        if line == END or (line and line in generated):
            name = generated.get(line, "NAME")
            raise ConfigError(
                f"{where}: expected {_marker(name)} in front of a table and {END} behind it; one of them is missing "
                f"around: {line[:60]}"
            )
    return "".join((*parts, text[position:]))


def made(name: str, rows: Sequence[Row]) -> str:
    """A table as often as there are machines (and models) with figures for it; with headings if these are several."""
    wanted, table = TABLES[name]
    found = list(_runs(rows, wanted))
    parts = []
    for run in found:
        model = run[0].model.name if run[0].benchmark == "speed" and run[0].model else ""
        title = f"**{', '.join(filter(None, (run[0].header.words, model)))}**"
        parts.append("\n".join((*((title, "") if len(found) > 1 else ()), *table(run))))
    return "\n\n".join(parts)


def _marker(name: str) -> str:
    return f"<!-- table: {name} -->"


# the tables


ROUNDS: Final = 3
"""A run of fewer is somebody's trial: it is on no page."""


def _runs(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> Iterator[list[Row]]:
    """For each machine, and what was measured there, the rows of the last complete run that has what is wanted."""
    runs: dict[tuple[str, str], list[Row]] = {}
    partial = {
        (row.header.machine, row.header.date)
        for row in rows
        if STOPPED in row.remark or (row.figure == "decode" and row.count < ROUNDS)
    }
    for row in rows:
        if wanted(row) and (row.header.machine, row.header.date) not in partial:
            runs.setdefault((row.header.machine, row.header.date), []).append(row)
    last: dict[tuple[bool, str, str], list[Row]] = {}
    for (machine, _), found in sorted(runs.items()):
        # growing axes have many checkpoints, and are one measurement whatever these are
        model = next((row.model.name for row in found if row.model is not None), "")
        other = not found[0].header.system.startswith("macOS")
        last[other, machine, model if found[0].benchmark == "speed" else ""] = found
    yield from (last[key] for key in sorted(last))


def _source(rows: Sequence[Row]) -> str:
    """Where figures come from: machine, date, versions, command."""
    head = rows[0].header
    others = ("work", "chip", "stock MLX")  # which did not run
    found = dict.fromkeys(
        row.program for row in rows if " : " not in row.program and row.program not in others
    )
    programs = [f"moelocal {head.moelocal}" if each == "moelocal" else each for each in found]
    return (
        f"{head.words}, {head.system.split(',')[0]}, MLX {head.mlx} on {head.device}; {head.date[:10]}; "
        f"{', '.join(programs)}: `{head.command}`"
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
    weights = {
        row.settings[axis]: size(row.model.nbytes) for row in found if axis in row.settings and row.model
    }
    weights = weights if axis in ("experts", "layers") else {}
    if axis == "slice":  # a memory of its own: that of `small` says little about it
        heads += [f"resident memory, {side}" for side in sides[:2]]
    yield from _table(first, *(["weights"] if weights else []), *heads)
    cells: dict[str, list[str]] = {x: [each] for x, each in weights.items()}
    for x, figure, ours, theirs, ratio in pairs(found):
        if figure in FIGURES:
            assert ratio is not None
            cells.setdefault(x, []).extend((_number(ours.value), _number(theirs.value), _ends(ratio)))
        elif figure == "resident memory" and axis == "slice":
            cells[x] += [size(int(row.value)) for row in (ours, theirs)]
    for x, each in cells.items():
        yield _line((f"{int(x):,}", *each))
    yield ""
    model = found[0].model
    about = f" {model.name}, {model.quantization}, {size(model.nbytes)}." if model and not weights else ""
    yield f"{_same(found)}{about} {_source(found)}."


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
    faster = [
        f"{row.figure.removesuffix(' excess')} over {row.settings['axis']} ({row.program.split()[0]})"
        for row in found
        if row.figure.endswith(" excess") and row.low is not None and row.low > 0
    ]
    yield ""
    yield f"Grows faster than its work: {', '.join(faster) or 'nothing, as far as these points show'}."
    yield f"Slopes of logarithms with 95 % intervals. {_source(found)}."


def _memory(found: Sequence[Row]) -> Iterator[str]:
    """The most memory by context."""
    names = ("MLX memory", "resident memory")
    heads = [f"{name}, {side}" for name in names for side in ("moelocal", "mlx-lm")]
    yield from _table("tokens of context", "runs", *heads)
    cells: dict[str, list[str]] = {}
    for x, figure, ours, theirs, _ in pairs(found):
        if figure in names:
            cells.setdefault(x, [str(ours.count)]).extend(
                f"{row.value / 1e6:,.0f} MB" for row in (ours, theirs)
            )
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


def _unpacking(found: Sequence[Row]) -> Iterator[str]:
    """Seconds of a layer, and how much of these experts are unpacked."""
    tokens = found[0].settings["tokens"]
    yield from _table(
        "experts", "tokens for each expert", "layer, ms", "in turn, ms", "of it unpacking, ms", "share"
    )
    for layer in (row for row in found if row.figure == "seconds"):
        count = int(layer.settings["experts"])
        each = int(tokens) * int(layer.settings["per_token"]) / count
        by = {row.figure: row.value for row in found if row.setting == layer.setting}
        times = [_number(1e3 * by[name]) for name in ("seconds", "seconds_in_turn", "unpacking")]
        yield _line((str(count), f"{each:g}", *times, f"{by['unpacking'] / by['seconds_in_turn']:.0%}"))
    yield ""
    yield f"A prompt of {tokens} tokens, medians of {found[0].count} rounds. {_source(found)}."


def _predicted(found: Sequence[Row]) -> Iterator[str]:
    """Counts of a token, and what the two-term model makes of them on each chip."""
    counts = {(row.program.split()[0], row.figure): row.value for row in found if "chip" not in row.settings}
    sides = [side for side in ("moelocal", "mlx-lm") if (side, "launches") in counts]
    heads = (
        *(f"{side}, PREDICTED" for side in sides),
        "ours, of peak bandwidth",
        "stock MLX, published by others",
    )
    yield from _table("chip", *heads)
    chips: dict[str, dict[str, float]] = {}
    for row in found:
        if "chip" in row.settings:
            chips.setdefault(row.settings["chip"].replace("-", " "), {})[row.program.split()[0]] = row.value
    for chip, by in chips.items():
        share = by["moelocal"] * counts["moelocal", "nbytes"] / by["chip"]
        published = _number(by["stock"]) if "stock" in by else ""
        yield _line((chip, *(f"{by[side]:.0f}" for side in sides), f"{share:.0%}", published))
    each = "; ".join(
        f"{side}: {counts[side, 'launches']:,.0f} launches, {counts[side, 'nbytes'] / 1e6:,.0f} MB"
        for side in sides
    )
    yield ""
    yield f"Tokens/s of decoding. Counted for one token, {each}. {_source(found)}."


def _amount(row: Row) -> str:
    return f"{row.value / 1e6:,.0f}" if row.unit == "bytes" else _number(row.value)


def _cost(found: Sequence[Row]) -> Iterator[str]:
    """What cost.py found in its log, and how long that took."""
    yield from _table(f"a log of {int(found[0].settings['lines']):,} lines", "figure")
    for row in found:
        figure = _ends(row, lambda value: f"{value:,.0f}" if value.is_integer() else _number(value))
        yield _line((f"{row.figure}, {row.unit}", figure))
    yield ""
    remarks = dict.fromkeys(row.remark for row in found if row.remark)
    yield " ".join(f"{each}." for each in (*remarks, _source(found)))


def _axis(name: str) -> Callable[[Row], bool]:
    return lambda row: row.benchmark == "scale" and row.settings.get("axis") == name


TABLES: Final[dict[str, tuple[Callable[[Row], bool], Callable[[Sequence[Row]], Iterator[str]]]]] = {
    "speed": (lambda row: row.benchmark == "speed", _speed),
    **{f"scale-{name}": (_axis(name), _scale) for name in ("slice", "context", "experts", "layers")},
    "scale-exponents": (lambda row: row.benchmark == "scale" and row.unit == "exponent", _exponents),
    "scale-memory": (_axis("context"), _memory),
    "predicted": (lambda row: row.benchmark == "budget", _predicted),
    "unpacking": (lambda row: row.benchmark == "unpacking", _unpacking),
    "cost": (lambda row: row.benchmark == "cost" and row.settings.get("lines") == "10000", _cost),
}
"""By name: which rows it is made of, and its lines from those of one run."""


if __name__ == "__main__":
    sys.exit(main())
