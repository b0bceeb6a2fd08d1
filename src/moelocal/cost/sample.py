"""A sample of the recorded calls, drawn evenly over the kinds of task, and run again on this machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moelocal.cost.fields import Prompt
from moelocal.cost.logs import Logs, Place
from moelocal.cost.shapes import Entry
from moelocal.engine.completion import Completion
from moelocal.errors import MoelocalError

Run = Callable[[list[dict[str, Any]], list[Mapping[str, Any]] | None], Completion]
"""Answers messages, with tools if there are any."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A call that was drawn: its place, that of its request if it stands on another line, its kind and model."""

    place: Place
    request: Place | None
    kind: str
    model: str


@dataclass(slots=True)
class _Stratum:
    seen: int = 0
    kept: list[Drawn] = field(default_factory=list)


class Sampler:
    """Draws `size` calls: of each kind as many as its share, but one at least where `size` allows.

    Of each kind up to `size` places are kept while the log goes by (reservoir sampling), so that memory does not grow
    with it. The same log, size and seed draw the same calls.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._strata: dict[str, _Stratum] = {}
        self._dice: dict[str, random.Random] = {}

    @property
    def offered(self) -> int:
        """Calls that could be asked again."""
        return sum(each.seen for each in self._strata.values())

    def offer(self, place: Place, request: Place | None, kind: str, model: str) -> None:
        """One more call that can be asked again."""
        stratum = self._strata.setdefault(kind, _Stratum())
        dice = self._dice.setdefault(kind, random.Random(f"{self._seed} {kind}"))
        stratum.seen += 1
        if len(stratum.kept) < self._size:
            stratum.kept.append(Drawn(place, request, kind, model))
        elif (slot := dice.randrange(stratum.seen)) < self._size:
            stratum.kept[slot] = Drawn(place, request, kind, model)

    def drawn(self) -> list[Drawn]:
        """The sample, by kind and place."""
        shares = allot({kind: each.seen for kind, each in self._strata.items()}, self._size)
        found: list[Drawn] = []
        for kind in sorted(shares):
            dice = random.Random(f"{self._seed} {kind} drawn")
            kept = self._strata[kind].kept
            chosen = dice.sample(kept, min(shares[kind], len(kept)))
            found += sorted(chosen, key=lambda each: (each.place.file, each.place.line, each.place.item))
        return found


def allot(counts: Mapping[str, int], size: int) -> dict[str, int]:
    """Parts of `size` in proportion to `counts`, by largest remainders: never more than there are, and one at least for
    everyone as long as `size` reaches (the most frequent first)."""
    kinds = sorted((kind for kind, count in counts.items() if count), key=lambda kind: (-counts[kind], kind))
    shares = dict.fromkeys(kinds[:size], 1)
    rest = min(size, sum(counts.values())) - len(shares)
    total = sum(counts.values())
    ideal = {kind: size * counts[kind] / total for kind in shares}
    while rest > 0:
        open_ = [kind for kind in shares if shares[kind] < counts[kind]]
        most = max(open_, key=lambda kind: (ideal[kind] - shares[kind], -kinds.index(kind)))
        shares[most] += 1
        rest -= 1
    return shares


@dataclass(frozen=True, slots=True)
class Recorded:
    """A drawn call with its texts. `prompt_tokens`, `output_tokens`: as recorded, None if they were not."""

    where: str
    kind: str
    model: str
    prompt: Prompt
    answer: str
    prompt_tokens: int | None
    output_tokens: int | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A recorded call and its local answer; `error`: why there is none."""

    recorded: Recorded
    done: Completion | None
    seconds: float
    error: str = ""


def texts(logs: Logs, drawn: list[Drawn]) -> list[Recorded]:
    """The drawn calls, read again from their files. One that is no longer there is left out."""
    places = [each.place for each in drawn] + [each.request for each in drawn if each.request]
    entries = logs.reread(places)
    found = []
    for each in drawn:
        entry = entries.get(each.place)
        asked: Entry | None = entries.get(each.request) if each.request else entry
        if entry is None or asked is None or asked.prompt is None:
            continue
        tokens = entry.tokens
        found.append(
            Recorded(
                f"{logs.files[each.place.file].name}, line {each.place.line}",
                each.kind,
                each.model,
                asked.prompt,
                entry.answer or "",
                tokens.prompt if tokens else None,
                tokens.output if tokens else None,
                entry.seconds,
            )
        )
    return found


def run_again(recorded: list[Recorded], run: Run) -> Iterator[Pair]:
    """The answers of this machine, one after the other. What it cannot answer has the reason in `error`."""
    for each in recorded:
        started = time.perf_counter()
        messages = [{"role": role, "content": text} for role, text in each.prompt.messages]
        try:
            done = run(messages, list(each.prompt.tools) or None)
        except MoelocalError as error:
            yield Pair(each, None, time.perf_counter() - started, str(error))
        else:
            yield Pair(each, done, time.perf_counter() - started)
