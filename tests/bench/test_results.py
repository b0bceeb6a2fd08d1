"""The file of results: what goes in comes out, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moelocal
from moelocal.bench import results
from moelocal.bench.header import Header, Identity
from moelocal.bench.results import COLUMNS, Row, append, read
from moelocal.errors import ConfigError, RequestError

HEADER = Header(
    machine="apple-m4-max",
    chip="Apple M4 Max",
    cores=16,
    memory=64 << 30,
    bandwidth=412_345_678_901,
    power="high power, AC Power",
    system="macOS 26.1",
    python="3.12.1",
    mlx="0.32.4",
    device="gpu (applegpu_g16s)",
    moelocal="0123456789ab",
    date="2026-11-21T12:00:00Z",
    command="moelocal bench",
)
MODEL = Identity(
    "owner/model", "4.50 bits per weight, most in affine 4 bits in groups of 64", 20_912_345_678, "ab12"
)
ROW = Row(
    HEADER, MODEL, "speed", "moelocal", "context=1024 tokens=128", "decode", "tokens/s", 91.25, 90.5, 92.0, 5
)


def test_rows_come_back_as_they_went_in(tmp_path):
    other = replace(
        ROW, model=None, program="m at localhost:1", low=None, high=None, count=1, remark="estimated"
    )
    file = append(tmp_path / "new", [ROW, other])
    assert file == tmp_path / "new" / "apple-m4-max.tsv"
    assert append(tmp_path / "new", [replace(ROW, value=7.0)]) == file
    assert read(file) == [ROW, other, replace(ROW, value=7.0)]
    assert read(file)[0].settings == {"context": "1024", "tokens": "128"}
    assert file.read_text().splitlines()[0].split("\t") == list(COLUMNS)
    assert sorted(path.name for path in file.parent.iterdir()) == ["apple-m4-max.tsv"]


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=20),
    value=st.floats(allow_nan=False, allow_infinity=False, width=32),
    count=st.integers(1, 10**6),
)
def test_whatever_a_text_holds_a_row_stays_one_line(text, value, count, tmp_path):
    file = tmp_path / "apple-m4-max.tsv"
    file.unlink(missing_ok=True)
    append(tmp_path, [replace(ROW, remark=text, value=value, count=count), ROW])
    first, second = read(file)
    assert second == ROW
    assert first.remark == " ".join(text.split())
    assert first.count == count
    # six digits are kept, of large numbers all before the point
    assert first.value == pytest.approx(value, rel=1e-5, abs=1e-300)


def test_columns_that_are_not_known_are_an_error_and_nothing_is_written(tmp_path):
    file = append(tmp_path, [ROW])
    old = file.read_text().replace("remark", "mood", 1)
    file.write_text(old)
    for call in (lambda: read(file), lambda: append(tmp_path, [ROW])):
        with pytest.raises(ConfigError) as caught:
            call()
        assert (
            str(caught.value) == f"{file}: unknown columns mood; move the file away, and a new one is begun"
        )
    assert file.read_text() == old


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda text: text.replace("\tremark", "", 1),
            "missing columns remark; move the file away, and a new one is begun",
        ),
        (
            lambda text: text.replace("count\tremark", "remark\tcount", 1),
            "columns in another order; move the file away, and a new one is begun",
        ),
        (lambda text: text.replace("91.25", "fast"), "line 2: value: expected a number, got 'fast'"),
        (lambda text: text.replace("91.25", ""), "line 2: value: expected a number, got nothing"),
        (lambda text: text + "half a li", f"line 3: expected {len(COLUMNS)} cells, got 1"),
    ],
)  # fmt: skip
def test_a_damaged_file_says_where(change, words, tmp_path):
    file = append(tmp_path, [ROW])
    file.write_text(change(file.read_text()))
    with pytest.raises(ConfigError) as caught:
        read(file)
    assert str(caught.value) == f"{file}: {words}"


def test_a_file_that_append_would_refuse_is_known_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "machine_name", lambda: "apple-m4-max")
    file = append(tmp_path, [ROW])
    results.require_writable(tmp_path)
    no_text = "is no text; move the file away, and a new one is begun"
    other_columns = "unknown columns mood; move the file away, and a new one is begun"
    whole = file.read_bytes()
    for data, words in ((b"\xff\xfe\0", no_text), (whole.replace(b"remark", b"mood", 1), other_columns)):
        file.write_bytes(data)
        for call in (
            lambda: read(file),
            lambda: append(tmp_path, [ROW]),
            lambda: results.require_writable(tmp_path),
        ):
            with pytest.raises(ConfigError) as caught:
                call()
            assert str(caught.value) == f"{file}: {words}"
        assert file.read_bytes() == data


def test_what_cannot_be_read_or_written_is_an_error_of_ours(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "none.tsv")
    assert str(caught.value) == f"{tmp_path}/none.tsv: cannot be read: No such file or directory"
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError) as refused:
        append(tmp_path / "file", [ROW])
    assert str(refused.value) == f"{tmp_path}/file/apple-m4-max.tsv: results cannot be written: File exists"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = append(tmp_path, [ROW])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match="No space left on device"):
        append(tmp_path, [ROW])
    assert read(file) == [ROW]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_processes_that_add_at_once_lose_nothing(tmp_path):
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "sys.path.insert(0, sys.argv[1]); from bench.test_results import ROW\n"
        "from moelocal.bench.results import append\n"
        "for i in range(5): append(Path(sys.argv[2]), [replace(ROW, value=float(sys.argv[3]) + i)])\n"
    )
    tests = str(Path(__file__).parents[1])
    place = {"PYTHONPATH": str(Path(moelocal.__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, tests, str(tmp_path), str(100 * n)], env=os.environ | place
        )
        for n in range(3)
    ]
    assert [process.wait() for process in started] == [0, 0, 0]
    values = [row.value for row in read(tmp_path / "apple-m4-max.tsv")]
    assert sorted(values) == [100.0 * n + i for n in range(3) for i in range(5)]


def test_results_lie_in_the_checkout_or_in_the_state_folder(tmp_path, monkeypatch, root):
    monkeypatch.setattr(moelocal, "__file__", str(root / "src" / "moelocal" / "__init__.py"))
    assert results.default_folder() == root / "benchmarks" / "results"
    monkeypatch.setattr(moelocal, "__file__", str(tmp_path / "lib" / "python" / "moelocal" / "__init__.py"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert results.default_folder() == tmp_path / "state" / "moelocal" / "results"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert results.default_folder() == tmp_path / "home/.local/state/moelocal/results"


def test_a_folder_that_cannot_be_written_is_known_before_measuring(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(RequestError) as caught:
            results.require_writable(folder)
        assert str(caught.value) == (
            f"--results {folder}: cannot be written; name another folder, or --no-results"
        )
    results.require_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
