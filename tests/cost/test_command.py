"""`moelocal cost` from its flags to its last line."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

from moelocal.bench.header import Header, Identity, machine_name
from moelocal.bench.results import COLUMNS, Row, append
from moelocal.cost import command, page, prices
from moelocal.cost.logs import Logs
from moelocal.errors import RequestError


def last(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_sum_is_that_of_the_lines_priced_by_hand(cost, tmp_path, capsys):
    file, table = tmp_path / "log.jsonl", tmp_path / "prices.toml"
    table.write_text(
        '[[price]]\nprovider = "P"\nmodels = ["m"]\ninput = 2\ncached = 1\noutput = 10\n'
        'source = "s"\nread = 2026-11-21\n'
    )
    usage = {"prompt_tokens": 1000, "completion_tokens": 500, "prompt_tokens_details": {"cached_tokens": 400}}
    call = {"object": "chat.completion", "model": "m", "choices": [], "usage": usage, "created": 1767225600}
    later = call | {"created": 1767225600 + 10 * 86_400}
    file.write_text(json.dumps(call) + "\n" + json.dumps(later) + "\n")
    flags = (
        "--tokens-per-second",
        50,
        "--prefill-tokens-per-second",
        100,
        "--watts",
        36,
        "--price-per-kwh",
        0.5,
    )
    assert cost(file, "--prices", table, *flags, "--machine-price", 360, "--years", 1, "--json") == 0
    output = capsys.readouterr().out
    found = json.loads(output.splitlines()[-1])
    # 600 fresh at 2, 400 cached at 1, 500 out at 10, in millionths; twice
    assert found["total"]["dollars"] == pytest.approx(2 * (600 * 2 + 400 * 1 + 500 * 10) / 1e6)
    # 1000 tokens at 100 a second and 500 at 50: 20 seconds of 36 W each
    assert found["local"]["prefill_seconds"] == found["local"]["decode_seconds"] == 20.0
    assert found["local"]["kwh"] == pytest.approx(40 * 36 / 3.6e6)
    saving = (600 * 2 + 400 + 5000) / 1e6 - 20 * 36 / 3.6e6 * 0.5
    assert found["break_even"]["calls"] == pytest.approx(30 / saving)
    assert found["break_even"]["calls_per_month"] == pytest.approx(2 / 10 * 365.25 / 12)
    assert "given by --watts" in output and "assumed, not" not in output
    assert f"  360 / (12 x 1) / (0.006600 - 0.000100) = {30 / saving:,.0f} calls/month" in output
    volume = 2 / 10 * 365.25 / 12
    months = f"{360 / saving / volume:,.1f} months, longer than it serves"
    assert f"  This log: {volume:,.2f} priced calls/month; they pay for the machine in {months}.\n" in output


def test_what_is_assumed_is_never_called_measured(cost, log, capsys):
    assert cost(log) == 0
    output = capsys.readouterr().out
    assert output.count("assumed, not measured;") == 5
    assert "measured:" not in output
    assert "break-even: needs priced calls and a price of the machine, --machine-price DOLLARS" in output


def test_the_speed_of_this_machine_is_taken_where_it_was_measured(cost, log, tmp_path, capsys):
    facts = dict.fromkeys(("chip", "power", "system", "python", "mlx", "device", "moelocal", "command"), "x")
    header = Header(
        **facts,
        machine=machine_name(),
        cores=1,
        memory=1,
        bandwidth=1.0,
        date="2026-11-21T10:00",
    )
    model = Identity("big", "4 bits", 20 << 30, "aa")
    facts = (header, model, "speed", "moelocal", "context=2048 tokens=128 dtype=bfloat16")
    figures = [
        ("decode", "tokens/s", 50.0),
        ("prefill", "tokens/s", 400.0),
        ("decode energy", "J/token", 0.4),
    ]
    append(tmp_path / "results", [Row(*facts, *figure) for figure in figures])
    assert cost(log, "--json") == 0
    output = capsys.readouterr().out
    origin = "measured: big, context=2048 tokens=128 dtype=bfloat16, x, 2026-11-21"
    for label, value, unit in (
        ("decode", 50, "tokens/s"),
        ("prefill", 400, "tokens/s"),
        ("power, decode", 20, "W"),
    ):
        assert f"  {label:<15}{value:>10} {unit:<9} {origin}\n" in output
    assert (
        output.count("assumed, not measured;") == 2 + 2
    )  # power of prefill, price of energy; as text and in JSON


def test_memory_does_not_grow_with_the_size_of_a_log(cost, tmp_path, capsys):
    request = {"messages": [{"role": "user", "content": "word " * 20_000}]}
    response = {"object": "chat.completion", "model": "gpt-4.1", "choices": [], "usage": {"prompt_tokens": 9}}
    line = json.dumps({"request": request, "response": response}) + "\n"
    file = tmp_path / "log.jsonl"
    file.write_text(line * 200)  # 20 MB
    cost(file)  # what is imported or cached once is not meant
    tracemalloc.start()
    assert cost(file, "--sample", 0) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "200 lines" in capsys.readouterr().out
    assert peak < 20 * len(line)  # a few copies of one line of 100 kB, not 200 of them


def test_prompts_are_asked_again_on_one_page(cost, log, tmp_path, capsys):
    file = tmp_path / "cost.html"
    assert cost(log, "--sample", 3, "--seed", 5, "--max-tokens", 4, "--page", file, "--json") == 0
    output = capsys.readouterr().out
    assert f"\nsample     3 of 3 prompts answered by embedded: {file}\n" in output
    found = json.loads(output.splitlines()[-1])["sample"]
    assert [pair["error"] for pair in found["pairs"]] == [""] * 3
    assert all(0 < pair["output_tokens"] <= 4 and pair["prompt_tokens"] > 0 for pair in found["pairs"])
    text = file.read_text()
    assert text.count("<h2>") == 3 + 1  # and the report
    assert f"3 of {found['offered']} calls" in text and "seed 5" in text


def test_the_volume_is_of_the_priced_calls_that_have_a_date(cost, tmp_path, capsys):
    usage = {"prompt_tokens": 1000, "completion_tokens": 500}
    call = {"object": "chat.completion", "model": "gpt-4", "choices": [], "usage": usage}
    dated = call | {"created": 1767225600}
    later = dated | {"model": "no-such-model", "created": 1767225600 + 10 * 86_400}
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(map(json.dumps, (dated, later, call))))
    assert cost(file, "--machine-price", 360, "--json") == 0
    output = capsys.readouterr().out
    even = json.loads(output.splitlines()[-1])["break_even"]
    assert even["calls_per_month"] == pytest.approx(1 / 10 * 365.25 / 12)
    assert "  This log: 3.04 priced calls/month; they pay for the machine in " in output
    file.write_text("\n".join(map(json.dumps, (later, later | {"created": 1767225600}, call))))
    assert cost(file, "--machine-price", 360) == 0
    assert (
        "  The log's own volume per month is unknown: no priced call is dated, or all dates are within a day.\n"
    ) in capsys.readouterr().out


def test_a_date_that_cannot_be_is_none_and_is_said(cost, tmp_path, capsys):
    usage = {"prompt_tokens": 1000, "completion_tokens": 500}
    call = {"object": "chat.completion", "model": "gpt-4", "choices": [], "usage": usage}
    dates = (1767225600, 1767225600 + 86_400, 9_999_999_999_999)
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(json.dumps(call | {"created": date}) for date in dates))
    assert cost(file, "--json") == 0
    output = capsys.readouterr().out
    assert "\nundated             1 call without a date from 2020 to today: at the newest price\n" in output
    found = json.loads(output.splitlines()[-1])
    assert found["undated"] == 1
    assert [(each["month"], each["calls"]) for each in found["months"]] == [("2026-01", 2), ("no date", 1)]


def test_what_the_table_remarks_on_a_price_is_in_the_report(cost, tmp_path, capsys):
    table = tmp_path / "prices.toml"
    table.write_text(
        "".join(
            f'[[price]]\nprovider = "P"\nmodels = ["{name}", "{name}b"]\ninput = 1\noutput = 1\nsource = "s"\n'
            f'read = 2026-11-21\nremark = "no surcharge for {name}"\n'
            for name in "mn"
        )
    )
    call = {"object": "chat.completion", "model": "m", "choices": [], "usage": {"prompt_tokens": 5}}
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps(call) + "\n" + json.dumps(call))
    assert cost(file, "--prices", table, "--json") == 0
    output = capsys.readouterr().out
    assert "\nremark              2 calls of m, mb: no surcharge for m\n" in output
    assert json.loads(output.splitlines()[-1])["remarks"] == {"m, mb: no surcharge for m": 2}
    ours = {"log": "moelocal", "model": "a", "messages": [],
            "completion": {"text": "", "usage": {"prompt": 1, "completion": 1}}}  # fmt: skip
    file.write_text(json.dumps(ours))
    assert cost(file, "--prices", table, "--local-as", "n") == 0
    output = capsys.readouterr().out
    assert (
        "\nremark              1 call of n, nb: no surcharge for n\nNo call that somebody billed.\n" in output
    )


def test_one_call_is_told_in_the_singular_and_its_hours_in_digits_that_say_something(cost, tmp_path, capsys):
    call = {"object": "chat.completion", "model": "gpt-4", "choices": [], "service_tier": "flex",
            "usage": {"prompt_tokens": 0, "completion_tokens": 9}}  # fmt: skip
    (tmp_path / "log.jsonl").write_text(json.dumps(call))
    assert cost(tmp_path, "--tokens-per-second", 2) == 0
    output = capsys.readouterr().out
    assert "\n                    1 call: of tier flex, priced as standard\n" in output
    assert "\nhere, on this machine, for the 1 priced call\n" in output
    (row,) = {line[-18:] for line in output.splitlines() if line.startswith("  gpt-4 ")}
    assert row == f"{9 / 2 / 3600:>9.5f}{'0.0000':>9}"
    (tmp_path / "log.jsonl").write_text(json.dumps(call | {"model": "no-such-model"}))
    assert cost(tmp_path, "--tokens-per-second", 1e-5) == 0
    output = capsys.readouterr().out
    assert "\n  In all 1 call: 250.0 h, " in output
    assert "      250" in output.partition("\n  no-such-model ")[2].partition("\n")[0]


def test_one_prompt_is_told_in_the_singular(cost, log, tmp_path, capsys):
    file = tmp_path / "cost.html"
    assert cost(log, "--sample", 1, "--max-tokens", 1, "--page", file) == 0
    assert capsys.readouterr().out.endswith(f"\nsample     1 of 1 prompt answered by embedded: {file}\n")


def test_more_calls_than_the_machine_answers_are_said(cost, tmp_path, capsys):
    usage = {"prompt_tokens": 1000, "completion_tokens": 500}
    file = tmp_path / "log.jsonl"
    call = {"object": "chat.completion", "model": "gpt-4", "choices": [], "usage": usage}
    step = 25 * 3600 / 2999
    file.write_text("\n".join(json.dumps(call | {"created": 1767225600 + n * step}) for n in range(3000)))
    flags = ("--tokens-per-second", 5, "--watts", 0, "--machine-price", 2400)
    assert cost(file, *flags, "--json") == 0
    output = capsys.readouterr().out
    even = json.loads(output.splitlines()[-1])["break_even"]
    month = 365.25 / 12 * 86_400
    most = month / (500 / 5 + 1000 / 500)  # seconds of a call: decode, and prefill as assumed
    assert even["most_calls"] == pytest.approx(most)
    assert even["calls_per_month"] == pytest.approx(3000 / (25 * 3600) * month)
    # gpt-4 takes 30 and 60 dollars per million
    months = 2400 / ((1000 * 30 + 500 * 60) / 1e6 * most)
    assert even["months"] == pytest.approx(months)
    volume = 3000 / (25 * 3600) * month
    assert (
        f"  This log: {volume:,.0f} priced calls/month, more than this machine answers one after the other.\n"
        f"  The {most:,.0f} a month that it does answer pay for it in {months:,.1f} months.\n"
    ) in output


@pytest.fixture
def unread(monkeypatch) -> None:
    """No line of a log may be read."""
    monkeypatch.setattr(Logs, "read", lambda *_: pytest.fail("the log was read"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sample", 1, "--model", "/nope", "--json"),
         "/nope: no such folder; a model is a folder or a Hugging Face name like owner/name"),
        (("--sample", 1, "--model", "{here}"), "{here}/config.json: not found; a model folder needs it"),
        (("--sample", 1, "--page", "{here}/x", "--rejects", "{here}/sub/../x"),
         "--rejects {here}/sub/../x: is the file of --page too; name another one"),
        (("--plot", "{here}/x.svg", "--rejects", "{here}/x.svg"),
         "--rejects {here}/x.svg: is the file of --plot too; name another one"),
    ],
)  # fmt: skip
def test_what_would_fail_at_the_end_fails_before_the_log_is_read(
    cost, log, tmp_path, flags, message, unread, capsys
):
    (tmp_path / "sub").mkdir()
    assert cost(log, *(str(flag).format(here=tmp_path) for flag in flags)) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"moelocal: error: {message.format(here=tmp_path)}\n")


def test_results_that_are_none_fail_before_the_log_is_read(cost, log, tmp_path, unread, capsys):
    file = tmp_path / f"{machine_name()}.tsv"
    file.write_text("\t".join((*COLUMNS, "more")) + "\n")
    assert cost(log, "--results", tmp_path) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"moelocal: error: {file}: unknown columns more; ")


def test_the_json_holds_what_was_answered_if_the_page_cannot_be_written(
    cost, log, tmp_path, capsys, monkeypatch
):
    def fails(file: Path, text: str) -> None:
        raise RequestError(f"{file}: cannot be written: No space left on device")

    monkeypatch.setattr(page, "write", fails)
    file = tmp_path / "cost.html"
    assert cost(log, "--sample", 2, "--max-tokens", 2, "--page", file, "--json") == 1
    captured = capsys.readouterr()
    assert captured.err == f"moelocal: error: {file}: cannot be written: No space left on device\n"
    found = json.loads(captured.out.splitlines()[-1])
    assert [pair["output_tokens"] for pair in found["sample"]["pairs"]] == [2, 2]
    assert found["lines"]["total"] == 600


def test_the_json_holds_what_was_answered_before_somebody_stopped_it(
    cost, log, tmp_path, capsys, monkeypatch
):
    answers = iter([RequestError("too long")])

    def stopped(*_: object, **__: object) -> None:
        raise next(answers, KeyboardInterrupt())

    monkeypatch.setattr(command, "generate", stopped)
    assert cost(log, "--sample", 3, "--page", tmp_path / "cost.html", "--json") == 130
    assert [pair["error"] for pair in last(capsys)["sample"]["pairs"]] == ["too long"]


def test_matplotlib_is_asked_for_in_a_form_that_works_anywhere(cost, log, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cost(log, "--plot", "cost.png") == 1
    assert capsys.readouterr().err == (
        f"moelocal: error: --plot needs matplotlib: {sys.executable} -m pip install matplotlib\n"
    )


@pytest.mark.parametrize("arguments", [("",), ("--copy-prices", "")])
def test_an_empty_name_is_not_the_current_folder(cost, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cost(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(": expected the name of a file or a folder, got ''\n")


def test_a_page_of_somebody_else_is_refused_before_anything_is_asked(cost, log, tmp_path, capsys):
    file = tmp_path / "cost.html"
    file.write_text("my own")
    assert cost(log, "--sample", 1, "--page", file) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"moelocal: error: {file}: is there already, and is no page of moelocal cost; "
        "name another file with --page, or move it away\n"
    )
    assert file.read_text() == "my own"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_file_whose_name_is_no_text_is_read(cost, tmp_path, capsys):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl"))
    file.write_text("{}")
    assert cost(file, "--json") == 0
    assert f"unknown: {tmp_path}/?.jsonl: line 1: an empty object" in capsys.readouterr().out


def test_the_json_holds_no_prompt(cost, tmp_path, capsys):
    request = {"messages": [{"role": "user", "content": "a very private question?"}]}
    response = {"object": "chat.completion", "model": "m", "choices": [{"message": {"content": "secret"}}]}
    (tmp_path / "log.jsonl").write_text(json.dumps({"request": request, "response": response}))
    assert cost(tmp_path, "--json") == 0
    output = capsys.readouterr().out
    assert "private" not in output and "secret" not in output
    found = json.loads(output.splitlines()[-1])
    assert (found["total"]["estimated"], found["tokenizer"]) == (1, "the embedded model")
    assert found["total"]["fresh"] > 0


def test_a_picture(cost, log, tmp_path):
    file = tmp_path / "cost.png"
    assert cost(log, "--plot", file, "--machine-price", 100) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    assert cost(log, "--plot", tmp_path / "without.svg") == 0
    assert "<svg" in (tmp_path / "without.svg").read_text()


def test_the_price_table_can_be_copied_and_is_used(cost, log, capsys):
    assert cost("--copy-prices") == 0
    file = prices.user_file()
    assert capsys.readouterr().out == f"{file}: the built-in prices, to be edited\n"
    assert cost(log, "--copy-prices", file.with_name("other.toml")) == 0
    # and leave
    assert capsys.readouterr().out == f"{file.with_name('other.toml')}: the built-in prices, to be edited\n"
    assert cost(log) == 0
    assert f"prices     {file}" in capsys.readouterr().out
    assert cost("--copy-prices") == 1
    assert capsys.readouterr().err == (
        f"moelocal: error: {file}: is there already; edit it, or move it away for a new copy\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "name a log to read: a file or a folder"),
        (("{log}", "--sample", -1), "--sample -1: expected 0 to 1000"),
        (("{log}", "--sample", 1, "--max-tokens", 0), "--max-tokens 0: expected 1 or more"),
        (("{log}", "--plot", "cost.txt"), "--plot cost.txt: expected a name that ends in .png, .svg, .pdf"),
        (("{log}", "--plot", "/no/cost.png"), "--plot /no/cost.png: no folder /no"),
        (("{log}", "--sample", 1, "--page", "/"), "--page /: is a folder; expected the name of a file"),
        (("{log}", "--rejects", "{log}"),
         "{log}: is there already, and is no list of such lines; name another file with --rejects, or move it away"),
        (("{log}", "--rejects", "/no/x"), "--rejects /no/x: no folder /no"),
        (("/no.jsonl",), "/no.jsonl: no such file or folder"),
        (("{log}", "--prices", "/no.toml"), "/no.toml: no price table can be read: No such file or directory"),
        (("{log}", "--sample", 1, "--model", "/no"),
         "/no: no such folder; a model is a folder or a Hugging Face name like owner/name"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(cost, log, flags, message, capsys):
    assert cost(*(str(log) if flag == "{log}" else flag for flag in flags)) == 1
    assert capsys.readouterr().err == f"moelocal: error: {message.format(log=log)}\n"
