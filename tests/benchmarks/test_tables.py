"""The figures in README.md and docs/*.md are those of the files of results."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402

from moelocal.bench import results  # noqa: E402
from moelocal.bench.header import Header, Identity  # noqa: E402
from moelocal.bench.results import Row  # noqa: E402
from moelocal.errors import ConfigError  # noqa: E402

HEADER = Header(
    machine="some-chip", chip="Some Chip", cores=2, memory=24 << 30, bandwidth=3e10, power="unknown",
    system="Some Linux, kernel 6", python="3.11", mlx="0.32.4", device="cpu (x86_64)", moelocal="0123456789ab",
    date="2026-01-02T03:04:05Z", command="python benchmarks/scale.py --slice",
)  # fmt: skip
MODEL = Identity("flagship layers=4", "4.50 bits per weight", 10**9, "abc")
SOURCE = (
    "Some Chip, 2 cores, 24 GB, Some Linux, MLX 0.32.4 on cpu (x86_64); 2026-01-02; "
    "moelocal 0123456789ab, mlx-lm 0.32.2: `python benchmarks/scale.py --slice`."
)
PAGE = "# Title\n\n<!-- table: scale-slice -->\nold\n<!-- end of table -->\n\nText.\n"


def rows(value: float = 20.0, header: Header = HEADER) -> list[Row]:
    """One point of the slice."""
    facts, where = (header, MODEL, "scale"), "axis=slice context=1024"
    found = [
        Row(*facts, name, where, "resident memory", "bytes", 3e9) for name in ("moelocal", "mlx-lm 0.32.2")
    ]
    for figure, factor in (("prefill", 10.0), ("decode", 1.0)):
        ours, theirs = value * factor, 10 * factor
        found += [
            Row(*facts, "moelocal", where, figure, "tokens/s", ours, ours - 1, ours + 1, 3),
            Row(*facts, "mlx-lm 0.32.2", where, figure, "tokens/s", theirs, theirs - 1, theirs + 1, 3),
            Row(*facts, "moelocal : mlx-lm 0.32.2", where, f"{figure} ratio", "ratio", ours / theirs, 1.5, 2.5, 3,
                "same greedy choice: 71 of 72"),
            Row(*facts, "work", where, f"{figure} work", "multiply-adds/token", 1e9),
        ]  # fmt: skip
    return found[2:] + found[:2]


def test_the_pages_say_what_the_results_say():
    assert tables.main(["--check"]) == 0, "run python benchmarks/tables.py"


def test_the_pages_have_tables():
    names = [name for page in tables.pages(ROOT) for name in tables.BEGIN.findall(page.read_text())]
    assert {"scale-context", "scale-experts", "scale-layers", "scale-exponents", "scale-memory"} <= set(names)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Of the pages, and of the results."""
    (tmp_path / "docs").mkdir()
    for page in tables.pages(ROOT):
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    return tmp_path


def test_a_figure_that_was_changed_by_hand_is_found_and_put_right(copy, capsys):
    where = ["--results", str(copy / "results"), "--pages", str(copy)]
    page = copy / "docs" / "benchmarks.md"
    text = page.read_text()
    begin = text.index("<!-- table: scale-context -->")
    place = re.compile(r"\d\.\d\d \(").search(text, begin)
    assert place
    other = "8" if text[place.start()] == "9" else "9"
    page.write_text(text[: place.start()] + other + text[place.start() + 1 :])
    assert tables.main([*where, "--check"]) == 1
    assert capsys.readouterr().err == (
        f"moelocal: error: docs/benchmarks.md: tables differ from {copy}/results; run python benchmarks/tables.py\n"
    )
    assert tables.main(where) == 0 and page.read_text() == text
    assert tables.main([*where, "--check"]) == 0


def test_new_results_make_a_page_old(copy):
    where = ["--results", str(copy / "results"), "--pages", str(copy)]
    (copy / "README.md").write_text(PAGE)
    results.append(copy / "results", rows())
    assert tables.main([*where, "--check"]) == 1
    assert tables.main(where) == 0
    assert tables.main([*where, "--check"]) == 0
    results.append(copy / "results", rows(30.0, dataclasses.replace(HEADER, date="2026-01-03T00:00:00Z")))
    assert tables.main([*where, "--check"]) == 1


