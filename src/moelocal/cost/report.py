"""The report as lines of text, and as one object for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from moelocal.cost.estimate import Sum, Tally, merged
from moelocal.cost.local import BreakEven, Local, Machine, cost
from moelocal.cost.logs import Lines, Logs
from moelocal.units import size

_ROWS: Final = 20
"""Of a table; the rest is summed in one more row."""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """All that is to be said. `tokenizer`: whose tokens were counted where none were recorded; `seconds`: to read the
    logs; `local`: for the priced calls alone; `everything`: for all calls."""

    logs: Logs
    lines: Lines
    tally: Tally
    machine: Machine
    local: Local
    everything: Local
    even: BreakEven | None
    tokenizer: str
    seconds: float

    def as_lines(self) -> Iterator[str]:
        """For people."""
        yield from self._read()
        yield from self._ours()
        total = self.tally.total
        if not total.calls:
            yield ""
            yield "No call that somebody billed."
            return
        yield from self._table("by model", self.tally.by_model())
        yield from self._table("by kind of task", self.tally.by_kind())
        both = {f"{kind}: {model}": each for (model, kind), each in self.tally.cells.items()}
        ordered = sorted(both.items(), key=lambda item: (-item[1].dollars, -item[1].prompt, item[0]))
        yield from self._table("by kind and model", dict(ordered))
        months: dict[str, Sum] = {}
        for (month, _), each in self.tally.months.items():
            months[month] = merged((months.get(month, Sum()), each))
        yield from self._table("by month", dict(sorted(months.items())))
        yield from self._notes(total)
        yield from self._local(total)
        yield from self._even(total)

    def _read(self) -> Iterator[str]:
        lines, tally = self.lines, self.tally
        files = "1 file" if len(self.logs.files) == 1 else f"{len(self.logs.files)} files"
        yield f"read       {files}, {size(self.logs.nbytes)}, {lines.total:,} lines in {self.seconds:.2f} s"
        counts = lines.counts
        yield (
            f"lines      {counts['read']:,} read, {counts['empty']:,} empty, {counts['malformed']:,} malformed, "
            f"{counts['unknown']:,} of unknown shape"
        )
        if any(lines.items.values()):
            yield (
                f"           of the pages {lines.items['malformed']:,} items malformed, "
                f"{lines.items['unknown']:,} of unknown shape"
            )
        for fate, shown in lines.shown.items():
            for file, where, reason in shown:
                yield f"           {fate}: {file}: {where}: {reason}"
            if (more := counts[fate] + lines.items[fate] - len(shown)) > 0:
                yield f"           {fate}: and {more:,} more"
        for damage in lines.damaged:
            yield f"           {damage}"
        if lines.left_out:
            yield f"           {lines.left_out:,} files of the folders have names of no logs and were left out"
        total = tally.total
        parts = [f"{total.calls:,} calls"]
        if tally.ours.calls:
            parts.append(f"{tally.ours.calls:,} local ones that nobody billed")
        if tally.repeated:
            parts.append(f"{tally.repeated:,} recorded twice and counted once")
        if failed := sum(tally.failed.values()):
            named = ", ".join(f"{count:,} {reason}" for reason, count in tally.failed.most_common(3))
            parts.append(f"{failed:,} failed ({named})")
        answered = tally.requests_answered
        if answered:
            parts.append(f"{answered:,} batch requests whose answers are there")
        if tally.unanswered:
            parts.append(f"{tally.unanswered:,} requests without an answer, not priced")
        if tally.ambiguous:
            parts.append(
                f"{tally.ambiguous:,} batch requests that share an id, so that no answer belongs to them"
            )
        yield f"entries    {tally.entries:,}: {'; '.join(parts)}"
        for shape, count in tally.shapes.most_common():
            yield f"           {count:>10,}  {shape}"

    def _ours(self) -> Iterator[str]:
        ours, model = self.tally.ours, self.tally.local_as
        if not ours.calls:
            return
        line = f"local      {ours.calls:,} calls, {ours.prompt:,} tokens in, {ours.output:,} out"
        if model is None:
            yield f"{line}; --local-as MODEL says what they would have cost"
        else:
            yield f"{line}; {ours.priced:,} of them priced as {model}: ${ours.dollars:,.2f}"
        timed = self.tally.ours_timed
        if timed:
            whole = "" if timed == ours.calls else f", of {timed:,} of them; the others have no time"
            yield f"           {_hours(self.tally.ours_seconds)} of answering, as the log says{whole}"
        else:
            yield "           how long they took, the log does not say"

    def _table(self, title: str, rows: Mapping[str, Sum]) -> Iterator[str]:
        """`here`: what the calls of a row would take on this machine, priced or not."""
        yield ""
        yield (
            f"{title:<42}{'calls':>9}{'input':>14}{'cached':>12}{'written':>10}{'output':>12}{'$':>12} "
            f"{'here: h':>9}{'here: $':>9}"
        )
        names = list(rows)
        shown = [(name, rows[name]) for name in names[:_ROWS]]
        if len(names) > _ROWS:
            shown.append((f"({len(names) - _ROWS} more)", merged(rows[name] for name in names[_ROWS:])))
        for name, each in [*shown, ("in all", merged(rows.values()))]:
            here = cost(self.machine, each.prompt, each.output)
            dollars = f"{each.dollars:,.2f}" if each.priced else "unpriced"
            mark = "*" if each.priced and each.priced < each.calls else " "
            label = name if len(name) <= 39 else f"{name[:38]}…"
            yield (
                f"  {label:<40}{each.calls:>9,}{each.fresh:>14,}{each.cached:>12,}{each.written:>10,}"
                f"{each.output:>12,}{dollars:>12}{mark}{here.seconds / 3600:>9,.1f}{here.dollars:>9,.2f}"
            )
        if any(each.priced and each.priced < each.calls for each in rows.values()):
            yield "  * some of these calls have no price and are not in the sum"

    def _notes(self, total: Sum) -> Iterator[str]:
        tally = self.tally
        yield ""
        yield f"prices     {tally.prices.file}"
        for source, count in tally.sources.most_common():
            reads = max(each.read for each in tally.prices.entries if each.source == source)
            yield f"           {count:>10,} calls: {source}, read {reads}"
        for assumption, count in tally.assumed.most_common():
            yield f"           {count:>10,} {assumption}"
        for model, count in tally.unpriced.most_common(_ROWS):
            yield f"unpriced   {count:>10,} calls of {model}: not in the table"
        if len(tally.unpriced) > _ROWS:
            yield f"           and {len(tally.unpriced) - _ROWS} more models"
        if tally.undated:
            yield f"           {tally.undated:>10,} calls without a date, at the newest price"
        if total.estimated:
            yield f"estimated  {total.estimated:>10,} calls without recorded usage: texts counted with the tokenizer"
            yield f"           {'':>10} of {self.tokenizer}"
        if tally.without_input:
            yield f"           {tally.without_input:>10,} of them without their prompt: input not counted, sums too low"

    def _local(self, total: Sum) -> Iterator[str]:
        machine, local = self.machine, self.local
        yield ""
        yield f"here, on this machine, for the {total.priced:,} priced calls"
        for name, figure, unit in (
            ("prefill", machine.prefill, "tokens/s"),
            ("decode", machine.decode, "tokens/s"),
            ("power, prefill", machine.prefill_watts, "W"),
            ("power, decode", machine.decode_watts, "W"),
            ("energy", machine.price, "$/kWh"),
        ):
            yield f"  {name:<15}{figure.value:>10,.4g} {unit:<9} {figure.origin}"
        if machine.warning:
            yield f"  WARNING: {machine.warning}"
        yield f"  time           {_hours(local.prefill_seconds)} prefill + {_hours(local.decode_seconds)} decode"
        yield f"  energy         {local.kwh:,.4g} kWh, ${local.dollars:,.2f}; the API took ${total.dollars:,.2f}"
        yield "  Tokens as the provider counted them; another tokenizer counts differently. No cache helps here."
        if total.priced != total.calls:
            every = self.everything
            yield f"  All {total.calls:,} calls: {_hours(every.seconds)}, {every.kwh:,.4g} kWh, ${every.dollars:,.2f}"

    def _even(self, total: Sum) -> Iterator[str]:
        even = self.even
        yield ""
        if even is None:
            yield "break-even: needs priced calls and a price of the machine, --machine-price DOLLARS"
            return
        yield "break-even: calls/month = machine price / (12 x years) / (API $/call - local $/call)"
        per_call = f"({even.api_per_call:.6f} - {even.local_per_call:.6f})"
        needed = f"{even.machine_price:,.0f} / (12 x {even.years:g}) / {per_call}"
        if even.calls is None or even.tokens is None:
            yield f"  {needed}: never; a call costs no less here"
            return
        yield f"  {needed} = {even.calls:,.0f} calls/month, {even.tokens:,.0f} tokens/month"
        if even.most_calls is not None and even.most_calls < even.calls:
            yield f"  One after the other this machine answers {even.most_calls:,.0f} a month: it does not get there."
        if even.calls_per_month is None:
            yield "  The log's own volume per month is unknown: its dates span less than a day."
        elif even.months is not None:
            volume, most = f"{even.calls_per_month:,.0f} calls/month", even.most_calls
            if most is not None and even.calls_per_month > most:
                yield f"  This log: {volume}, more than this machine answers one after the other."
                yield f"  The {most:,.0f} a month that it does answer pay for it in {even.months:,.1f} months."
            else:
                yield f"  This log: {volume}; they pay for the machine in {even.months:,.1f} months."

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        tally = self.tally
        return {
            "files": len(self.logs.files),
            "nbytes": self.logs.nbytes,
            "lines": {"total": self.lines.total, **self.lines.counts, "left_out_files": self.lines.left_out},
            "items": dict(self.lines.items),
            "damaged": self.lines.damaged,
            "entries": tally.entries,
            "repeated": tally.repeated,
            "failed": dict(tally.failed),
            "requests": {
                "answered": tally.requests_answered,
                "unanswered": tally.unanswered,
                "ambiguous": tally.ambiguous,
            },
            "local_calls": tally.ours.calls,
            "local_time": {"calls": tally.ours_timed, "seconds": tally.ours_seconds},
            "local_as": {"model": tally.local_as, **_sum(tally.ours)},
            "shapes": dict(tally.shapes),
            "total": _sum(tally.total),
            "models": {name: _sum(each) for name, each in tally.by_model().items()},
            "kinds": {name: _sum(each) for name, each in tally.by_kind().items()},
            "cells": [
                {"model": model, "kind": kind, **_sum(each)}
                for (model, kind), each in sorted(tally.cells.items())
            ],
            "months": [
                {"month": month, "model": model, **_sum(each)}
                for (month, model), each in sorted(tally.months.items())
            ],
            "prices": str(tally.prices.file),
            "sources": dict(tally.sources),
            "unpriced": dict(tally.unpriced),
            "assumed": dict(tally.assumed),
            "undated": tally.undated,
            "without_input": tally.without_input,
            "tokenizer": self.tokenizer,
            "machine": dataclasses.asdict(self.machine),
            "local": dataclasses.asdict(self.local),
            "local_all_calls": dataclasses.asdict(self.everything),
            "break_even": None if self.even is None else dataclasses.asdict(self.even),
            "seconds": self.seconds,
        }


def _sum(each: Sum) -> dict[str, Any]:
    return dataclasses.asdict(each)


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
