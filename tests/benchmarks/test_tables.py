"""The figures in README.md and docs/*.md are those of the files of results."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable
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
    names = {name for page in tables.pages(ROOT) for name in tables.BEGIN.findall(page.read_text())}
    assert names == set(tables.TABLES)
    assert tables.BEGIN.findall((ROOT / "README.md").read_text()) == ["scale-slice"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Of the pages, and of the results."""
    (tmp_path / "docs").mkdir()
    for page in tables.pages(ROOT):
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_a_figure_that_was_changed_by_hand_is_found_and_put_right(copy, capsys, name):
    where = ["--results", str(copy / "results"), "--pages", str(copy)]
    page = copy / name
    text = page.read_text()
    begin = text.index("<!-- table: scale-slice -->")
    place = re.compile(r"\d\.\d\d \(").search(text, begin)
    assert place
    other = "8" if text[place.start()] == "9" else "9"
    page.write_text(text[: place.start()] + other + text[place.start() + 1 :])
    assert tables.main([*where, "--check"]) == 1
    assert capsys.readouterr().err == (
        f"moelocal: error: {name}: tables differ from {copy}/results; run python benchmarks/tables.py\n"
    )
    assert tables.main(where) == 0 and page.read_text() == text
    assert tables.main([*where, "--check"]) == 0


def _markers(*gone: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        page = root / "README.md"
        text = page.read_text()
        for marker in gone:
            assert text.count(marker) == 1
            text = text.replace(marker + "\n", "")
        page.write_text(text)

    return change


def _without(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        page = root / "docs" / "benchmarks.md"
        before, _, rest = page.read_text().partition(f"<!-- table: {name} -->\n")
        page.write_text(before + rest.partition(tables.END + "\n")[2])

    return change


def _renamed(root: Path) -> None:
    (file,) = (root / "results").glob("*.tsv")
    shutil.copy(file, file.with_name("old.tsv"))


def _other_file(root: Path) -> None:
    (root / "results" / "notes.txt").write_text("a note")


def _other_columns(root: Path) -> None:
    (root / "results" / "mine.tsv").write_text("speed\tcontext\n1\t2\n")


SLICE = "<!-- table: scale-slice -->"
HEAD = "| tokens of context | prefill, moelocal | prefill, mlx-lm | "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_markers(SLICE), "README.md: expected {slice} in front of a table and {end} behind it; one of them is missing "
         "around: {head}"),
        (_markers(SLICE, tables.END), "README.md: expected {slice} in front of a table and {end} behind it; one of "
         "them is missing around: {head}"),
        (_markers(tables.END), "README.md: table scale-slice: expected {end} behind it"),
        (_without("speed"), "no page has the table speed; write <!-- table: speed --> and {end} where it belongs, each "
         "on a line of its own, and run python benchmarks/tables.py"),
        (_renamed, "{root}/results/old.tsv: holds figures of {machine}; move these lines to {machine}.tsv, or the file "
         "away"),
        (_other_file, "{root}/results/notes.txt: expected results (MACHINE.tsv) and plots (.png) here; move it away"),
        (_other_columns, "{root}/results/mine.tsv: unknown columns speed, context; move the file away, and a new one "
         "is begun"),
    ],
)  # fmt: skip
def test_what_was_broken_is_named_with_what_to_do(copy, capsys, change, message):
    machine = next((copy / "results").glob("*.tsv")).stem
    change(copy)
    assert tables.main(["--results", str(copy / "results"), "--pages", str(copy), "--check"]) == 1
    told = message.format(slice=SLICE, end=tables.END, head=HEAD[:60], root=copy, machine=machine)
    assert capsys.readouterr().err == f"moelocal: error: {told}\n"


