"""Sums: every entry is somewhere, each call once, priced by its day; batch results meet their requests."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.cost.estimate import UNDATED, UNNAMED, Tally
from moelocal.cost.fields import Prompt, Tokens
from moelocal.cost.logs import Place
from moelocal.cost.prices import Price, Prices
from moelocal.cost.shapes import Entry

READ = date(2026, 11, 21)
PRICES = Prices(
    Path("prices.toml"),
    [
        Price("P", ("m",), 10.0, 100.0, "https://a", READ, batch=0.5),
        Price("P", ("m",), 1.0, 10.0, "https://b", READ, since=date(2026, 3, 1), batch=0.5),
    ],
)
MARCH, MAY = datetime(2026, 3, 5, tzinfo=UTC), datetime(2026, 5, 5, tzinfo=UTC)
QUESTION = Prompt((("user", "What is it?"),))


def tally(*entries: Entry, offers: list[object] | None = None) -> Tally:
    """The sums of some entries, a line each; texts count as their characters."""
    keep = None if offers is None else lambda *offered: offers.append(offered)
    found = Tally(PRICES, len, keep)
    for line, entry in enumerate(entries, 1):
        found.add(Place(0, line), entry)
    found.finish()
    return found


def call(**fields: object) -> Entry:
    base: dict[str, object] = {"model": "m", "when": MARCH, "tokens": Tokens(fresh=1000, output=100)}
    return Entry("x", "call", **(base | fields))  # type: ignore[arg-type]


def test_a_call_is_priced_by_its_own_day():
    sums = tally(call(), call(when=datetime(2026, 1, 1, tzinfo=UTC)), call(when=None))
    new, old = (1000 * 1 + 100 * 10) / 1e6, (1000 * 10 + 100 * 100) / 1e6
    assert sums.total.dollars == pytest.approx(2 * new + old)
    assert {month: each.dollars for (month, _), each in sums.months.items()} == pytest.approx(
        {"2026-03": new, "2026-01": old, UNDATED: new}
    )
    assert (sums.undated, dict(sums.sources)) == (1, {"https://b": 2, "https://a": 1})


def test_a_model_without_a_price_is_counted_and_named():
    sums = tally(call(), call(model="other"), call(model=""))
    assert (sums.total.calls, sums.total.priced) == (3, 1)
    assert dict(sums.unpriced) == {"other": 1, UNNAMED: 1}
    assert sums.by_model()["other"].dollars == 0.0
    assert sums.by_model()["other"].fresh == 1000


def test_a_call_that_is_recorded_twice_counts_once():
    sums = tally(call(identity=("a",)), call(identity=("a",)), call(identity=("b",)), call(), call())
    assert (sums.total.calls, sums.repeated) == (4, 1)


def test_tokens_that_were_not_recorded_are_estimated_and_said():
    prompt = Prompt((("system", "abc"), ("user", "defg")))
    sums = tally(call(tokens=None, prompt=prompt, answer="hi"), call(tokens=None, answer="hi"))
    assert (sums.total.prompt, sums.total.output, sums.total.estimated) == (7, 4, 2)
    assert sums.without_input == 1


def test_local_calls_are_apart():
    sums = tally(call(local=True), call())
    assert (sums.ours.calls, sums.total.calls, sums.ours.fresh) == (1, 1, 1000)


def test_a_batch_result_has_the_kind_of_its_request_wherever_that_stands():
    asked = Entry("r", "request", "m", prompt=QUESTION, custom_id="a", tier="batch")
    done = call(custom_id="a", tier="batch", answer="It.")
    half = (1000 * 1 + 100 * 10) / 1e6 / 2
    for order in ((asked, done), (done, asked)):
        offers: list[object] = []
        sums = tally(*order, offers=offers)
        assert list(sums.cells) == [("m", "question answering")]
        assert sums.total.dollars == pytest.approx(half)
        assert (sums.requests_answered, sums.unanswered, sums.ambiguous) == (1, 0, 0)
        result, request = Place(0, order.index(done) + 1), Place(0, order.index(asked) + 1)
        assert offers == [(result, request, "question answering", "m")]


def test_requests_that_share_an_id_belong_to_no_result():
    asked = Entry("r", "request", "m", prompt=QUESTION, custom_id="a")
    sums = tally(asked, asked, asked, call(custom_id="a"), Entry("r", "request", "m", prompt=QUESTION))
    assert list(sums.cells) == [("m", "not recorded")]
    assert (sums.requests_answered, sums.unanswered, sums.ambiguous) == (0, 1, 3)


def test_only_calls_of_text_with_prompt_and_answer_are_offered():
    offers: list[object] = []
    image = Prompt(QUESTION.messages, plain=False)
    tally(
        call(prompt=QUESTION, answer="It."),
        call(prompt=QUESTION, answer=""),
        call(prompt=image, answer="It."),
        call(answer="It."),
        offers=offers,
    )
    assert offers == [(Place(0, 1), None, "question answering", "m")]


def test_what_failed_is_counted_by_reason():
    sums = tally(
        *[Entry("x", "failed", reason="expired")] * 2, Entry("x", "failed", reason="overloaded_error")
    )
    assert dict(sums.failed) == {"expired": 2, "overloaded_error": 1}
    assert sums.total.calls == 0


def test_volume_per_month_is_over_the_time_of_the_log():
    sums = tally(call(when=MARCH), call(when=MAY), call(when=None), call(model="other", when=MARCH))
    assert sums.priced_per_month == pytest.approx(2 / 61 * 365.25 / 12)  # 61 days from March 5 to May 5
    assert tally(call(), call()).priced_per_month is None
    assert tally(call(model="other", when=MARCH), call(model="other", when=MAY)).priced_per_month is None


def test_a_call_after_the_day_of_its_price_is_said():
    sums = tally(call(when=datetime(2026, 11, 22, tzinfo=UTC)))
    assert dict(sums.assumed) == {"later than the day on which the price was read": 1}


def test_names_without_end_do_not_fill_the_memory():
    sums = tally(*(call(model=f"m-{number}") for number in range(1200)))
    assert len(sums.by_model()) == 1001
    assert sums.by_model()["(more)"].calls == 200
    assert sums.total.calls == 1200


ENTRY = st.builds(
    Entry,
    shape=st.just("x"),
    outcome=st.sampled_from(["call", "call", "request", "failed"]),
    model=st.sampled_from(["m", "other", ""]),
    when=st.sampled_from([None, MARCH, MAY]),
    tokens=st.none() | st.builds(Tokens, *[st.integers(0, 1000)] * 5),
    prompt=st.none() | st.just(QUESTION),
    answer=st.sampled_from([None, "", "It."]),
    custom_id=st.sampled_from([None, "a", "b", "c"]),
    tier=st.sampled_from(["standard", "batch", "flex"]),
    local=st.booleans(),
    identity=st.sampled_from([None, ("1",), ("2",)]),
)


@given(st.lists(ENTRY, max_size=30))
def test_every_entry_is_in_one_place_and_all_tables_agree(entries):
    sums = tally(*entries)
    requests = sums.requests_answered + sums.unanswered + sums.ambiguous
    elsewhere = sums.ours.calls + sums.repeated + sum(sums.failed.values()) + requests
    assert len(entries) == sums.entries == sums.total.calls + elsewhere
    for table in (sums.by_model(), sums.by_kind(), sums.months):
        assert sum(each.calls for each in table.values()) == sums.total.calls
        assert sum(each.prompt for each in table.values()) == sums.total.prompt
        assert sum(each.output for each in table.values()) == sums.total.output
        assert sum(each.dollars for each in table.values()) == pytest.approx(sums.total.dollars)
    assert sums.total.priced + sum(sums.unpriced.values()) == sums.total.calls
    json.dumps(sums.total.dollars)
