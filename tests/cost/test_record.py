"""`--log`: the lines that `generate` and the chat write on request, and that `moelocal cost` reads again."""

from __future__ import annotations

import io
import json
import stat
import sys

import pytest

from moelocal.cli import main


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


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, capsys):
    log = tmp_path / "no" / "such" / "calls.jsonl"
    assert main(["generate", "Hello!", "--max-tokens", "4", "--log", str(log)]) == 1
    out, err = capsys.readouterr()
    assert out and err.splitlines()[-1] == (
        f"moelocal: error: {log}: the log cannot be written: No such file or directory"
    )
