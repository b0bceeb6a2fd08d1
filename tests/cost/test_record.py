"""`--log`: the lines that `generate` and the chat write on request, and that `moelocal cost` reads again."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import stat
import sys

import pytest

import moelocal
from moelocal.cli import main
from moelocal.cost.record import append
from moelocal.engine.completion import Completion, Timing, Usage
from moelocal.errors import RequestError


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_generate_adds_a_line_for_each_answer(tmp_path, capsys, extra):
    log = tmp_path / "calls.jsonl"
    for prompt in ("Hello!", "What is 2 + 2?"):
        assert main(["generate", prompt, "--max-tokens", "8", "--log", str(log), *extra]) == 0
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [line["messages"] for line in lines] == [
        [{"role": "user", "content": "Hello!"}],
        [{"role": "user", "content": "What is 2 + 2?"}],
    ]
    assert all(
        line["model"] == "embedded" and line["completion"]["usage"]["completion"] <= 8 for line in lines
    )
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    capsys.readouterr()
    assert main(["cost", str(log), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["lines"]["read"] == 2


def test_the_chat_adds_whole_conversations(tmp_path, capsys, monkeypatch):
    log = tmp_path / "calls.jsonl"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"My name is Ada.\nWhat is my name?\n")))
    assert main(["chat", "--max-tokens", "8", "--no-thinking", "--log", str(log)]) == 0
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [[m["role"] for m in line["messages"]] for line in lines] == [
        ["user"],
        ["user", "assistant", "user"],
    ]
    assert lines[1]["messages"][1]["content"] == lines[0]["completion"]["text"]


def test_without_the_flag_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "cache"))
    assert main(["generate", "Hello!", "--max-tokens", "4"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["generate", "Hello!"], ["chat", "--prompt", "Hello!"]])
def test_a_log_that_cannot_be_written_is_one_line_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch, command
):
    monkeypatch.setattr(moelocal, "load", None)  # calling it would raise
    for log, reason in (
        (tmp_path / "no" / "calls.jsonl", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        assert main([*command, "--log", str(log)]) == 1
        assert capsys.readouterr() == ("", f"moelocal: error: {log}: the log cannot be written: {reason}\n")


@contextlib.contextmanager
def disk_of(nbytes: int):
    """No file grows beyond so many bytes: what a full disk does, for the writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("room", "reason"), [(0, "File too large"), (20, "No space left on device")])
def test_a_full_disk_costs_no_answer_and_leaves_no_half_line(tmp_path, capsys, monkeypatch, room, reason):
    log, before = tmp_path / "calls.jsonl", '{"a line": 1}\n'
    log.write_text(before)
    with disk_of(len(before) + room):
        assert main(["generate", "Hello!", "--max-tokens", "8", "--no-thinking", "--log", str(log)]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    warning = f"warning: {log}: the log cannot be written: {reason}; this answer is not in it"
    assert err.splitlines()[-1] == f"moelocal: {warning}"
    assert log.read_text() == before
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"My name is Ada.\nWhat is my name?\n")))
    with disk_of(len(before) + room):
        assert main(["chat", "--max-tokens", "4", "--no-thinking", "--log", str(log)]) == 0
    assert capsys.readouterr().err.splitlines().count(warning) == 2  # both are answered
    assert log.read_text() == before


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    done = Completion("71", "", (), (5, 6), "stop", Usage(30, 2, 10), Timing(0.1, 0.5, 300.0, 20.0, 1))
    with pytest.raises(RequestError) as caught:
        append(tmp_path / "no" / "log.jsonl", "embedded", "Hi", done)
    assert (
        str(caught.value) == f"{tmp_path}/no/log.jsonl: the log cannot be written: No such file or directory"
    )
