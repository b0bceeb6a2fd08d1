"""Which kernels have earned their place on this machine: what "auto" asks for a Metal form.

`moelocal doctor --tune` times kernels against stock MLX and writes a record, one readable JSON file per chip, version
of macOS and version of MLX. With a record an op takes its kernel for the shapes where it won. For shapes without an
entry it takes a kernel in `PROVEN`, and stock MLX otherwise, so that nobody is slower than with stock MLX.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from moelocal import machine
from moelocal.errors import ConfigError
from moelocal.metal import FOLDER

PROVEN: Final[frozenset[str]] = frozenset()
"""Ops whose kernel was seen to be right and faster on real hardware, as kernels/README.md says."""

_FORMAT: Final = "moelocal kernel choices, 1"


def shapes(*args: object, **kwargs: object) -> tuple[Hashable, ...]:
    """What a choice depends on unless the op says otherwise: dtype and shape of every array among the arguments, those
    of weights included, and what else there is but fractions."""
    return tuple(_shape(value) for value in (*args, *kwargs.values()))


def _shape(value: object) -> Hashable:
    if isinstance(value, mx.array):
        return value.dtype, value.shape
    if isinstance(value, float):
        return None
    inner = getattr(value, "arrays", value)
    if isinstance(inner, list | tuple):
        return tuple(_shape(member) for member in inner)
    return value if isinstance(value, Hashable) else None


def size_class(size: int) -> int:
    """The power of two from which a size counts, 4096 for 5000: sizes that grow, like a context, share an entry."""
    return 1 << (size.bit_length() - 1) if size else 0


def words(key: object) -> str:
    """A key as it stands in the record: "bfloat16[1,1,2048] float32[2048] -"."""
    if isinstance(key, tuple):
        if _is_array(key):
            return f"{words(key[0])}[{','.join(map(str, key[1]))}]"
        nested = ((words(k), isinstance(k, tuple) and not _is_array(k)) for k in key)
        return " ".join(f"({text})" if inner else text for text, inner in nested)
    return "-" if key is None else str(key).removeprefix("mlx.core.")


def _is_array(key: tuple[Any, ...]) -> bool:
    return len(key) == 2 and isinstance(key[0], mx.Dtype) and isinstance(key[1], tuple)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a record holds for. `code` is a digest of the kernels and ops: other code needs another measurement."""

    chip: str
    macos: str
    mlx: str
    code: str

    @classmethod
    def here(cls) -> Stamp:
        """Of this machine and this version."""
        digest = hashlib.sha256()
        for file in sorted((*FOLDER.glob("*.metal"), *Path(__file__).parent.glob("*.py"))):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        version: str = mx.__version__  # type: ignore[attr-defined]
        return cls(machine.chip(), machine.macos(), version, digest.hexdigest()[:16])

    def __str__(self) -> str:
        return f"{self.chip or 'unknown chip'}, macOS {self.macos or '-'}, MLX {self.mlx}"

    @property
    def file(self) -> Path:
        """Where the record for this stamp lies."""
        name = re.sub(r"[^a-z0-9.]+", "-", str(self).lower())
        return machine.cache_folder() / "choices" / f"{name}.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """One measurement: `op` for arguments of `shapes` (a key in words), called `case` in tables. `form` is what won,
    "metal" or "portable"; `ratio` the median of portable time over metal time of each pair; `error` the largest
    difference from the reference relative to its largest value, `bound` what was allowed. A wrong kernel has no times,
    one that did not run has no error.
    """

    op: str
    case: str
    shapes: str
    form: str
    ratio: float | None
    portable_seconds: float | None
    metal_seconds: float | None
    error: float | None
    bound: float


def read(stamp: Stamp) -> tuple[Entry, ...] | None:
    """The entries recorded for `stamp`; None if there are none, or they were made with other code.

    Raises `ConfigError` if the file cannot be read, is no record, or is the record of another machine.
    """
    try:
        raw = json.loads(stamp.file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{stamp.file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{stamp.file}: not valid JSON") from None
    if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
        raise ConfigError(f"{stamp.file}: no record of kernel choices ({_FORMAT!r} is missing)")
    names = ("chip", "macos", "mlx", "code")
    found = Stamp(*(str(raw.get(name)) for name in names))
    if str(found) != str(stamp):
        raise ConfigError(f"{stamp.file}: the record of another machine ({found}); this one is {stamp}")
    entries = raw.get("entries")
    if not isinstance(entries, list):
        raise ConfigError(f"{stamp.file}: entries: expected a list, got {entries!r}")
    read_ones = tuple(_entry(stamp.file, index, entry) for index, entry in enumerate(entries))
    return read_ones if found.code == stamp.code else None


_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    **dict.fromkeys(("op", "case", "shapes", "form"), (str,)),
    **dict.fromkeys(("ratio", "portable_seconds", "metal_seconds", "error"), (float, int, type(None))),
    "bound": (float, int),
}


def _entry(file: Path, index: int, raw: Any) -> Entry:
    if not isinstance(raw, dict) or set(raw) != set(_KINDS):
        raise ConfigError(f"{file}: entry {index + 1}: expected the keys {', '.join(_KINDS)}")
    for name, kinds in _KINDS.items():
        if not isinstance(raw[name], kinds) or isinstance(raw[name], bool):
            raise ConfigError(f"{file}: entry {index + 1}: {name}: unexpected value {raw[name]!r}")
    if raw["form"] not in ("metal", "portable"):
        raise ConfigError(f"{file}: entry {index + 1}: form: expected metal or portable, got {raw['form']!r}")
    return Entry(**raw)


def write(stamp: Stamp, entries: Iterable[Entry]) -> None:
    """Write the record, whole or not at all. Raises `ConfigError` if the folder or the file cannot be written."""
    record = {"format": _FORMAT, **asdict(stamp), "entries": [asdict(entry) for entry in entries]}
    folder = stamp.file.parent
    part = stamp.file.with_suffix(f".{os.getpid()}.part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(record, indent=1) + "\n")
        part.replace(stamp.file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{stamp.file}: cannot be written: {error.strerror}") from None


class Choice:
    """The choices in effect. `ops` are the names of those that take a kernel for any shape at all. A kernel that was
    wrong for one shape is taken for none."""

    def __init__(self, entries: Iterable[Entry] = (), proven: frozenset[str] = PROVEN) -> None:
        self.entries = tuple(entries)
        self.wrong = frozenset(entry.op for entry in self.entries if entry.ratio is None)
        self.proven = proven - self.wrong
        self.ops = (self.proven | {entry.op for entry in self.entries if entry.form == "metal"}) - self.wrong
        self._recorded = {(entry.op, entry.shapes): entry.form == "metal" for entry in self.entries}
        self._known: dict[tuple[str, Hashable], bool] = {}

    def takes_metal(self, op: str, key: Hashable) -> bool:
        """Whether `op` runs its kernel for arguments of this key."""
        known = self._known.get((op, key))
        if known is None:
            if len(self._known) > 10_000:  # prompts of every length would pile up
                self._known.clear()
            known = op in self.ops and self._recorded.get((op, words(key)), op in self.proven)
            self._known[op, key] = known
        return known


_current: Choice | None = None


def current() -> Choice:
    """The choices of this machine, read on first use. A damaged record is reported in one line and ignored."""
    global _current
    if _current is None:
        entries = None
        try:
            entries = read(Stamp.here())
        except ConfigError as error:
            import logging  # here: every import of moelocal would pay for it

            logging.getLogger("moelocal").warning(
                "moelocal: %s; ignored, `moelocal doctor --tune` writes a new one", error
            )
        _current = Choice(entries or ())
    return _current


@contextmanager
def using(choice: Choice | None) -> Iterator[None]:
    """Take these choices inside the block; None reads the record again."""
    global _current
    before, _current = _current, choice
    try:
        yield
    finally:
        _current = before
