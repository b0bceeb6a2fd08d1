"""Log files, read as a stream: plain or gzip, JSON lines or one JSON value, files or folders of them.

Memory is bounded by the longest line that is accepted, not by the size of a log.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, cast

from moelocal.cost.fields import Malformed, UnknownShape, clean
from moelocal.cost.shapes import Entry, page_of, parse
from moelocal.errors import RequestError

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".log")
"""Of the files that are read from a folder, each also with .gz behind it. A file named by itself may have any."""
LONGEST: Final = 1 << 26
"""Bytes of a line, and of a .json file that is one value: 64 MB."""
_SHOWN: Final = 5

Progress = Callable[[int, int], None]
"""Called with bytes read, and bytes in all."""
Fate = Literal["read", "empty", "malformed", "unknown"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry stands: the number of its file, its line from 1, its number on the line from 0 (in a page)."""

    file: int
    line: int
    item: int = 0


@dataclass(slots=True)
class Lines:
    """How many lines there were, and what became of them. `items`: of pages, which count as read, those that were not;
    `unread`: all that was not read, as stretches [first, last] of lines of (file, 0), of items of (file, line of the
    page); `shown`: the first few with a reason, as (file, "line 3" or "line 1, item 2", reason); `reject`: is told of
    each, as an object for a line of JSON; `damaged`: files that end too early; `left_out`: files of folders whose names
    are not those of logs."""

    counts: dict[Fate, int] = field(
        default_factory=lambda: {"read": 0, "empty": 0, "malformed": 0, "unknown": 0}
    )
    items: dict[Fate, int] = field(default_factory=lambda: {"malformed": 0, "unknown": 0})
    unread: dict[Fate, dict[tuple[str, int], list[list[int]]]] = field(
        default_factory=lambda: {"empty": {}, "malformed": {}, "unknown": {}}
    )
    shown: dict[Fate, list[tuple[str, str, str]]] = field(
        default_factory=lambda: {"malformed": [], "unknown": []}
    )
    reject: Callable[[Mapping[str, Any]], None] | None = None
    damaged: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def total(self) -> int:
        """All lines."""
        return sum(self.counts.values())

    @property
    def rejected(self) -> int:
        """Lines, and items of pages, that were not read."""
        return self.total - self.counts["read"] + sum(self.items.values())

    def count(self, fate: Fate, file: Path, line: int, reason: str = "", raw: object = None) -> None:
        """One more line; `raw`: it, as bytes or as a JSON value."""
        self.counts[fate] += 1
        if fate != "read":
            self._name(fate, str(file), 0, line, reason, raw)

    def count_item(self, fate: Fate, file: Path, line: int, item: int, reason: str, raw: object) -> None:
        """One more item of a page that was not read; `item` from 0."""
        self.items[fate] += 1
        self._name(fate, str(file), line, item + 1, reason, raw)

    def _name(self, fate: Fate, file: str, page: int, number: int, reason: str, raw: object) -> None:
        stretches = self.unread[fate].setdefault((file, page), [])
        if stretches and stretches[-1][1] == number - 1:
            stretches[-1][1] = number
        else:
            stretches.append([number, number])
        if fate in self.shown and len(self.shown[fate]) < _SHOWN:
            where = f"line {page}, item {number}" if page else f"line {number}"
            self.shown[fate].append((file, where, reason))
        if self.reject:
            place = {"line": page, "item": number} if page else {"line": number}
            self.reject({"rejected": fate, "file": file, **place, "reason": reason, "raw": _text(raw)})


