"""What this machine would take for the same tokens: time, energy, money; and from which volume on it pays."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moelocal.bench import results
from moelocal.bench.results import Row
from moelocal.errors import RequestError

SECONDS_PER_MONTH: Final = 365.25 / 12 * 86_400
_JOULES_PER_KWH: Final = 3.6e6
TOY: Final = 1 << 30
"""Bytes of a model below which its speed says nothing about one that could take over such calls."""
_SHAPE: Final = re.compile(r"[ -][a-z_]+=\d+")
_MANIFEST: Final = "synthetic.json"
"""What gives random weights away: a part of their name, which no name on Hugging Face can hold, or this file."""

DECODE: Final = 30.0
PREFILL: Final = 500.0
WATTS: Final = 60.0
PRICE_PER_KWH: Final = 0.30
YEARS: Final = 3.0
"""Assumptions for what was neither measured nor given. They are round figures to be replaced, measured nowhere."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it is from, in words: "measured: …", "given by --watts", "assumed: …"."""

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class Machine:
    """`prefill`, `decode`: tokens per second; `prefill_watts`, `decode_watts`: while it does so; `price`: dollars per
    kWh; `model`: of the measured speeds; `warning`: what to know about them."""

    prefill: Figure
    decode: Figure
    prefill_watts: Figure
    decode_watts: Figure
    price: Figure
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Local:
    """`prefill_seconds`, `decode_seconds`, `kwh`, `dollars` for some tokens."""

    prefill_seconds: float
    decode_seconds: float
    kwh: float
    dollars: float

    @property
    def seconds(self) -> float:
        """One call after the other."""
        return self.prefill_seconds + self.decode_seconds


def cost(machine: Machine, prompt: int, output: int) -> Local:
    """Every token of the prompts is evaluated, also those that the provider had cached: what a local cache would save
    is not counted."""
    prefill = prompt / machine.prefill.value
    decode = output / machine.decode.value
    joules = prefill * machine.prefill_watts.value + decode * machine.decode_watts.value
    kwh = joules / _JOULES_PER_KWH
    return Local(prefill, decode, kwh, kwh * machine.price.value)


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Calls and tokens per month at which a machine's price over its years equals what the calls save; None if a call
    saves nothing. `most_calls`: per month that it can take one after the other; `months`: until the log's own volume,
    as far as the machine can take it, has paid for it, None if it never does or the volume per month is unknown. All
    per call of the log's average mix."""

    machine_price: float
    years: float
    api_per_call: float
    local_per_call: float
    calls: float | None
    tokens: float | None
    most_calls: float | None
    calls_per_month: float | None
    months: float | None


def break_even(
    machine_price: float,
    years: float,
    api: float,
    local: Local,
    calls: int,
    tokens: int,
    calls_per_month: float | None,
) -> BreakEven:
    """From the sums of some calls. The formula stands in docs/cost.md:
    calls per month = machine price / (12 years) / (API dollars per call - local dollars per call)."""
    per_call, local_per_call = api / calls, local.dollars / calls
    saving = per_call - local_per_call
    needed = machine_price / (12 * years) / saving if saving > 0 else None
    most = SECONDS_PER_MONTH * calls / local.seconds if local.seconds else None
    months = None
    if saving > 0 and calls_per_month:
        months = machine_price / (saving * min(calls_per_month, most or calls_per_month))
    return BreakEven(
        machine_price,
        years,
        per_call,
        local_per_call,
        needed,
        None if needed is None else needed * tokens / calls,
        most,
        calls_per_month,
        months,
    )


