"""Prices of tokens: a table with dates and sources, which users can replace."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final

from moelocal.cost.fields import Tokens
from moelocal.errors import RequestError

BUILT_IN: Final = Path(__file__).with_name("prices.toml")

_VERSION: Final = re.compile(
    r"(?:[-@:]?(?:\d{4}-\d{2}-\d{2}|\d{8}|\d{4}|latest|v\d+(?::\d+)?)){0,3}(?:\[1m\])?", re.IGNORECASE
)
"""What may follow a model's name and still be that model: dates, -latest, -0613, @20250929, -v1:0, [1m]."""

_NUMBERS: Final = ("input", "cached", "written", "written_hour", "output", "batch")
_FIELDS: Final = ("provider", "models", "from", "above", *_NUMBERS, "source", "read", "remark")


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens of some models, from a date on (None: always), for prompts of more than `above`
    tokens. `cached`, `written`, `written_hour`: None where the source has no such price. `batch`: the factor for batch
    calls, None where the source has none. `read`: when the source was read."""

    provider: str
    models: tuple[str, ...]
    input: float
    output: float
    source: str
    read: date
    since: date | None = None
    above: int = 0
    cached: float | None = None
    written: float | None = None
    written_hour: float | None = None
    batch: float | None = None
    remark: str = ""

    def cost(self, tokens: Tokens, *, batch: bool = False) -> float:
        """Dollars. What has no price of its own costs what input costs, and `assumes` says so."""
        rates = (self.cached, self.written, self.written_hour)
        counts = (tokens.cached, tokens.written, tokens.written_hour)
        total = tokens.fresh * self.input + tokens.output * self.output
        for count, rate in zip(counts, rates, strict=True):
            total += count * (self.input if rate is None else rate)
        return total / 1e6 * (self.batch if batch and self.batch is not None else 1.0)

    def assumes(self, tokens: Tokens, tier: str) -> str:
        """What of a call was priced without a price of its own, in words; empty for nothing."""
        if tier == "batch" and self.batch is None:
            return "of a batch, priced as standard"
        if tier not in ("standard", "batch"):
            return f"of tier {tier}, priced as standard"
        if tokens.cached and self.cached is None:
            return "cached input, priced as input"
        if (tokens.written and self.written is None) or (tokens.written_hour and self.written_hour is None):
            return "cache writes, priced as input"
        return ""


@dataclass(slots=True)
class Prices:
    """A table. `file`: where it is from; `aside`: prefixes of names, as gateways put them there, that mean nothing."""

    file: Path
    entries: Sequence[Price]
    aside: Sequence[str] = ()
    _found: dict[str, tuple[Price, ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path | None = None) -> Prices:
        """The table of a file; else the user's own, if there is one; else the built-in one. Raises `RequestError`."""
        chosen = file or (user_file() if user_file().is_file() else BUILT_IN)
        try:
            content = tomllib.loads(chosen.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RequestError(f"{chosen}: no price table can be read: {reason}") from None
        unknown = sorted(set(content) - {"price", "aside"})
        if unknown:
            raise RequestError(f"{chosen}: unknown key {unknown[0]!r}; expected [[price]] and aside")
        aside = content.get("aside", [])
        if not isinstance(aside, list) or not all(isinstance(each, str) for each in aside):
            raise RequestError(f"{chosen}: aside: expected a list of strings")
        tables = content.get("price", [])
        if not isinstance(tables, list):
            raise RequestError(f"{chosen}: price: expected [[price]], several tables")
        prices = [_price(table, f"{chosen}: price {number}") for number, table in enumerate(tables, 1)]
        return cls(chosen, prices, aside)

    def find(self, model: str, when: date | None, prompt: int) -> Price | None:
        """The price of a model on a day (None: the newest) for a prompt of so many tokens; None if the table has none.

        The longest name decides that is the beginning of the model's; what follows must be a version, or anything for
        a name that ends in *. Of its entries the newest counts that is not newer than the day, and of those the one of
        the longest prompts that the prompt is longer than.
        """
        entries = self._found.get(model)
        if entries is None:
            entries = self._found[model] = self._named(model)
        fitting = [
            each
            for each in entries
            if prompt > each.above or each.above == 0
            if when is None or each.since is None or each.since <= when
        ]
        return max(fitting, key=lambda each: (each.since or date.min, each.above), default=None)

    def _named(self, model: str) -> tuple[Price, ...]:
        bare = model.lower()
        for prefix in self.aside:
            bare = bare.removeprefix(prefix.lower())
        best, found = -1, []
        for entry in self.entries:
            for name in entry.models:
                length = _matches(name.lower(), bare)
                if length > best:
                    best, found = length, [entry]
                elif length == best >= 0 and entry not in found:
                    found.append(entry)
        return tuple(found)


def _matches(name: str, model: str) -> int:
    """Characters of `model` that a name of the table accounts for; -1 if it is another model."""
    if name.endswith("*"):
        return len(name) - 1 if model.startswith(name[:-1]) else -1
    if not model.startswith(name) or not _VERSION.fullmatch(model, len(name)):
        return -1
    return len(name)


def _price(table: Mapping[str, Any], where: str) -> Price:
    for key in table:
        if key not in _FIELDS:
            raise RequestError(f"{where}: unknown key {key!r}; expected {', '.join(_FIELDS)}")
    for key in ("provider", "models", "input", "output", "source", "read"):
        if key not in table:
            raise RequestError(f"{where}: {key} is missing")
    models = table["models"]
    if (
        not isinstance(models, list)
        or not models
        or not all(isinstance(each, str) and each for each in models)
    ):
        raise RequestError(f"{where}: models: expected a list of names")
    where = f"{where} ({models[0]})"
    for key in _NUMBERS:
        value = table.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise RequestError(f"{where}: {key}: expected a number of dollars, got {value!r}")
    for key in ("provider", "source", "remark"):
        if not isinstance(table.get(key, ""), str):
            raise RequestError(f"{where}: {key}: expected a string, got {table[key]!r}")
    for key in ("read", "from"):
        if key in table and (type(table[key]) is not date):
            raise RequestError(f"{where}: {key}: expected a date such as 2026-11-21, got {table[key]!r}")
    above = table.get("above", 0)
    if isinstance(above, bool) or not isinstance(above, int) or above < 0:
        raise RequestError(f"{where}: above: expected a number of tokens, got {above!r}")
    numbers = {key: float(table[key]) for key in _NUMBERS if key in table}
    return Price(
        provider=table["provider"],
        models=tuple(models),
        source=table["source"],
        read=table["read"],
        since=table.get("from"),
        above=above,
        remark=table.get("remark", ""),
        **numbers,
    )


def user_file() -> Path:
    """Where a user's own table lies: `$XDG_CONFIG_HOME/moelocal/prices.toml`, or in `~/.config`."""
    base = Path(os.environ.get("XDG_CONFIG_HOME", ""))  # the XDG rules: a relative path is to be ignored
    if not base.is_absolute():
        with suppress(RuntimeError):  # a user without a home
            base = Path.home() / ".config"
    return base / "moelocal" / "prices.toml"


def copy_table(to: Path) -> Path:
    """Put the built-in table there, to be edited. Raises `RequestError` rather than overwrite a file."""
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("x", encoding="utf-8") as stream:
            stream.write(BUILT_IN.read_text(encoding="utf-8"))
    except FileExistsError:
        raise RequestError(f"{to}: is there already; edit it, or move it away for a new copy") from None
    except OSError as error:
        raise RequestError(f"{to}: cannot be written: {error.strerror}") from None
    return to
