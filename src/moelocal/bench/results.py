"""Files of results: one per machine, one row per measured figure, with all that it depends on."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import moelocal
from moelocal.bench.header import Header, Identity, machine_name
from moelocal.errors import ConfigError, RequestError
from moelocal.whole import whole

STOPPED: Final = "stopped early"
"""The remark of a figure that is of fewer runs than were asked for. Such a run is on no page."""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure.

    `model`: None for a figure of no model. `benchmark`: what measured it ("speed"); `program`: what was measured
    ("moelocal", "mlx-lm 0.32.2"); `setting`: on what, as words ("context=1024"); `figure`: of what ("decode"); `unit`;
    `value`: the median, or for a ratio the estimate; `low` and `high`: the least and the largest, for a ratio the ends
    of its 95 % interval, None for a single figure; `count`: of measurements; `remark`: words, `STOPPED` among them if
    somebody ended the run before its end.
    """

    header: Header
    model: Identity | None
    benchmark: str
    program: str
    setting: str
    figure: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int = 1
    remark: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """`setting` by its names."""
        return dict(word.split("=", 1) for word in self.setting.split() if "=" in word)


_HEADER: Final = tuple(field.name for field in fields(Header))
_MODEL: Final = {
    "model": "name",
    "quantization": "quantization",
    "model_nbytes": "nbytes",
    "model_hash": "hash",
}
_OWN: Final = tuple(field.name for field in fields(Row) if field.name not in ("header", "model"))

COLUMNS: Final = (*_HEADER, *_MODEL, *_OWN)
"""Of a file, in this order. What is added is added at the end, and `read` then needs a rule for older files."""

_NUMBERS: Final = ("cores", "memory", "bandwidth", "model_nbytes", "value", "low", "high", "count")


def default_folder() -> Path:
    """Where results go unless told otherwise: benchmarks/results of the checkout that the package lies in; for an
    installed package `$XDG_STATE_HOME/moelocal/results`, or `~/.local/state/moelocal/results`."""
    checkout = Path(moelocal.__file__).parents[2] / "benchmarks"
    if (checkout / "speed.py").is_file():
        return checkout / "results"
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".local/state") / "moelocal" / "results"


def require_writable(folder: Path) -> None:
    """Before minutes of measuring: can rows be kept there? Raises `RequestError`, and `ConfigError` for a file of this
    machine that `append` would refuse."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"--results {folder}: cannot be written; name another folder, or --no-results")
    file = folder / f"{machine_name()}.tsv"
    if file.exists():
        _lines(_text(file), file)


def append(folder: Path, rows: Iterable[Row]) -> Path:
    """Add rows to the file of their machine in `folder`, and give that file. Whoever reads it, or loses power, sees it
    without any of these rows or with all. Raises `RequestError` if it cannot be written, `ConfigError` for a file
    that is no text or has other columns."""
    new = list(rows)
    (machine,) = {row.header.machine for row in new}
    file = folder / f"{machine}.tsv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two that add at once, each keeps what the other added
            old = _text(file) if file.exists() else ""
            _lines(old, file)
            text = old or "\t".join(COLUMNS) + "\n"
            text += "" if text.endswith("\n") else "\n"
            text += "".join("\t".join(_cells(row)) + "\n" for row in new)
            with whole(file) as stream:
                stream.write(text.encode())
        finally:
            os.close(lock)
    except OSError as error:
        raise RequestError(f"{file}: results cannot be written: {error.strerror}") from None
    return file


def read(file: Path) -> list[Row]:
    """All rows of a file, in order. Raises `ConfigError`, which names the line, for what is no file of results."""
    return [_row(cells, f"{file}: line {number}") for number, cells in _lines(_text(file), file)]


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is no text; move the file away, and a new one is begun") from None


def _lines(text: str, file: Path) -> list[tuple[int, list[str]]]:
    """Cells of each line behind the first, with its number. Raises `ConfigError` for other columns."""
    if not text:
        return []
    first, *rest = text.split("\n")
    got = first.split("\t")
    if tuple(got) != COLUMNS:
        unknown = [name for name in got if name not in COLUMNS]
        missing = [name for name in COLUMNS if name not in got]
        what = f"unknown columns {', '.join(unknown)}" if unknown else f"missing columns {', '.join(missing)}"
        if not unknown and not missing:
            what = "columns in another order"
        raise ConfigError(f"{file}: {what}; move the file away, and a new one is begun")
    found = []
    for number, line in enumerate(rest, 2):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(COLUMNS):
            raise ConfigError(f"{file}: line {number}: expected {len(COLUMNS)} cells, got {len(cells)}")
        found.append((number, cells))
    return found


def _cells(row: Row) -> list[str]:
    values: list[Any] = [getattr(row.header, name) for name in _HEADER]
    values += ["" if row.model is None else getattr(row.model, name) for name in _MODEL.values()]
    values += [getattr(row, name) for name in _OWN]
    return [_cell(value) for value in values]


def _cell(value: Any) -> str:
    """A value as text; what would end a cell or a line is a space."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
    return " ".join(str(value).split())


def _row(cells: list[str], where: str) -> Row:
    found: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
    for name in _NUMBERS:
        text = found[name]
        try:
            number = float(text) if text else None
        except ValueError:
            raise ConfigError(f"{where}: {name}: expected a number, got {text!r}") from None
        if number is None and name not in ("low", "high", "model_nbytes"):
            raise ConfigError(f"{where}: {name}: expected a number, got nothing")
        whole = name in ("cores", "memory", "model_nbytes", "count") and number is not None
        found[name] = int(number) if whole and number is not None else number
    header = Header(**{name: found[name] for name in _HEADER})
    model = None
    if found["model"]:
        model = Identity(**{field: found[column] for column, field in _MODEL.items()})
    return Row(header, model, **{name: found[name] for name in _OWN})
