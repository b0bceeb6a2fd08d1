"""The price table: what is found for which model, day and length, and that nothing in it is without a source."""

from __future__ import annotations

from datetime import date

import pytest

from moelocal.cost import prices
from moelocal.cost.fields import Tokens
from moelocal.cost.prices import BUILT_IN, Prices
from moelocal.errors import RequestError

ENTRY = 'provider = "P"\nsource = "https://example.org"\nread = 2026-11-21\n'
TABLE = f"""
aside = ["gateway/"]
[[price]]
models = ["m"]
input = 10
output = 100
{ENTRY}
[[price]]
models = ["m"]
from = 2026-03-01
input = 1
cached = 0.5
output = 10
batch = 0.5
{ENTRY}
[[price]]
models = ["m"]
from = 2026-03-01
above = 1000
input = 2
output = 20
{ENTRY}
[[price]]
models = ["m-mini", "n"]
from = 2026-05-01
input = 3
written = 4
written_hour = 8
output = 30
{ENTRY}
[[price]]
models = ["house/*"]
input = 7
output = 7
{ENTRY}
"""


@pytest.fixture
def table(tmp_path) -> Prices:
    file = tmp_path / "prices.toml"
    file.write_text(TABLE)
    return Prices.open(file)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("m", 1),
        ("M", 1),
        ("m-2026-04-01", 1),
        ("m-20260401", 1),
        ("m@20260401", 1),
        ("m-0613", 1),
        ("m-latest", 1),
        ("m-20260401-v1:0", 1),
        ("m[1m]", 1),
        ("gateway/m", 1),
        ("m-mini", 3),
        ("m-mini-2026-04-01", 3),
        ("n", 3),
        ("house/anything at all", 7),
        ("m-maxi", None),
        ("m2", None),
        ("m-32k", None),
        ("mm", None),
        ("ft:m:us", None),
        ("", None),
    ],
)
def test_the_longest_name_decides_and_only_a_version_may_follow(table, model, expected):
    found = table.find(model, date(2026, 6, 1), 10)
    assert (found and found.input) == expected


def test_a_call_has_the_price_of_its_day_and_length(table):
    def rate(when: date | None, prompt: int) -> float | None:
        found = table.find("m", when, prompt)
        return found and found.input

    assert rate(date(2026, 2, 28), 5000) == 10
    assert rate(date(2026, 3, 1), 1000) == 1
    assert rate(date(2026, 3, 1), 1001) == 2
    assert rate(None, 10) == 1  # without a date: the newest
    assert table.find("n", date(2026, 4, 30), 10) is None  # before its first price


def test_each_token_is_priced_once(table):
    price = table.find("m", date(2026, 6, 1), 10)
    assert price is not None
    tokens = Tokens(fresh=1_000_000, cached=2_000_000, output=100_000)
    assert price.cost(tokens) == pytest.approx(1 + 2 * 0.5 + 0.1 * 10)
    assert price.cost(tokens, batch=True) == pytest.approx((1 + 2 * 0.5 + 0.1 * 10) / 2)
    written = table.find("n", date(2026, 6, 1), 10)
    assert written is not None
    assert written.cost(Tokens(written=1_000_000, written_hour=1_000_000)) == pytest.approx(4 + 8)
    assert written.cost(Tokens(cached=1_000_000)) == pytest.approx(3)  # no price of its own: as input


def test_what_is_priced_without_a_price_of_its_own_is_said(table):
    price, other = (table.find(name, date(2026, 6, 1), 10) for name in ("m", "n"))
    assert price is not None and other is not None
    assert price.assumes(Tokens(fresh=5, cached=5), "batch") == ""
    assert price.assumes(Tokens(written=5), "standard") == "cache writes, priced as input"
    assert price.assumes(Tokens(), "priority") == "of tier priority, priced as standard"
    assert other.assumes(Tokens(cached=5), "standard") == "cached input, priced as input"
    assert other.assumes(Tokens(), "batch") == "of a batch, priced as standard"


def test_every_built_in_price_has_an_address_a_date_and_a_place_of_its_own():
    table = Prices.open(BUILT_IN)
    places = [(name, each.since, each.above) for each in table.entries for name in each.models]
    assert len(places) == len(set(places))
    for each in table.entries:
        assert each.source.startswith("https://")
        assert date(2026, 1, 1) < each.read <= date.today()
        assert each.since is None or each.since <= each.read
        assert 0 < each.input <= each.output
        assert each.cached is None or each.cached <= each.input
        assert each.written is None or each.input <= each.written
        assert each.written_hour is None or each.written is None or each.written <= each.written_hour
        assert each.batch in (None, 0.5)