def test_a_marker_behind_which_nothing_begins_is_named():
    with pytest.raises(ConfigError) as error:
        tables.filled(f"{PAGE}{tables.END}\n", rows())
    assert str(error.value) == (
        f"page: expected <!-- table: NAME --> in front of a table and {tables.END} behind it; one of them is missing "
        f"around: {tables.END}"
    )


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
        f"flagship layers=4, 4.50 bits per weight, 1.00 GB. {SOURCE}\n"
        "<!-- end of table -->\n\nText.\n"
    )


def test_the_last_run_of_each_machine_counts_and_macs_come_first():
    later = dataclasses.replace(HEADER, date="2026-01-03T00:00:00Z")
    mac = dataclasses.replace(HEADER, machine="z-mac", chip="Some Mac", system="macOS 26.1, kernel 25")
    first = dataclasses.replace(HEADER, machine="a-chip", chip="A Chip")
    text = tables.filled(PAGE, [*rows(40.0, later), *rows(20.0), *rows(60.0, mac), *rows(80.0, first)])
    found = [line for line in text.splitlines() if re.match(r"\*\*|\| 1,024", line)]
    assert [line[:60] for line in found] == [
        "**Some Mac, 2 cores, 24 GB**",
        "| 1,024 | 600 | 100 | 6.00 (1.50 to 2.50) | 60.0 | 10.0 | 6.00 (1.50 to 2.50) | 3.00 GB | 3.00 GB |"[
            :60
        ],
        "**A Chip, 2 cores, 24 GB**",
        "| 1,024 | 800 | 100 | 8.00 (1.50 to 2.50) | 80.0 | 10.0 | 8.00 (1.50 to 2.50) | 3.00 GB | 3.00 GB |"[
            :60
        ],
        "**Some Chip, 2 cores, 24 GB**",
        "| 1,024 | 400 | 100 | 4.00 (1.50 to 2.50) | 40.0 | 10.0 | 4.00 (1.50 to 2.50) | 3.00 GB | 3.00 GB |"[
            :60
        ],
    ]


def test_runs_that_were_stopped_early_and_trials_are_on_no_page():
    def of(date: str, value: float, count: int = 3, remark: str = "") -> list[Row]:
        header = dataclasses.replace(HEADER, date=date)
        facts = (header, MODEL, "speed", "moelocal", "context=0 tokens=8 dtype=float32")
        load = Row(header, MODEL, "speed", "moelocal", "dtype=float32", "load", "s", value, None, None, count)
        return [load, Row(*facts, "decode", "tokens/s", value, None, None, count, remark)]

    found = [
        *of("2026-01-01", 1.0),
        *of("2026-01-03", 3.0, 3, "stopped early"),
        *of("2026-01-04", 4.0, 3, "tokens estimated with our tokenizer; stopped early"),
        *of("2026-01-05", 5.0, 2),
    ]
    text = tables.made("speed", found)
    assert "| 0 | decode, tokens/s | 1.00 |" in text and text.count("decode, tokens/s") == 1
    assert "|  | load, s | 1.00 |" in text
    # of another benchmark an older run counts, whatever stopped since
    assert "| 1,024 | 200 |" in tables.made("scale-slice", [*rows(), *found])
    assert tables.made("speed", found[2:]) == ""


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
            f"page: no table 'speeds'; expected one of {', '.join(tables.TABLES)}",
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
    assert [line for line in text.splitlines() if line.startswith("**")] == [
        "**Some Chip, 2 cores, 24 GB, a**",
        "**Some Chip, 2 cores, 24 GB, b**",
    ]
    lines = [line for line in text.splitlines() if line.startswith("| 0")]
    assert lines == ["| 0 | decode, tokens/s | 2.00 |", "| 0 | decode, tokens/s | 3.00 |"]


