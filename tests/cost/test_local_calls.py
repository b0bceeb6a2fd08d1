"""Calls of our own logs, which nobody billed: counted beside the others, and priced on request."""

from __future__ import annotations

import json

from moelocal.cost import prices


def test_a_log_of_local_calls_alone_says_their_tokens_and_time(cost, tmp_path, capsys):
    usage = {"prompt": 1000, "completion": 50, "cached": 0}
    line = {"log": "moelocal", "model": "embedded", "messages": []}
    lines = [line | {"completion": {"text": "", "usage": usage, "timing": timing}}
             for timing in ({"total_seconds": 1.5}, {"total_seconds": 2.25}, {})]  # fmt: skip
    file = tmp_path / "log.jsonl"
    for count, said in (
        (3, "3.8 s of answering, as the log says, of 2 of them; the others have no time"),
        (2, "3.8 s of answering, as the log says"),
    ):
        file.write_text("\n".join(map(json.dumps, lines[:count])))
        assert cost(file, "--json") == 0
        output = capsys.readouterr().out
        text = f"local      {count} calls, {1000 * count:,} tokens in, {50 * count} out"
        assert (
            f"{text}; --local-as MODEL (such as gpt-4.1) says what they would have cost\n           {said}\n"
            in output
        )
        assert "No call that somebody billed." in output
        assert json.loads(output.splitlines()[-1])["local_time"] == {"calls": 2, "seconds": 3.75}
    file.write_text(json.dumps(lines[2]))
    assert cost(file) == 0
    assert "           how long they took, the log does not say\n" in capsys.readouterr().out


def test_local_calls_are_counted_by_model_and_kind_of_task(cost, log, tmp_path, capsys):
    usage, lines = {"prompt": 100, "completion": 10, "cached": 40}, []
    for model, asked in (("a", "Hello!"), ("a", "Translate into German: yes"), ("b", "Hello!")):
        lines.append({"log": "moelocal", "model": model, "messages": [{"role": "user", "content": asked}],
                      "completion": {"text": "x", "usage": usage}})  # fmt: skip
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert cost(file, "--json") == 0
    output = capsys.readouterr().out
    for name, count in (("a", 2), ("b", 1), ("chat", 2), ("translation", 1)):
        tokens = f"{60 * count:>14}{40 * count:>12}{0:>10}{10 * count:>12}"
        assert f"\n  {name:<40}{count:>9}{tokens}{'unpriced':>12}\n" in output
    cells = json.loads(output.splitlines()[-1])["local_cells"]
    assert [(each["model"], each["kind"], each["calls"]) for each in cells] == [
        ("a", "chat", 1), ("a", "translation", 1), ("b", "chat", 1)
    ]  # fmt: skip


def test_local_calls_alone_are_no_sample(cost, tmp_path, capsys):
    line = {"log": "moelocal", "model": "a", "messages": [{"role": "user", "content": "Hello!"}]}
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(line | {"completion": {"text": "x", "usage": {"prompt": 1, "completion": 1}}}))
    assert cost(file, "--sample", 1, "--page", tmp_path / "cost.html") == 0
    assert capsys.readouterr().out.endswith(
        "\nsample: no billed call with its prompt and answer as text, so none can be asked again\n"
    )


def test_local_calls_can_be_priced_as_those_of_another_model(cost, tmp_path, capsys):
    line = {"log": "moelocal", "time": "2026-11-01", "model": "embedded", "messages": []}
    line["completion"] = {
        "text": "",
        "usage": {"prompt": 1_000_000, "completion": 500_000, "cached": 600_000},
    }
    (tmp_path / "log.jsonl").write_text(json.dumps(line))
    assert cost(tmp_path) == 0
    text = "local      1 call, 1,000,000 tokens in, 500,000 out"
    assert (
        f"{text}; --local-as MODEL (such as gpt-4.1) says what they would have cost\n"
        in capsys.readouterr().out
    )
    assert cost(tmp_path, "--local-as", "gpt-4.1") == 0
    # dollars per million: 2 fresh, 0.5 cached, 8 out
    assert (
        f"{text}; 1 of them priced as gpt-4.1: ${0.4 * 2 + 0.6 * 0.5 + 0.5 * 8:.2f}\n"
        in capsys.readouterr().out
    )
    assert cost(tmp_path, "--local-as", "no-model") == 1
    assert (
        capsys.readouterr().err
        == f"moelocal: error: --local-as no-model: no such model in {prices.BUILT_IN}\n"
    )
