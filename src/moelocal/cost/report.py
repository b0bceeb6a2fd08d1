"""The report as lines of text, and as one object for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

from moelocal.cost.estimate import Sum, Tally, grouped, merged
from moelocal.cost.local import BreakEven, Local, Machine, cost
from moelocal.cost.logs import Lines, Logs
from moelocal.units import size

_ROWS: Final = 20
"""Of a table; the rest is summed in one more row."""
_STRETCHES: Final = 20
"""Of lines that were not read, in the text; more are in the JSON."""


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
            yield from self._remarks()
            yield "No call that somebody billed."
            if not self.tally.entries:
                yield "Expected is a JSON object on each line: an answer as the APIs of OpenAI and Anthropic give or"
                yield "export it, with its request or without, or what --log writes (docs/cost.md has all forms)."
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
        files, every = _many(len(self.logs.files), "file"), _many(lines.total, "line")
        yield f"read       {files}, {size(self.logs.nbytes)}, {every} in {self.seconds:.2f} s"
        counts = lines.counts
        yield (
            f"lines      {counts['read']:,} read, {counts['empty']:,} empty, {counts['malformed']:,} malformed, "
            f"{counts['unknown']:,} of unknown shape"
        )
        if any(lines.items.values()):
            yield (
                f"           in pages: {_many(lines.items['malformed'], 'item')} malformed, "
                f"{lines.items['unknown']:,} of unknown shape"
            )
        yield from self._unread()
        for damage in lines.damaged:
            yield f"           {damage}"
        if lines.left_out:
            yield f"           left out: {_many(lines.left_out, 'file')} of the folders, not named like a log"
        total, ours = tally.total, tally.ours
        parts = [_many(total.calls, "billed call")]
        if ours.calls:
            parts.append(f"{_many(ours.calls, 'local call')} that nobody billed")
        if tally.repeated:
            parts.append(f"{tally.repeated:,} recorded twice and counted once")
        if failed := sum(tally.failed.values()):
            named = ", ".join(f"{count:,} {reason}" for reason, count in tally.failed.most_common(3))
            parts.append(f"{failed:,} failed ({named})")
        answered = tally.requests_answered
        if answered:
            parts.append(f"{_many(answered, 'batch request')} answered on other lines")
        if tally.unanswered:
            parts.append(f"{_many(tally.unanswered, 'request')} without an answer, not priced")
        if tally.ambiguous:
            parts.append(
                f"{tally.ambiguous:,} batch requests that share an id, so that no answer belongs to them"
            )
        yield f"entries    {tally.entries:,}: {'; '.join(parts)}"
        for shape, count in tally.shapes.most_common():
            yield f"           {count:>10,}  {shape}"

    def _unread(self) -> Iterator[str]:
        """The lines that were not read: the first few with their reasons, where all are if they are few."""
        for fate, by_place in self.lines.unread.items():
            shown = self.lines.shown.get(fate, [])
            for file, where, reason in shown:
                yield f"           {fate}: {file}: {where}: {reason}"
            count = self.lines.counts[fate] + self.lines.items.get(fate, 0)
            if count == len(shown):
                continue
            if sum(map(len, by_place.values())) > _STRETCHES:
                yield f"           {fate}: {count:,} in all; --json says where, --rejects FILE holds them"
                continue
            for (file, page), stretches in by_place.items():
                where = ", ".join(
                    str(first) if first == last else f"{first}-{last}" for first, last in stretches
                )
                alone = stretches[0][0] == stretches[-1][1]
                unit = ("item" if page else "line") + ("" if alone else "s")
                yield f"           {fate}: {file}: {f'line {page}, ' if page else ''}{unit} {where}"

    def _ours(self) -> Iterator[str]:
        ours, model = self.tally.ours, self.tally.local_as
        if not ours.calls:
            return
        line = f"local      {_many(ours.calls, 'call')}, {ours.prompt:,} tokens in, {ours.output:,} out"
        if model is None:
            yield f"{line}; --local-as MODEL (such as gpt-4.1) says what they would have cost"
        else:
            yield f"{line}; {ours.priced:,} of them priced as {model}: ${_money(ours.dollars)}"
        timed = self.tally.ours_timed
        if timed:
            whole = "" if timed == ours.calls else f", of {timed:,} of them; the others have no time"
            yield f"           {_hours(self.tally.ours_seconds)} of answering, as the log says{whole}"
        else:
            yield "           how long they took, the log does not say"
        yield from self._table("local calls, by model", grouped(self.tally.our_cells, 0), here=False)
        yield from self._table("local calls, by kind of task", grouped(self.tally.our_cells, 1), here=False)

    def _table(self, title: str, rows: Mapping[str, Sum], *, here: bool = True) -> Iterator[str]:
        """`here`: with what the calls of a row would take on this machine, priced or not."""
        yield ""
        heads = f"{title:<42}{'calls':>9}{'input':>14}{'cached':>12}{'written':>10}{'output':>12}{'$':>12}"
        yield f"{heads} {'here: h':>9}{'here: $':>9}" if here else heads
        names = list(rows)
        shown = [(name, rows[name]) for name in names[:_ROWS]]
        if len(names) > _ROWS:
            shown.append((f"({len(names) - _ROWS} more)", merged(rows[name] for name in names[_ROWS:])))
        total = merged(rows.values())
        all_here = cost(self.machine, total.prompt, total.output)
        for name, each in [*shown, ("in all", total)]:
            dollars = _money(each.dollars, total.dollars) if each.priced else "unpriced"
            mark = "*" if each.priced and each.priced < each.calls else " "
            label = name if len(name) <= 39 else f"{name[:38]}…"
            cells = (
                f"  {label:<40}{each.calls:>9,}{each.fresh:>14,}{each.cached:>12,}{each.written:>10,}"
                f"{each.output:>12,}{dollars:>12}{mark}"
            )
            local = cost(self.machine, each.prompt, each.output)
            figures = f"{_significant(local.seconds / 3600):>9}{_money(local.dollars, all_here.dollars):>9}"
            yield cells + figures if here else cells.rstrip()
        if any(each.priced and each.priced < each.calls for each in rows.values()):
            yield "  * some of these calls have no price and are not in the sum"

    def _notes(self, total: Sum) -> Iterator[str]:
        tally = self.tally
        yield ""
        yield f"prices     {tally.prices.file}"
        for source, count in tally.sources.most_common():
            reads = max(each.read for each in tally.prices.entries if each.source == source)
            yield f"           {_calls(count)}: {source}, read {reads}"
        for assumption, count in tally.assumed.most_common():
            yield f"           {_calls(count)}: {assumption}"
        yield from self._remarks()
        for model, count in tally.unpriced.most_common(_ROWS):
            yield f"unpriced   {_calls(count)} of {model}: not in the table"
        if len(tally.unpriced) > _ROWS:
            yield f"           and {_many(len(tally.unpriced) - _ROWS, 'more model')}"
        if tally.undated:
            yield f"undated    {_calls(tally.undated)} without a date from 2020 to today: at the newest price"
        if total.estimated:
            yield f"estimated  {_calls(total.estimated)} without recorded usage: texts counted with the tokenizer"
            yield f"           {'':>10} of {self.tokenizer}"
        if tally.without_input:
            yield f"           {tally.without_input:>10,} of them without their prompt: input not counted, sums too low"

    def _remarks(self) -> Iterator[str]:
        for remark, count in self.tally.remarks.most_common():
            yield f"remark     {_calls(count)} of {remark}"

    def _local(self, total: Sum) -> Iterator[str]:
        machine, local = self.machine, self.local
        yield ""
        yield f"here, on this machine, for the {_many(total.priced, 'priced call')}"
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
        yield f"  energy         {local.kwh:,.4g} kWh, ${_money(local.dollars)}; the API took ${_money(total.dollars)}"
        yield "  Tokens as the provider counted them; another tokenizer counts differently. No cache helps here."
        if total.priced != total.calls:
            every = self.everything
            dollars = _money(every.dollars)
            yield f"  In all {_many(total.calls, 'call')}: {_hours(every.seconds)}, {every.kwh:,.4g} kWh, ${dollars}"

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
            yield "  The log's own volume per month is unknown: no priced call is dated, or all dates are within a day."
        elif even.months is not None:
            months = f"{even.months:,.1f} months"
            if even.months > 12 * even.years:
                months += ", longer than it serves"
            volume, most = (
                f"{even.calls_per_month:,.{0 if even.calls_per_month >= 10 else 2}f} priced calls/month",
                even.most_calls,
            )
            if most is not None and even.calls_per_month > most:
                yield f"  This log: {volume}, more than this machine answers one after the other."
                yield f"  The {most:,.0f} a month that it does answer pay for it in {months}."
            else:
                yield f"  This log: {volume}; they pay for the machine in {months}."

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        tally = self.tally
        return {
            "files": len(self.logs.files),
            "nbytes": self.logs.nbytes,
            "lines": {"total": self.lines.total, **self.lines.counts, "left_out_files": self.lines.left_out},
            "items": dict(self.lines.items),
            "unread": [
                {"fate": fate, "file": file, **({"line": page, "items": each} if page else {"lines": each})}
                for fate, by_place in self.lines.unread.items()
                for (file, page), each in by_place.items()
            ],
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
            "local_cells": [
                {"model": model, "kind": kind, **_sum(each)}
                for (model, kind), each in sorted(tally.our_cells.items())
            ],
            "months": [
                {"month": month, "model": model, **_sum(each)}
                for (month, model), each in sorted(tally.months.items())
            ],
            "prices": str(tally.prices.file),
            "sources": dict(tally.sources),
            "unpriced": dict(tally.unpriced),
            "assumed": dict(tally.assumed),
            "remarks": dict(tally.remarks),
            "undated": tally.undated,
            "without_input": tally.without_input,
            "tokenizer": self.tokenizer,
            "machine": dataclasses.asdict(self.machine),
            "local": dataclasses.asdict(self.local),
            "local_all_calls": dataclasses.asdict(self.everything),
            "break_even": None if self.even is None else dataclasses.asdict(self.even),
            "seconds": self.seconds,
        }


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _calls(count: int) -> str:
    return f"{count:>10,} call{'' if count == 1 else 's'}"


def _significant(number: float) -> str:
    """With three digits that say something, however small it is; all before the point where it is large."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _sum(each: Sum) -> dict[str, Any]:
    return dataclasses.asdict(each)


def _money(dollars: float, of: float | None = None) -> str:
    """With cents, or hundredths of them where all that it is part of is less than a dollar."""
    return f"{dollars:,.{2 if (dollars if of is None else of) >= 1 else 4}f}"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
