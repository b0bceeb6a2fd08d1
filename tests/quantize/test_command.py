"""`moelocal quantize`: flags to arguments, what is printed, and the bar."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from pathlib import Path

import pytest

from moelocal import hub
from moelocal.errors import MoelocalError, RequestError
from moelocal.quantize import command
from moelocal.quantize.convert import WAITING
from moelocal.quantize.progress import progress_bar
from moelocal.units import size

EMBEDDED = str(hub.EMBEDDED)


def quantize(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    command.run(parser.parse_args(arguments))


def test_it_says_what_it_made_and_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quantize(EMBEDDED, "--recipe", "4bit", "--method", "minmax")
    weights = (tmp_path / "embedded-4bit" / "model.safetensors").stat().st_size
    expected = f"size         {size(weights)}, from 9.2 MB\nleft out     19 mtp tensors\n"
    assert capsys.readouterr() == (f"{tmp_path / 'embedded-4bit'}: done\n{expected}", "")
    quantize(EMBEDDED, "--recipe", "4bit", "--method", "minmax")
    assert capsys.readouterr().out == f"{tmp_path / 'embedded-4bit'}: was there already\n{expected}"


def test_a_target_size_is_kept(tmp_path):
    quantize(EMBEDDED, "--to", str(tmp_path / "out"), "--target-size", "3MB", "--method", "minmax")
    total = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ]
    assert 2_900_000 < total <= 3_000_000
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["target_size"] == 3_000_000


@pytest.mark.slow
def test_a_calibration_text_changes_the_weights_and_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "TOKENS", 100)
    monkeypatch.setattr(command, "LENGTH", 50)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    common = (EMBEDDED, "--recipe", "4bit", "--to")
    quantize(*common, str(tmp_path / "plain"))
    quantize(*common, str(tmp_path / "fitted"), "--calibration", str(text))
    plain, fitted = (tmp_path / name for name in ("plain", "fitted"))
    assert (plain / "config.json").read_bytes() == (fitted / "config.json").read_bytes()
    assert (plain / "model.safetensors").read_bytes() != (fitted / "model.safetensors").read_bytes()
    notes = [
        json.loads((folder / "conversion.json").read_text())["calibration"] for folder in (plain, fitted)
    ]
    assert notes == [None, command.Texts(str(text)).digest]
    assert command.Texts(str(text)).digest != command.Texts("").digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-size", "big"),
         "--target-size: expected a size like 20.9GB (1e9 bytes) or 19.5GiB (2^30), got 'big'"),
        (("--calibration", "~nosuchuser/text.txt"),
         "~nosuchuser/text.txt: cannot be read: Could not determine home directory"),
        (("--calibration", "missing.txt"), "missing.txt: cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_impossible_flags_are_refused_before_a_folder_is_made(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoelocalError) as caught:
        quantize(EMBEDDED, *arguments)
    assert type(caught.value) is RequestError and str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_who_interrupts_it_is_told_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(EMBEDDED, "--to", str(tmp_path / "out"))
    assert (
        capsys.readouterr().err == f"stopped; the same command goes on with what is in {tmp_path / 'out'}\n"
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_rate_and_time_left_and_makes_room_for_downloads(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar() as report:
        report("quantizing", 0, 10_000_000)
        report("quantizing", 5_000_000, 10_000_000)
        report(WAITING, 5_000_000, 10_000_000)
        assert "\x1b[?25h" in terminal.getvalue(), "the bar is gone while another one may be drawn"
        shown = len(terminal.getvalue())
        report("quantizing", 10_000_000, 10_000_000)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()[:shown])
    assert re.search(r"quantizing .* 5\.0/10\.0 MB (\?|\S+ MB/s) [-\d]:[-\d]{2}:[-\d]{2}", text)
    assert "\x1b[?25h" in terminal.getvalue()[shown:], "the cursor is back"


def test_elsewhere_nothing_is_shown(capsys):
    with progress_bar() as report:
        report("quantizing", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_the_source_may_be_a_path_with_a_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(Path(EMBEDDED))
    quantize("~/model", "--to", "~/out", "--recipe", "4bit", "--method", "minmax")
    assert (tmp_path / "out" / "config.json").exists()


def test_min_max_does_not_go_with_a_calibration():
    with pytest.raises(RequestError) as caught:
        quantize(EMBEDDED, "--method", "minmax", "--calibration")
    assert str(caught.value) == (
        "--method minmax does not go with --calibration, which searches; leave one of them out"
    )


def test_a_calibration_text_that_is_none_is_refused_before_anything_is_begun(tmp_path):
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text('{"text": "fine"}\n{"messages"\n')
    with pytest.raises(RequestError, match=r"text\.jsonl: line 2: not valid JSON"):
        quantize(EMBEDDED, "--to", str(out), "--calibration", str(text))
    assert not out.exists()