def _point(axis: str, x: int, nbytes: int, count: int = 3) -> list[Row]:
    """Both programs at one point of an axis, and their memory."""
    facts = (HEADER, dataclasses.replace(MODEL, nbytes=nbytes), "scale")
    where = f"axis={axis} context=512" + (f" {axis}={x}" if axis != "context" else "")
    where = where.replace("context=512", f"context={x}") if axis == "context" else where
    found = []
    for name in ("moelocal", "mlx-lm 0.32.2") if count else ():
        for figure in ("prefill", "decode"):
            found.append(Row(*facts, name, where, figure, "tokens/s", 20.0, 19.0, 21.0, count))
    for figure in ("prefill", "decode") if count else ():
        found.append(Row(*facts, "moelocal : mlx-lm 0.32.2", where, f"{figure} ratio", "ratio", 1.0, 0.9, 1.1, count,
                         "same greedy choice: 9 of 9"))  # fmt: skip
    for name in ("moelocal", "mlx-lm 0.32.2"):
        for figure in ("MLX memory", "resident memory"):
            found.append(Row(*facts, name, where, figure, "bytes", 1e6 * x))
    return found


def test_the_table_of_layers_says_how_large_the_weights_are():
    lines = tables.made("scale-layers", [*_point("layers", 4, 36_000_000), *_point("layers", 8, 67_000_000)])
    assert lines.splitlines()[0].startswith("| layers | weights | prefill, moelocal |")
    assert [line[:20] for line in lines.splitlines()[2:4]] == ["| 4 | 36.0 MB | 20.0", "| 8 | 67.0 MB | 20.0"]


def test_the_table_of_memory_goes_further_than_that_of_speeds_and_counts_runs():
    found = [*_point("context", 256, 10**6), *_point("context", 512, 10**6, count=0)]
    assert tables.made("scale-memory", found).splitlines()[2:4] == [
        "| 256 | 1 | 256 MB | 256 MB | 256 MB | 256 MB |",
        "| 512 | 1 | 512 MB | 512 MB | 512 MB | 512 MB |",
    ]
    speeds = tables.made("scale-context", found)
    assert "| 256 | 20.0 |" in speeds and "| 512 |" not in speeds


def test_what_grows_faster_than_its_work_is_said():
    def of(axis: str, low: float) -> list[Row]:
        facts, where = (HEADER, None, "scale"), f"axis={axis}"
        return [
            Row(*facts, name, where, f"{figure} {what}", "exponent", low + 0.1, *ends)
            for figure in ("prefill", "decode")
            for name, what, ends in (
                ("work", "cost", (None, None)),
                ("moelocal", "cost", (low, low + 0.2)),
                ("moelocal", "excess", (low if figure == "prefill" else -1.0, low + 0.2)),
                ("mlx-lm 0.32.2", "cost", (low, low + 0.2)),
                ("mlx-lm 0.32.2", "excess", (-0.1, 0.2)),
            )
        ]

    assert "\nGrows faster than its work: prefill over experts (moelocal).\n" in tables.made(
        "scale-exponents", [*of("experts", 0.3), *of("layers", -0.2)]
    )
    assert "\nGrows faster than its work: nothing, as far as these points show.\n" in tables.made(
        "scale-exponents", of("layers", -0.2)
    )


def test_the_table_of_unpacking_has_its_share():
    facts, where = (
        (HEADER, None, "unpacking", "moelocal"),
        "experts=512 tokens=512 hidden=512 width=128 per_token=8",
    )
    found = [
        Row(*facts, where, "seconds", "s", 0.2, 0.1, 0.3, 9),
        Row(*facts, where, "unpacking", "s", 0.15, 0.1, 0.2, 9),
        Row(*facts, where, "seconds_in_turn", "s", 0.25, 0.2, 0.3, 9),
    ]
    assert tables.made("unpacking", found).splitlines() == [
        "| experts | tokens for each expert | layer, ms | in turn, ms | of it unpacking, ms | share |",
        "| :-- | --: | --: | --: | --: | --: |",
        "| 512 | 8 | 200 | 250 | 150 | 60% |",
        "",
        "A prompt of 512 tokens, medians of 9 rounds. " + SOURCE.replace(", mlx-lm 0.32.2", ""),
    ]
