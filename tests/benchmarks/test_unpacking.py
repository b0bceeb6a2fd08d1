"""benchmarks/unpacking.py: what it times is the product, what it notes are rows of a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402
import unpacking  # noqa: E402

from moelocal.bench import results  # noqa: E402
from moelocal.ops import experts  # noqa: E402


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(unpacking, "EXPERTS", (8, 64))


def test_it_notes_every_figure_and_the_table_shows_them(tmp_path, capsys):
    assert unpacking.main(["--tokens", "40", "--rounds", "3", "--results", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    (file,) = tmp_path.iterdir()
    rows = results.read(file)
    assert {(row.benchmark, row.program, row.count) for row in rows} == {("unpacking", "moelocal", 3)}
    assert {row.setting for row in rows} == {
        f"experts={n} tokens=40 hidden=512 width=128 per_token=8" for n in (8, 64)
    }
    for row in rows:
        assert told[row.settings["experts"]][row.figure] == pytest.approx(row.value, rel=1e-5)
        assert row.low is not None and row.high is not None and 0 < row.low <= row.value <= row.high
    for each in told.values():
        assert 0 < each["unpacking"] < each["seconds_in_turn"]
    lines = tables.made("unpacking", rows).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| 8", "40"], ["| 64", "5"]]


def test_it_unpacks_every_expert_that_a_token_chose_once_each_way(monkeypatch):
    asked: list[int] = []
    dense, ahead = experts.dense, experts.ahead

    def counted(weight):
        found = dense(weight)
        asked.append(found.size)
        return found

    monkeypatch.setattr(experts, "dense", counted)
    unpacking.layer_of(8, 40)()
    assert sum(asked) == 2 * 8 * 3 * 512 * 128  # gate, up and down of all eight
    assert experts.ahead is ahead


def test_without_results_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "append", None)
    assert unpacking.main(["--tokens", "8", "--rounds", "1", "--no-results"]) == 0
    assert "of it unpacking" in capsys.readouterr().out


def test_only_a_run_as_the_table_has_it_is_noted_with_the_results_of_the_project(monkeypatch, capsys):
    noted = []
    monkeypatch.setattr(results, "append", lambda folder, rows: noted.append(folder))
    monkeypatch.setattr(unpacking, "TOKENS", 8)
    monkeypatch.setattr(unpacking, "ROUNDS", 1)
    for flags in (["--tokens", "9"], ["--rounds", "2"]):
        assert unpacking.main(flags) == 0
    assert noted == []
    assert unpacking.main([]) == 0
    assert noted == [ROOT / "benchmarks" / "results"]


def test_rounds_are_a_number_from_one(capsys):
    with pytest.raises(SystemExit) as ended:
        unpacking.main(["--rounds", "0"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: argument --rounds: expected an integer from 1, got '0'\n")
