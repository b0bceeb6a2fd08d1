"""Every line of a log is read, or named and kept: in the report, in its JSON, and by `--rejects`."""

from __future__ import annotations

import json
import stat


def test_every_line_of_a_mixed_log_is_accounted_for(cost, log, capsys):
    assert cost(log, "--json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = found["lines"]
    assert lines["total"] == 600 == sum(lines[fate] for fate in ("read", "empty", "malformed", "unknown"))
    assert min(lines[fate] for fate in ("read", "empty", "malformed", "unknown")) > 0
    parts = (found["total"]["calls"], found["local_calls"], found["repeated"], *found["requests"].values())
    assert found["entries"] == sum(parts) + sum(found["failed"].values())
    assert set(found["shapes"]) == {
        "OpenAI chat completion", "OpenAI response", "Anthropic message", "request", "moelocal log",
        "Anthropic batch result",
    }  # fmt: skip
    assert found["unpriced"] == {"some-new-model": found["models"]["some-new-model"]["calls"]}


def test_a_log_without_a_call_is_reported_and_no_error(cost, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"level": "info"}\n\n')
    assert cost(tmp_path, "--machine-price", 10, "--json") == 0
    output = capsys.readouterr().out
    assert "lines      0 read, 1 empty, 0 malformed, 1 of unknown shape" in output
    assert f"unknown: {tmp_path}/other.jsonl: line 1: an object with level" in output
    assert f"           empty: {tmp_path}/other.jsonl: line 2\n" in output
    assert (
        "Expected is a JSON object on each line: an answer as the APIs of OpenAI and Anthropic give" in output
    )
    assert "No call that somebody billed." in output
    assert json.loads(output.splitlines()[-1])["total"]["calls"] == 0


def test_a_bad_item_of_a_page_is_named_and_the_others_are_counted(cost, tmp_path, capsys):
    call = {"object": "chat.completion", "model": "gpt-4.1", "choices": [], "usage": {"prompt_tokens": 5}}
    bad = call | {"usage": {"prompt_tokens": -1}}
    file = tmp_path / "page.jsonl"
    file.write_text(json.dumps({"object": "list", "data": [call, bad, call]}))
    assert cost(file, "--json") == 0
    output = capsys.readouterr().out
    assert (
        "           in pages: 1 item malformed, 0 of unknown shape\n"
        f"           malformed: {file}: line 1, item 2: usage.prompt_tokens: expected a number of tokens, got -1\n"
    ) in output
    found = json.loads(output.splitlines()[-1])
    assert (found["total"]["calls"], found["items"]) == (2, {"malformed": 1, "unknown": 0})
    assert found["unread"] == [{"fate": "malformed", "file": str(file), "line": 1, "items": [[2, 2]]}]


def test_a_list_of_rejects_in_a_folder_of_logs_is_not_read_and_written_at_once(cost, tmp_path, capsys):
    file = tmp_path / "rejects.jsonl"
    (tmp_path / "log.jsonl").write_text("x")
    assert cost(tmp_path, "--rejects", file) == 0
    capsys.readouterr()
    assert cost(tmp_path, "--rejects", file) == 1
    assert capsys.readouterr().err == (
        f"moelocal: error: --rejects {file}: is among the logs that are read; name another file\n"
    )


def test_every_line_of_a_log_can_be_found_again(cost, log, tmp_path, capsys):
    rejects = tmp_path / "rejects.jsonl"
    for _ in range(2):  # a list of such lines is replaced
        assert cost(log, "--rejects", rejects, "--json") == 0
        output = capsys.readouterr().out
        told = [json.loads(line) for line in rejects.read_text().splitlines()]
        assert f"\nrejects    {len(told)}, with their reasons: {rejects}\n" in output
    assert stat.S_IMODE(rejects.stat().st_mode) == 0o600
    found, original = json.loads(output.splitlines()[-1]), log.read_text().split("\n")
    assert all(original[each["line"] - 1] == each["raw"] and each["reason"] for each in told)
    for fate in ("empty", "malformed", "unknown"):
        numbers = [each["line"] for each in told if each["rejected"] == fate]
        (place,) = [each for each in found["unread"] if each["fate"] == fate]
        assert numbers == [n for first, last in place["lines"] for n in range(first, last + 1)]
        assert len(numbers) == found["lines"][fate] > 0


def test_lines_that_were_not_read_are_named_in_the_report_where_they_are_few(cost, tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    file.write_text("x\n" * 7 + "\n" + "x\n")
    assert cost(file) == 0
    output = capsys.readouterr().out
    assert output.count("not JSON: Expecting value") == 5
    assert f"           empty: {file}: line 8\n" in output
    assert f"           malformed: {file}: lines 1-7, 9\n" in output
    file.write_text("x\n\n" * 21)
    assert cost(file) == 0
    output = capsys.readouterr().out
    for fate in ("empty", "malformed"):
        assert f"           {fate}: 21 in all; --json says where, --rejects FILE holds them\n" in output