def machine(
    rows: Sequence[Row],
    model: str | None,
    prompt: float,
    *,
    prefill: float | None = None,
    decode: float | None = None,
    watts: float | None = None,
    price: float | None = None,
) -> Machine:
    """What is given counts, else what `rows` measured, else the assumptions.

    Of the rows those of `model` are taken (None: of the largest model that was measured, random weights left out), at
    the context nearest to `prompt` tokens, and of those the newest.
    """
    speeds = [row for row in rows if row.benchmark == "speed" and row.program == "moelocal" and row.model]
    if model is not None:
        speeds = [row for row in speeds if row.model and Path(row.model.name).name == Path(model).name]
    elif speeds := [row for row in speeds if row.model and not _is_synthetic(row.model.name)]:
        largest = max(row.model.nbytes for row in speeds if row.model)
        speeds = [row for row in speeds if row.model and row.model.nbytes == largest]
    found_prefill, found_decode = _nearest(speeds, "prefill", prompt), _nearest(speeds, "decode", prompt)
    used = [row for row, flag in ((found_prefill, prefill), (found_decode, decode)) if row and flag is None]
    warning = ""
    if used and used[0].model:
        name, why = used[0].model.name, ""
        if _is_synthetic(name):
            why = "a shape with random weights, which answers nothing"
        elif used[0].model.nbytes < TOY:
            why = "which is far too small to take over such calls"
        if why:
            warning = (
                f"the speeds were measured with {name}, {why}; "
                "measure a real model with moelocal bench, or give --tokens-per-second"
            )
    prefill_figure = _figure(prefill, "--prefill-tokens-per-second", found_prefill, PREFILL)
    decode_figure = _figure(decode, "--tokens-per-second", found_decode, DECODE)
    return Machine(
        prefill_figure,
        decode_figure,
        _watts(watts, _nearest(speeds, "prefill energy", prompt), prefill_figure.value),
        _watts(watts, _nearest(speeds, "decode energy", prompt), decode_figure.value),
        _figure(price, "--price-per-kwh", None, PRICE_PER_KWH),
        warning,
    )


def _is_synthetic(name: str) -> bool:
    """Whether a model in the results is a shape with random weights (benchmarks/synthetic.py): by its name, such as
    "small layers=4 experts=64", or by the manifest in its folder."""
    if _SHAPE.search(Path(name).name):
        return True
    try:
        return (Path(name).expanduser() / _MANIFEST).is_file()
    except (OSError, RuntimeError, ValueError):  # ~nobody, a zero byte, a name too long
        return False


def measured(folder: Path, slug: str) -> list[Row]:
    """The figures of this machine; none if it has no file of results. Raises `ConfigError` for a damaged one."""
    file = folder / f"{slug}.tsv"
    return results.read(file) if file.is_file() else []


def number(least: float, *, zero: bool = False) -> Callable[[str], float]:
    """An argument that is a finite number above `least`, or `least` itself with `zero`."""

    def read(text: str) -> float:
        value = float(text)
        if not (least <= value < 1e12) or (value == least and not zero):
            raise ValueError
        return value

    read.__name__ = "number above 0" if not zero else "number from 0"  # argparse names it in its message
    return read


def _nearest(rows: Sequence[Row], figure: str, prompt: float) -> Row | None:
    fitting = [row for row in rows if row.figure == figure and row.value > 0]
    return max(fitting, key=lambda row: (-abs(_context(row) - prompt), row.header.date), default=None)


def _context(row: Row) -> float:
    text = row.settings.get("context", "0")
    return float(text) if text.isdecimal() else 0.0


def _figure(given: float | None, flag: str, row: Row | None, assumed: float) -> Figure:
    if given is not None:
        return Figure(given, f"given by {flag}")
    if row is not None:
        return Figure(row.value, _origin(row))
    return Figure(assumed, f"assumed, not measured; {flag} sets it")


def _watts(given: float | None, row: Row | None, speed: float) -> Figure:
    """Measured is energy per token: joules times tokens per second are watts."""
    if given is None and row is not None:
        if row.unit != "J/token":
            raise RequestError(f"results: {row.figure}: expected the unit J/token, got {row.unit}")
        return Figure(row.value * speed, _origin(row))
    return _figure(given, "--watts", None, WATTS)


def _origin(row: Row) -> str:
    name = Path(row.model.name).name if row.model else "no model"
    return f"measured: {name}, {row.setting}, {row.header.chip}, {row.header.date[:10]}"