@pytest.mark.parametrize(
    ("model", "day", "prompt", "expected"),
    [
        # as the pages that the table names state them
        ("gpt-4o-mini-2024-07-18", date(2026, 1, 1), 10, (0.15, 0.075, 0.6)),
        ("gpt-4.1-nano", date(2026, 1, 1), 10, (0.1, 0.025, 0.4)),
        ("gpt-5.6-luna", date(2026, 7, 29), 10, (1.0, 0.1, 6.0)),
        ("gpt-5.6-luna", date(2026, 7, 30), 10, (0.2, 0.02, 1.2)),
        ("gpt-5.6-luna", date(2026, 7, 30), 272_001, (0.4, 0.04, 1.8)),
        ("claude-haiku-4-5-20251001", date(2026, 1, 1), 10, (1.0, 0.1, 5.0)),
        ("claude-sonnet-5-5", date(2026, 10, 6), 10, (2.0, 0.2, 10.0)),
        ("claude-sonnet-5-5", date(2026, 10, 7), 10, (2.0, 0.1, 10.0)),
        ("anthropic/claude-opus-4-1-20250805", date(2026, 1, 1), 10, (15.0, 1.5, 75.0)),
    ],
)
def test_built_in_prices_are_those_of_their_sources(model, day, prompt, expected):
    found = Prices.open(BUILT_IN).find(model, day, prompt)
    assert found is not None
    assert (found.input, found.cached, found.output) == expected


@pytest.mark.parametrize(
    "model", ["gpt-4-32k", "gpt-5-chat-latest", "gpt-4.5-preview", "claude-2.1", "o1-pro"]
)
def test_a_model_that_no_source_was_found_for_has_no_price(model):
    assert Prices.open(BUILT_IN).find(model, None, 10) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "unknown key 'x'; expected [[price]] and aside"),
        ("aside = 3", "aside: expected a list of strings"),
        ("price = 3", "price: expected [[price]], several tables"),
        ('[[price]]\nmodels = ["a"]', "price 1: provider is missing"),
        (f'[[price]]\nmodels = []\ninput = 1\noutput = 1\n{ENTRY}', "price 1: models: expected a list of names"),
        (f'[[price]]\nmodels = ["a"]\ninput = "1"\noutput = 1\n{ENTRY}',
         "price 1 (a): input: expected a number of dollars, got '1'"),
        (f'[[price]]\nmodels = ["a"]\ninput = nan\noutput = 1\n{ENTRY}',
         "price 1 (a): input: expected a number of dollars, got nan"),
        (f'[[price]]\nmodels = ["a"]\ninput = 1\noutput = 1\nfrom = "May"\n{ENTRY}',
         "price 1 (a): from: expected a date such as 2026-11-21, got 'May'"),
        (f'[[price]]\nmodels = ["a"]\ninput = 1\noutput = 1\nabove = -1\n{ENTRY}',
         "price 1 (a): above: expected a number of tokens, got -1"),
    ],
)  # fmt: skip
def test_a_damaged_table_says_where(tmp_path, text, message):
    file = tmp_path / "prices.toml"
    file.write_text(text)
    with pytest.raises(RequestError) as caught:
        Prices.open(file)
    assert str(caught.value) == f"{file}: {message}"


def test_an_unknown_key_of_a_price_is_named(tmp_path):
    file = tmp_path / "prices.toml"
    file.write_text("[[price]]\ninptu = 1")
    with pytest.raises(
        RequestError, match="price 1: unknown key 'inptu'; expected provider, models, from, above, input"
    ):
        Prices.open(file)


def test_the_users_own_table_is_used_once_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert Prices.open().file == BUILT_IN
    copied = prices.copy_table(prices.user_file())
    assert Prices.open().file == copied == tmp_path / "moelocal/prices.toml"
    assert copied.read_text() == BUILT_IN.read_text()
    with pytest.raises(RequestError) as caught:
        prices.copy_table(copied)
    assert str(caught.value) == f"{copied}: is there already; edit it, or move it away for a new copy"
