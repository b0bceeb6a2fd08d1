"""benchmarks/cost.py: its log, what it adds to the results, and the table of docs/cost.md."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tables

import cost as script
from moelocal.bench import bandwidth, results
from moelocal.bench.header import Header
from moelocal.cost import command

HEADER = Header(
    machine="some-chip", chip="Some Chip", cores=2, memory=24 << 30, bandwidth=3e10, power="unknown",
    system="Some Linux, kernel 6", python="3.11", mlx="0.32.4", device="cpu", moelocal="0123456789ab",
    date="2026-01-02T03:04:05Z", command="python benchmarks/cost.py",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_prices_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def measured(tmp_path, monkeypatch, capsys, lines: int, header: Header) -> None:
    """Run the script on so many lines."""
    monkeypatch.setattr(script.Header, "now", lambda command: header)
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    flags = (
        "--results",
        str(tmp_path),
        "--machine-price",
        "3600",
        "--tokens-per-second",
        "20",
        "--watts",
        "50",
    )
    parsed = parser.parse_args([*flags, "--prefill-tokens-per-second", "400", "--price-per-kwh", "0.25"])
    script.run(
        argparse.Namespace(**vars(parsed), lines=lines, log_seed=1, keep=None, rounds=1, no_results=False)
    )
    capsys.readouterr()


def test_the_table_holds_every_row_of_the_last_run_of_10_000_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "lines", short := lambda count, seed, real=script.lines: real(200, seed))
    measured(tmp_path, monkeypatch, capsys, 10_000, HEADER)
    # somebody's trial of fewer lines is on no page, though it is younger
    measured(tmp_path, monkeypatch, capsys, 50, replace(HEADER, date="2026-01-03T03:04:05Z"))
    (file,) = tmp_path.glob("*.tsv")
    rows = results.read(file)
    first, second, *body, empty, source = tables.made("cost", rows).splitlines()
    assert (first, second, empty) == ("| a log of 10,000 lines | figure |", "| :-- | --: |", "")
    found = [row for row in rows if row.settings["lines"] == "10000"]
    assert [line.split(" | ")[0] for line in body] == [f"| {row.figure}, {row.unit}" for row in found]
    values = {
        row.figure: (line.split(" | ")[1].removesuffix(" |"), row)
        for line, row in zip(body, found, strict=True)
    }
    fates = [int(values[fate][0]) for fate in ("read", "empty", "malformed", "of unknown shape")]
    assert sum(fates) == len(list(short(0, 1))) == 200
    even = values["break-even"][1].value
    assert values["break-even"][0] == f"{even:,.0f}"
    assert source == (
        "Here, on this machine: prefill 400 tokens/s (given by --prefill-tokens-per-second); "
        "decode 20 tokens/s (given by --tokens-per-second); power 50 W (given by --watts); "
        "energy 0.25 dollars/kWh (given by --price-per-kwh). A machine of 3,600 dollars over 3 years. "
        "Some Chip, 2 cores, 24 GB, Some Linux, MLX 0.32.4 on cpu; 2026-01-02; moelocal 0123456789ab: "
        "`python benchmarks/cost.py`."
    )


def test_the_generated_log_is_the_same_for_a_seed():
    assert list(script.lines(50, 1)) == list(script.lines(50, 1)) != list(script.lines(50, 2))
    assert len(list(script.lines(50, 1))) == 50


def test_the_script_refuses_a_log_that_it_cannot_write(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/cost.py", "--keep", "/nope/x"])
    assert script.main() == 1
    assert capsys.readouterr().err == (
        "moelocal: error: /nope/x: the log cannot be written: No such file or directory\n"
    )


def test_the_script_writes_over_nothing(tmp_path, capsys, monkeypatch):
    mine = tmp_path / "mine"
    mine.write_text("x")
    for flag, message in (
        ("--keep", f"{mine}: the log cannot be written: File exists"),
        ("--rejects", f"{mine}: is there already, and is no list of such lines; name another file with --rejects, "
                      "or move it away"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["benchmarks/cost.py", "--no-results", flag, str(mine)])
        assert script.main() == 1
        captured = capsys.readouterr()
        assert (captured.out, captured.err) == ("", f"moelocal: error: {message}\n")
        assert mine.read_text() == "x"


def test_the_script_takes_no_log(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/cost.py", "--no-results", "no-such.jsonl"])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    assert "error: unrecognized arguments: no-such.jsonl" in capsys.readouterr().err


def test_the_script_reports_and_adds_its_seconds_to_the_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bandwidth, "measured", lambda: 1e9)  # takes a second
    monkeypatch.setattr(
        sys, "argv", ["benchmarks/cost.py", "--lines", "50", "--rounds", "2", "--results", str(tmp_path)]
    )
    assert script.main() == 0
    output = capsys.readouterr().out
    assert output.startswith("50 lines read, counted and priced in ")
    (file,) = tmp_path.glob("*.tsv")
    row, *figures = results.read(file)
    assert (row.benchmark, row.setting, row.figure, row.unit, row.count) == (
        "cost",
        "lines=50 seed=1",
        "report",
        "s",
        2,
    )
    assert 0 < row.low <= row.value <= row.high
    by_unit = {unit: [each.value for each in figures if each.unit == unit] for unit in ("lines", "dollars")}
    assert sum(by_unit["lines"]) == 50 and len(by_unit["lines"]) == 4
    assert by_unit["dollars"][0] > 0
    (here,) = {each.remark for each in figures if each.unit in ("hours", "kWh")}
    assert here.startswith(
        "Here, on this machine: prefill 500 tokens/s (assumed); decode 30 tokens/s (assumed); "
    )
