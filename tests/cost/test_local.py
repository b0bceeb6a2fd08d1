"""The local side: what was measured, given or assumed is never mixed up; the formula of the break-even."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from moelocal.bench import results
from moelocal.bench.header import Header, Identity
from moelocal.bench.results import Row
from moelocal.cost import local
from moelocal.cost.local import SECONDS_PER_MONTH, Figure, Local, Machine
from moelocal.errors import RequestError

HEADER = Header(
    machine="apple-m4-max", chip="Apple M4 Max", cores=16, memory=1 << 36, bandwidth=4e11, power="AC", system="macOS",
    python="3.12", mlx="0.32", device="gpu", moelocal="abc", date="2026-11-20T10:00:00Z", command="moelocal bench",
)  # fmt: skip
BIG = Identity("mlx-community/Big-4bit", "4 bits", 20 << 30, "aa")
SMALL = Identity("embedded", "4 bits", 5 << 20, "bb")


def row(
    figure: str, value: float, context: int, model: Identity = BIG, unit: str = "tokens/s", **more: object
) -> Row:
    base = Row(HEADER, model, "speed", "moelocal", f"context={context}", figure, unit, value)
    return replace(base, **more)  # type: ignore[arg-type]


ROWS = [
    row("decode", 60.0, 1024),
    row("decode", 40.0, 32768),
    row("prefill", 900.0, 1024),
    row("decode energy", 0.5, 1024, unit="J/token"),
    row("decode", 5000.0, 1024, SMALL),
    row("decode", 999.0, 1024, program="mlx-lm 0.32.2"),
    row("decode ratio", 999.0, 1024, program="moelocal : mlx-lm 0.32.2", unit="ratio"),
    row("decode", 999.0, 1024, benchmark="other"),
]


def test_without_a_measurement_everything_is_assumed_and_says_so():
    here = local.machine([], None, 1000.0)
    for figure, flag in (
        (here.prefill, "--prefill-tokens-per-second"),
        (here.decode, "--tokens-per-second"),
        (here.prefill_watts, "--watts"),
        (here.decode_watts, "--watts"),
        (here.price, "--price-per-kwh"),
    ):
        assert figure.origin == f"assumed, not measured; {flag} sets it"
    assert here.warning == ""


def test_what_was_measured_is_taken_of_the_largest_model_at_the_nearest_context():
    here = local.machine(ROWS, None, 1500.0)
    origin = "measured: Big-4bit, context=1024, Apple M4 Max, 2026-11-20"
    assert here.decode == Figure(60.0, origin)
    assert here.prefill == Figure(900.0, origin)
    assert here.decode_watts == Figure(0.5 * 60.0, origin)  # joules per token times tokens per second
    assert here.prefill_watts == Figure(local.WATTS, "assumed, not measured; --watts sets it")
    assert local.machine(ROWS, None, 30_000.0).decode.value == 40.0


def test_of_equal_contexts_the_newest_counts():
    newer = row("decode", 70.0, 1024, header=replace(HEADER, date="2026-11-21T10:00:00Z"))
    assert local.machine([newer, *ROWS], None, 1024.0).decode.value == 70.0


def test_a_named_model_counts_alone_and_a_small_one_warns():
    assert local.machine(ROWS, "some/Other", 1000.0).decode.origin.startswith("assumed")
    here = local.machine(ROWS, "embedded", 1000.0)
    assert here.decode.value == 5000.0
    assert here.warning == (
        "the speeds were measured with embedded, which is far too small to take over such calls; measure a real model "
        "with moelocal bench, or give --tokens-per-second"
    )
    assert local.machine(ROWS, "embedded", 1000.0, decode=30.0).warning == ""


SHAPE = Identity("/tmp/slice", "4 bits, random weights", 90 << 30, "cc")


def test_random_weights_are_not_the_speed_of_this_machine():
    here = local.machine([*ROWS, row("decode", 7000.0, 1024, SHAPE)], None, 1024.0)
    assert (here.decode.value, here.warning) == (60.0, "")


def test_where_no_real_model_was_measured_speeds_are_assumed_and_it_is_said():
    rows = [row("decode", 7000.0, 1024, SHAPE), row("decode", 5000.0, 1024, SMALL)]
    here = local.machine(rows, None, 1024.0)
    assert here.decode == Figure(local.DECODE, "assumed, not measured; --tokens-per-second sets it")
    assert here.warning == (
        "no real model was measured here (slice has random weights and answers nothing, embedded is far too small to "
        "take over such calls); moelocal bench --model NAME does it"
    )
    assert local.machine(rows, None, 1024.0, prefill=1.0, decode=1.0).warning == ""
    assert local.machine(rows, "some/Other", 1024.0).warning == ""


def test_random_weights_that_are_named_warn():
    here = local.machine([row("decode", 7000.0, 1024, SHAPE)], SHAPE.name, 1024.0)
    assert here.decode.value == 7000.0
    assert here.warning == (
        "the speeds were measured with /tmp/slice, which has random weights and answers nothing; measure a real model "
        "with moelocal bench, or give --tokens-per-second"
    )


def test_what_is_given_counts_before_what_was_measured():
    here = local.machine(ROWS, None, 1000.0, prefill=1.0, decode=2.0, watts=3.0, price=0.0)
    assert [
        each.value for each in (here.prefill, here.decode, here.prefill_watts, here.decode_watts, here.price)
    ] == [
        1.0,
        2.0,
        3.0,
        3.0,
        0.0,
    ]
    assert here.decode.origin == "given by --tokens-per-second"


def test_energy_in_another_unit_is_refused():
    with pytest.raises(RequestError) as caught:
        local.machine([*ROWS, row("prefill energy", 1.0, 1024, unit="W")], None, 1000.0)
    assert str(caught.value) == "results: prefill energy: expected the unit J/token, got W"


def machine(prefill: float, decode: float, watts: float, price: float) -> Machine:
    figures = [Figure(value, "") for value in (prefill, decode, watts, 2 * watts, price)]
    return Machine(*figures)


def test_time_and_energy_of_prompts_and_answers_are_apart():
    found = local.cost(machine(500.0, 20.0, 50.0, 0.30), 100_000, 2_000)
    assert (found.prefill_seconds, found.decode_seconds, found.seconds) == (200.0, 100.0, 300.0)
    assert found.kwh == pytest.approx((200 * 50 + 100 * 100) / 3.6e6)
    assert found.dollars == pytest.approx(found.kwh * 0.30)


def test_break_even_is_the_formula():
    even = local.break_even(3600.0, 3.0, api=10.0, local=Local(100.0, 900.0, 1.0, 2.0), calls=1000,
                            tokens=500_000, calls_per_month=5000.0)  # fmt: skip
    # 3600 over 36 months are 100 a month; a call saves 0.010 - 0.002
    assert even.calls == pytest.approx(100 / 0.008)
    assert even.tokens == pytest.approx(100 / 0.008 * 500)
    assert even.months == pytest.approx(3600 / (0.008 * 5000))
    assert even.most_calls == pytest.approx(SECONDS_PER_MONTH)  # a second each


@pytest.mark.parametrize(("volume", "answered"), [(500.0, 500.0), (1000.0, 1000.0), (5000.0, 1000.0)])
def test_a_machine_is_paid_for_by_no_more_calls_than_it_answers(volume, answered):
    slow = Local(0.0, SECONDS_PER_MONTH / 10, 0.0, 0.0)  # 100 calls in a tenth of a month
    even = local.break_even(2400.0, 3.0, api=1.0, local=slow, calls=100, tokens=1, calls_per_month=volume)
    assert even.most_calls == pytest.approx(1000.0)
    assert even.months == pytest.approx(2400 / (0.01 * answered))


def test_where_a_call_saves_nothing_there_is_no_break_even():
    even = local.break_even(3600.0, 3.0, 1.0, Local(1.0, 1.0, 1.0, 1.0), 10, 100, 50.0)
    assert (even.calls, even.tokens, even.months) == (None, None, None)


def test_only_the_results_of_this_machine_are_read(tmp_path):
    results.append(tmp_path, ROWS)
    assert [each.value for each in local.measured(tmp_path, "apple-m4-max")] == [each.value for each in ROWS]
    assert local.measured(tmp_path, "apple-m1") == []


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x", ""])
def test_a_flag_that_is_no_number_above_zero_is_refused(text, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--x", type=local.number(0))
    with pytest.raises(SystemExit):
        parser.parse_args([f"--x={text}"])
    assert f"argument --x: expected a number above 0, got '{text}'\n" in capsys.readouterr().err
    parser.add_argument("--y", type=local.number(0, zero=True))
    assert parser.parse_args(["--y=0"]).y == 0.0
    with pytest.raises(SystemExit):
        parser.parse_args(["--y=-1"])
    assert "argument --y: expected a number from 0, got '-1'\n" in capsys.readouterr().err