def test_a_table_says_where_its_figures_come_from():
    assert tables.filled(PAGE, rows()) == (
        "# Title\n\n<!-- table: scale-slice -->\n"
        "| tokens of context | prefill, moelocal | prefill, mlx-lm | prefill, ratio (95 %) | decode, moelocal | "
        "decode, mlx-lm | decode, ratio (95 %) | resident memory, moelocal | resident memory, mlx-lm |\n"
        "| :-- | --: | --: | --: | --: | --: | --: | --: | --: |\n"
        "| 1,024 | 200 | 100 | 2.00 (1.50 to 2.50) | 20.0 | 10.0 | 2.00 (1.50 to 2.50) | 3.00 GB | 3.00 GB |\n"
        "\n"
        "Tokens/s, medians of 3 rounds or more; 71 of 72 greedy choices are the same. "
        f"{SOURCE}\n"
        "<!-- end of table -->\n\nText.\n"
    )


def test_the_last_run_of_each_machine_counts():
    later = dataclasses.replace(HEADER, date="2026-01-03T00:00:00Z")
    other = dataclasses.replace(HEADER, machine="other", chip="Other")
    text = tables.filled(PAGE, [*rows(40.0, later), *rows(20.0), *rows(60.0, other)])
    assert text.count("| 1,024 |") == 2
    assert "4.00 (" in text and "6.00 (" in text and "2.00 (" not in text
    assert text.index("Other, 2 cores") < text.index("Some Chip, 2 cores")


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace(tables.END, ""), f"page: table scale-slice: expected {tables.END} behind it"),
        (
            "<!-- table: scale-slice -->\n" + PAGE,
            "page: table scale-slice: begins before the one in front of it ends",
        ),
        (PAGE.replace("scale-memory", "").replace("scale-slice", "scale-memory"),
         "page: table scale-memory: no file of results has figures for it"),
        (
            PAGE.replace("scale-slice", "speeds"),
            "page: no table 'speeds'; expected one of speed, scale-slice, scale-context, scale-experts, scale-layers, "
            "scale-exponents, scale-memory",
        ),
    ],
)  # fmt: skip
def test_a_marker_that_cannot_be_filled_is_named(page, message):
    with pytest.raises(ConfigError) as error:
        tables.filled(page, rows())
    assert str(error.value) == message


def test_the_table_of_speeds_has_every_program():
    facts, where = (HEADER, MODEL, "speed"), "context=512 tokens=128 dtype=float32"
    found = [
        Row(*facts, "moelocal", where, "decode", "tokens/s", 300.0, 290.0, 310.0, 5),
        Row(*facts, "mlx-lm 0.32.2", where, "decode", "tokens/s", 150.0, 140.0, 160.0, 5),
        Row(*facts, "moelocal", where, "MLX memory", "bytes", 12e6, 12e6, 12e6, 5),
        Row(
            *facts,
            "moelocal : mlx-lm 0.32.2",
            where,
            "decode ratio",
            "ratio",
            2.0,
            1.9,
            2.1,
            5,
            "same tokens",
        ),
    ]
    assert list(tables.TABLES["speed"][1](found))[2:4] == [
        "| 512 | decode, tokens/s | 300 | 150 | 2.00 (1.90 to 2.10) |",
        "| 512 | MLX memory, MB | 12 |  |  |",
    ]


def test_there_is_a_table_of_speeds_for_each_model():
    def of(name: str, date: str, value: float) -> list[Row]:
        header = dataclasses.replace(HEADER, date=date)
        model, where = dataclasses.replace(MODEL, name=name), "context=0 tokens=8 dtype=float32"
        return [Row(header, model, "speed", "moelocal", where, "decode", "tokens/s", value, None, None, 3)]

    found = [*of("b", "2026-01-01", 1.0), *of("a", "2026-01-02", 2.0), *of("b", "2026-01-03", 3.0)]
    text = tables.filled(f"<!-- table: speed -->\n{tables.END}", found)
    assert text.count("\n\n| context |") == 1  # a blank line between tables
    lines = [line for line in text.splitlines() if line.startswith("| 0")]
    assert lines == ["| 0 | decode, tokens/s | 2.00 |", "| 0 | decode, tokens/s | 3.00 |"]