class Logs:
    """The files of a report, in order. Reading them twice gives the same entries at the same places."""

    def __init__(self, files: Sequence[Path], left_out: int = 0) -> None:
        self.files, self.left_out = list(files), left_out

    @classmethod
    def find(cls, names: Sequence[Path]) -> Logs:
        """Files as they are named, and those of folders that are named like logs. Raises `RequestError`."""
        found: dict[Path, Path] = {}  # by its real path, so that no file is counted twice
        left_out = 0
        for name in names:
            try:
                path = name.expanduser()
                if not path.is_dir():
                    if not path.exists():
                        raise RequestError(f"{name}: no such file or folder")
                    if not path.is_file():
                        raise RequestError(f"{name}: expected a file or a folder, got something else")
                    found.setdefault(path.resolve(), path)
                    continue
                for folder, folders, files in os.walk(path):
                    folders.sort()
                    for file in (Path(folder) / each for each in sorted(files)):
                        if file.name.lower().removesuffix(".gz").endswith(SUFFIXES) and file.is_file():
                            found.setdefault(file.resolve(), file)
                        else:
                            left_out += 1
            except (RuntimeError, ValueError, OSError) as error:  # ~nobody, a zero byte, a name too long
                raise RequestError(f"{name}: cannot be read: {error}") from None
        if not found:
            endings = ", ".join(SUFFIXES)
            raise RequestError(
                f"{', '.join(map(str, names))}: no log in it; a folder's files are read if they end in {endings} "
                "(or those with .gz)"
            )
        return cls(list(found.values()), left_out)

    @property
    def nbytes(self) -> int:
        """Of all files as they lie on the disk."""
        return sum(file.stat().st_size for file in self.files if file.is_file())

    def read(self, lines: Lines, progress: Progress | None = None) -> Iterator[tuple[Place, Entry]]:
        """All entries with their places; `lines` counts every line. Raises `RequestError` for a file that cannot be
        opened."""
        lines.left_out = self.left_out
        total, done = self.nbytes, 0
        for index, file in enumerate(self.files):
            try:
                with file.open("rb") as raw:
                    for number, line in _values(file, raw, lines):
                        if progress and number % 256 == 1:
                            progress(done + raw.tell(), total)
                        for item, entry in _entries(line, file, number, lines):
                            yield Place(index, number, item), entry
                    done += raw.tell()
            except OSError as error:
                raise RequestError(f"{file}: cannot be read: {error.strerror or error}") from None
        if progress:
            progress(total, total)

    def reread(self, places: Sequence[Place]) -> dict[Place, Entry]:
        """The entries at some places, by reading the files that hold them again."""
        wanted: dict[int, set[int]] = {}
        for place in places:
            wanted.setdefault(place.file, set()).add(place.line)
        found: dict[Place, Entry] = {}
        for index, numbers in sorted(wanted.items()):
            last, lines = max(numbers), Lines()
            with self.files[index].open("rb") as raw:
                for number, line in _values(self.files[index], raw, lines):
                    if number in numbers:
                        for item, entry in _entries(line, self.files[index], number, lines):
                            found[Place(index, number, item)] = entry
                    if number >= last:
                        break
        return {place: found[place] for place in places if place in found}


_TOO_LONG: Final = object()


def _values(file: Path, raw: BinaryIO, lines: Lines) -> Iterator[tuple[int, Any]]:
    """The lines of a file with their numbers, as bytes; a .json file that is one value as that value, on line 1."""
    magic = raw.read(2)
    raw.seek(0)
    packed = magic == b"\x1f\x8b"
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
    if file.name.lower().removesuffix(".gz").endswith(".json"):
        whole = _whole(stream)
        if whole is not None:
            items = whole if isinstance(whole, list) else [whole]
            yield from ((number, item) for number, item in enumerate(items, 1))
            return
        stream.seek(0)
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST)
                yield number, _TOO_LONG
                continue
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            lines.damaged.append(f"{file}: damaged behind line {number - 1}: {str(error).rstrip('.')}")
            return
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _whole(stream: BinaryIO) -> Any:
    """The one JSON value that a stream is, if it is not long; None if it is something else."""
    try:
        data = stream.read(LONGEST + 1)
        return json.loads(data) if len(data) <= LONGEST else None
    except (ValueError, RecursionError, EOFError, OSError, zlib.error):
        return None


_UNREAD: Final = (Malformed, UnknownShape, ValueError, RecursionError)
"""ValueError: not JSON, not UTF-8, or a number of thousands of digits."""


def _entries(line: Any, file: Path, number: int, lines: Lines) -> list[tuple[int, Entry]]:
    """The entries of a line with their numbers on it, from 0. The line is counted here; a bad item of a page loses
    none of the others."""
    try:
        if line is _TOO_LONG:
            raise Malformed(f"longer than {LONGEST >> 20} MB")
        value = line
        if isinstance(line, bytes):
            if not line.strip():
                lines.count("empty", file, number, "empty", line)
                return []
            value = json.loads(line.decode().rstrip("\r\n"))
        items = page_of(value)
        found = [(0, parse(value))] if items is None else []
    except _UNREAD as error:
        lines.count(_fate(error), file, number, _reason(error), line)
        return []
    lines.count("read", file, number)
    for item, value in enumerate(items or ()):
        try:
            found.append((item, parse(value)))
        except _UNREAD as error:
            lines.count_item(_fate(error), file, number, item, _reason(error), value)
    return found


def _text(raw: object) -> str | None:
    """A line without its end, a byte that is no UTF-8 as half of a surrogate pair (U+DC80 to U+DCFF); a value as JSON;
    None for what is too long to be kept, or nested too deeply."""
    if isinstance(raw, bytes):
        return raw.decode("utf-8", "surrogateescape").rstrip("\r\n")
    try:
        return None if raw is _TOO_LONG else json.dumps(raw)
    except RecursionError:
        return None


def _fate(error: Exception) -> Fate:
    return "unknown" if isinstance(error, UnknownShape) else "malformed"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, character {error.pos + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: byte {error.start + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else clean(str(error))
