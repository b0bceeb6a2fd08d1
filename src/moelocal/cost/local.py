"""What this machine would take for the same tokens: time, energy, money; and from which volume on it pays."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from moelocal.bench import results
from moelocal.bench.header import Identity
from moelocal.bench.results import Row
from moelocal.errors import RequestError

SECONDS_PER_MONTH: Final = 365.25 / 12 * 86_400
_JOULES_PER_KWH: Final = 3.6e6
TOY: Final = 1 << 30
"""Bytes of a model below which its speed says nothing about one that could take over such calls."""
RANDOM: Final = "random weights"
"""In the quantization of weights of benchmarks/synthetic.py, which have a speed and answer nothing."""

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
    kWh; `warning`: what to know about the speeds."""

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

    Of the rows those of `model` are taken (None: of the largest real model that was measured, neither a toy nor random
    weights), at the context nearest to `prompt` tokens, and of those the newest.
    """
    speeds = [row for row in rows if row.benchmark == "speed" and row.program == "moelocal" and row.model]
    models = dict.fromkeys(row.model for row in speeds if row.model)
    if model is not None:
        chosen = {each for each in models if Path(each.name).name == Path(model).name}
    else:
        real = [each for each in models if not _unreal(each)]
        chosen = {each for each in real if each.nbytes == max(each.nbytes for each in real)}
    speeds = [row for row in speeds if row.model in chosen]
    found_prefill, found_decode = _nearest(speeds, "prefill", prompt), _nearest(speeds, "decode", prompt)
    used = [row for row, flag in ((found_prefill, prefill), (found_decode, decode)) if row and flag is None]
    warning = ""
    if used and used[0].model and (why := _unreal(used[0].model)):
        warning = (
            f"the speeds were measured with {used[0].model.name}, which {why}; "
            "measure a real model with moelocal bench, or give --tokens-per-second"
        )
    elif model is None and models and not chosen and None in (prefill, decode):
        measured_here = ", ".join(f"{Path(each.name).name} {_unreal(each)}" for each in models)
        warning = f"no real model was measured here ({measured_here}); moelocal bench --model NAME does it"
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


def _unreal(model: Identity) -> str:
    """Why a model's speed is not that of one that could take over the calls, in words; empty for a real one."""
    if RANDOM in model.quantization:
        return "has random weights and answers nothing"
    return "is far too small to take over such calls" if model.nbytes < TOY else ""


def measured(folder: Path, slug: str) -> list[Row]:
    """The figures of this machine; none if it has no file of results. Raises `ConfigError` for a damaged one."""
    file = folder / f"{slug}.tsv"
    return results.read(file) if file.is_file() else []


def number(least: float, *, zero: bool = False) -> Callable[[str], float]:
    """An argument that is a finite number above `least`, or `least` itself with `zero`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value < 1e12) or (value == least and not zero):
            expected = f"a number {'from' if zero else 'above'} {least:g}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

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
