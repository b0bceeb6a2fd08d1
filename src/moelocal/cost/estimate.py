"""The sums of a log: tokens and dollars per model, kind of task and month, and all that could not be counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from hashlib import blake2b
from typing import Final

from moelocal.cost.fields import Tokens
from moelocal.cost.kinds import kind_of
from moelocal.cost.logs import Place
from moelocal.cost.prices import Price, Prices
from moelocal.cost.shapes import Entry

UNNAMED: Final = "(no model named)"
UNDATED: Final = "no date"
_MOST_NAMES: Final = 1_000
_MORE: Final = "(more)"
"""Names beyond so many are summed under this one, so that a damaged log cannot fill the memory."""

Count = Callable[[str], int]
Offer = Callable[["Place", "Place | None", str, str], None]
"""Called with the place of a call that can be asked again, that of its request if it stands elsewhere, kind, model."""


@dataclass(slots=True)
class Sum:
    """Of some calls. `dollars`: of those that have a price, which are `priced` many with `priced_prompt` and
    `priced_output` tokens."""

    calls: int = 0
    fresh: int = 0
    cached: int = 0
    written: int = 0
    output: int = 0
    priced: int = 0
    priced_prompt: int = 0
    priced_output: int = 0
    dollars: float = 0.0
    estimated: int = 0

    @property
    def prompt(self) -> int:
        """All input tokens."""
        return self.fresh + self.cached + self.written

    def add(self, tokens: Tokens, dollars: float | None, estimated: bool) -> None:
        """One more call; `dollars` None: without a price."""
        self.calls += 1
        self.fresh += tokens.fresh
        self.cached += tokens.cached
        self.written += tokens.written + tokens.written_hour
        self.output += tokens.output
        self.estimated += estimated
        if dollars is not None:
            self.priced += 1
            self.priced_prompt += tokens.prompt
            self.priced_output += tokens.output
            self.dollars += dollars


@dataclass(slots=True)
class _Request:
    """A request whose answer may stand on another line; `kind` None: its custom_id stands for several."""

    kind: str | None
    place: Place
    plain: bool
    answered: bool = False


@dataclass(slots=True)
class _Waiting:
    """A batch result whose request may stand on another line."""

    custom_id: str
    place: Place
    model: str
    tokens: Tokens
    dollars: float | None
    estimated: bool
    answered: bool
    tool_kind: str


@dataclass(slots=True)
class Tally:
    """All sums. `cells`: by model and kind; `months`: by month and model; `unpriced`: calls by model; `assumed`: calls
    priced with an assumption, by it; `remarks`: calls by the remark of their price; `our_cells`: local calls, which
    nobody billed, by model and kind at the prices of `local_as`, of which `ours_timed` have their time recorded,
    `ours_seconds` in all; `without_input`: calls whose input is neither recorded nor on the line, so that their sums
    are too low."""

    prices: Prices
    count: Count
    offer: Offer | None = None
    local_as: str | None = None
    cells: dict[tuple[str, str], Sum] = field(default_factory=dict)
    months: dict[tuple[str, str], Sum] = field(default_factory=dict)
    our_cells: dict[tuple[str, str], Sum] = field(default_factory=dict)
    ours_timed: int = 0
    ours_seconds: float = 0.0
    shapes: Counter[str] = field(default_factory=Counter)
    unpriced: Counter[str] = field(default_factory=Counter)
    assumed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    entries: int = 0
    repeated: int = 0
    unanswered: int = 0
    ambiguous: int = 0
    undated: int = 0
    without_input: int = 0
    first: datetime | None = None
    last: datetime | None = None
    _models: set[str] = field(default_factory=set)
    _seen: set[bytes] = field(default_factory=set)
    _requests: dict[str, _Request] = field(default_factory=dict)
    _waiting: list[_Waiting] = field(default_factory=list)

    def add(self, place: Place, entry: Entry) -> None:
        """One more entry of a log. After the last, `finish` is to be called."""
        self.entries += 1
        self.shapes[entry.shape] += 1
        if entry.outcome == "failed":
            self.failed[_capped(entry.reason or "failed", self.failed)] += 1
        elif entry.outcome == "request":
            self._request(place, entry)
        elif entry.identity is not None and self._known(entry.identity):
            self.repeated += 1
        else:
            self._call(place, entry)

    def finish(self) -> None:
        """Bring batch results and their requests together."""
        for each in self._waiting:
            request = self._requests.get(each.custom_id)
            kind = each.tool_kind
            if request is not None and request.kind is not None:
                request.answered = True
                kind = request.kind
                if self.offer and request.plain and each.answered:
                    self.offer(each.place, request.place, kind, each.model)
            self._cell(each.model, kind).add(each.tokens, each.dollars, each.estimated)
        self._waiting.clear()
        self.unanswered += sum(not each.answered for each in self._requests.values() if each.kind is not None)

    @property
    def total(self) -> Sum:
        """Of all calls that somebody billed."""
        return merged(self.cells.values())

    @property
    def ours(self) -> Sum:
        """Of all local calls."""
        return merged(self.our_cells.values())

    @property
    def requests_answered(self) -> int:
        """Batch requests whose answers were found on other lines."""
        return sum(each.answered for each in self._requests.values())

    @property
    def priced_per_month(self) -> float | None:
        """Priced calls with a date, over the time from the first date to the last; None if there are none, or that is
        less than a day."""
        if self.first is None or self.last is None:
            return None
        days = (self.last - self.first).total_seconds() / 86_400
        dated = sum(each.priced for (month, _), each in self.months.items() if month != UNDATED)
        return dated / days * 365.25 / 12 if dated and days >= 1 else None

    def _request(self, place: Place, entry: Entry) -> None:
        if entry.custom_id is None:
            self.unanswered += 1
            return
        known = self._requests.get(entry.custom_id)
        if known is None:
            plain = bool(entry.prompt and entry.prompt.plain)
            self._requests[entry.custom_id] = _Request(kind_of(entry), place, plain)
        else:
            self.ambiguous += 1 if known.kind is None else 2
            known.kind = None

    def _call(self, place: Place, entry: Entry) -> None:
        estimated = entry.tokens is None
        tokens = entry.tokens or self._estimate(entry)
        model = _capped(entry.model or UNNAMED, self._models)
        self._models.add(model)
        day = entry.when.date() if entry.when else None
        if entry.local:
            price = self.prices.find(self.local_as, day, tokens.prompt) if self.local_as else None
            ours = self.our_cells.setdefault((model, kind_of(entry)), Sum())
            ours.add(tokens, price.cost(tokens) if price else None, estimated)
            self._remark(price)
            if entry.seconds is not None:
                self.ours_timed += 1
                self.ours_seconds += entry.seconds
            return
        dollars = self._price(entry, model, day, tokens)
        if entry.when is None:
            self.undated += 1
        else:
            self.first = min(self.first or entry.when, entry.when)
            self.last = max(self.last or entry.when, entry.when)
        month = f"{day:%Y-%m}" if day else UNDATED
        self.months.setdefault((month, model), Sum()).add(tokens, dollars, estimated)
        kind = kind_of(entry)
        answered = bool(entry.answer)
        if entry.prompt is None and entry.custom_id is not None:
            self._waiting.append(
                _Waiting(entry.custom_id, place, model, tokens, dollars, estimated, answered, kind)
            )
            return
        if self.offer and entry.prompt is not None and entry.prompt.plain and answered:
            self.offer(place, None, kind, model)
        self._cell(model, kind).add(tokens, dollars, estimated)

    def _price(self, entry: Entry, model: str, day: date | None, tokens: Tokens) -> float | None:
        price = self.prices.find(entry.model, day, tokens.prompt) if entry.model else None
        if price is None:
            self.unpriced[model] += 1
            return None
        self.sources[price.source] += 1
        self._remark(price)
        if assumption := price.assumes(tokens, entry.tier):
            self.assumed[_capped(assumption, self.assumed)] += 1
        if day is not None and day > price.read:
            self.assumed["later than the day on which the price was read"] += 1
        return price.cost(tokens, batch=entry.tier == "batch")

    def _remark(self, price: Price | None) -> None:
        if price is not None and price.remark:
            self.remarks[f"{', '.join(price.models)}: {price.remark}"] += 1

    def _estimate(self, entry: Entry) -> Tokens:
        if entry.prompt is None:
            self.without_input += 1
        prompt = sum(self.count(text) for _, text in entry.prompt.messages) if entry.prompt else 0
        return Tokens(fresh=prompt, output=self.count(entry.answer or ""))

    def _known(self, identity: tuple[str, ...]) -> bool:
        """Whether it was here before. Eight bytes stand for a call: two different ones are taken for one with a
        probability of about n² / 2^65, for a million calls 3e-8."""
        digest = blake2b("\0".join(identity).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False

    def _cell(self, model: str, kind: str) -> Sum:
        return self.cells.setdefault((model, kind), Sum())

    def by_model(self) -> dict[str, Sum]:
        """Of the billed calls; most dollars first, then most tokens."""
        return grouped(self.cells, 0)

    def by_kind(self) -> dict[str, Sum]:
        """Of the billed calls; most dollars first, then most tokens."""
        return grouped(self.cells, 1)


def grouped(cells: Mapping[tuple[str, str], Sum], part: int) -> dict[str, Sum]:
    """Sums of cells that have a part of their names in common; most dollars first, then most tokens."""
    groups: dict[str, list[Sum]] = {}
    for key, each in cells.items():
        groups.setdefault(key[part], []).append(each)
    sums = {name: merged(each) for name, each in groups.items()}
    return dict(sorted(sums.items(), key=lambda item: (-item[1].dollars, -item[1].prompt, item[0])))


def merged(sums: Iterable[Sum]) -> Sum:
    """Their sum."""
    total = Sum()
    for each in sums:
        for name in Sum.__slots__:
            setattr(total, name, getattr(total, name) + getattr(each, name))
    return total


def _capped(name: str, known: Collection[str]) -> str:
    return name if name in known or len(known) < _MOST_NAMES else _MORE
