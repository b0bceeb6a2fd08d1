"""`moelocal cost` on a generated log: 10,000 mixed lines of every form that it reads, and damaged ones. The same seed
writes the same log. Prints the seconds that reading, counting and pricing took, adds them and the sums to the results,
and prints the report; the other flags are those of `moelocal cost`."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moelocal.bench import results
from moelocal.bench.header import Header, command_line
from moelocal.bench.results import Row
from moelocal.chat.command import exit_code
from moelocal.cost import command
from moelocal.cost.report import Report
from moelocal.errors import RequestError

MODELS = ("gpt-4o-mini-2024-07-18", "gpt-4.1", "gpt-5-mini", "gpt-5.6-luna", "some-new-model")
CLAUDES = ("claude-sonnet-4-5-20250929", "claude-haiku-4-5", "claude-opus-4-8", "claude-haiku-5-5")
WORDS = "river engine harbour willow copper signal meadow lantern orbit granite parcel whisper velvet anchor".split()
ASKED = (
    ("Fix the bug in this function:\n```python\ndef add(a, b): return a - b\n```", "Use a + b."),
    ("Extract name and age as JSON: Ada is 36.", '{"name": "Ada", "age": 36}'),
    ("Summarise the following text in one sentence: {words}", "It is about {words}."),
    ("Translate into German: good morning", "Guten Morgen"),
    ("Classify the sentiment of this review: {words}", "positive"),
    ("Draft an e-mail to the harbour office about {words}.", "Dear harbour office, {words}."),
    ("What is 23 + 48?", "71"),
    ("Hello!", "Hello, how can I help?"),
    ("{words}", "{words}"),
)
DAY = 86_400
START = 1_767_225_600  # 2026-01-01


def lines(count: int, seed: int) -> Iterator[bytes]:
    """The lines of a log, with their newlines."""
    dice = random.Random(seed)
    number = 0
    while number < count:
        for line in _record(dice, number):
            if number < count:
                yield line + b"\n"
                number += 1


def _record(dice: random.Random, number: int) -> list[bytes]:
    """One record; a batch request and its result are two lines."""
    when = START + dice.randrange(320 * DAY)
    words = " ".join(dice.choices(WORDS, k=dice.randrange(4, 60)))
    question, answer = (text.replace("{words}", words) for text in dice.choice(ASKED))
    prompt, output = dice.randrange(20, 6_000), dice.randrange(5, 900)
    cached = dice.choice((0, 0, prompt // 2))
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if dice.random() < 0.3:
        messages.insert(0, {"role": "system", "content": "Answer briefly."})
    model, claude = dice.choice(MODELS), dice.choice(CLAUDES)
    chat = {
        "id": f"chatcmpl-{seed_text(dice)}",
        "object": "chat.completion",
        "created": when,
        "model": model,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }
    message = {
        "id": f"msg_{seed_text(dice)}",
        "type": "message",
        "role": "assistant",
        "model": claude,
        "content": [{"type": "text", "text": answer}],
        "usage": {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 100,
            "cache_creation": {"ephemeral_5m_input_tokens": 60, "ephemeral_1h_input_tokens": 40},
            "output_tokens": output,
        },
    }
    response = {
        "id": f"resp_{seed_text(dice)}",
        "object": "response",
        "created_at": when,
        "status": "completed",
        "model": model,
        "output": [
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}
        ],
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": output,
        },
    }
    name = f"request-{number}"
    ours = {
        "log": "moelocal",
        "version": 1,
        "time": "2026-11-21T10:00:00Z",
        "model": "embedded",
        "messages": messages,
        "completion": {
            "text": answer,
            "usage": {"prompt": prompt, "completion": output, "cached": cached},
            "timing": {"total_seconds": 1.5},
        },
    }
    form = dice.randrange(100)
    if form < 30:
        return [_json({"request": {"model": model, "messages": messages}, "response": chat})]
    if form < 55:
        request = {"model": claude, "max_tokens": 1024, "messages": messages}
        return [_json({"timestamp": when, "request": request, "response": message})]
    if form < 65:
        return [_json({"request": {"model": model, "input": question}, "response": response})]
    if form < 70:
        return [_json(chat)]
    if form < 78:
        request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions"}
        result = {"id": f"batch_req_{number}", "custom_id": name, "error": None}
        return [
            _json(request | {"body": {"model": model, "messages": messages}}),
            _json(result | {"response": {"status_code": 200, "request_id": "r", "body": chat}}),
        ]
    if form < 84:
        return [
            _json({"custom_id": name, "params": {"model": claude, "max_tokens": 99, "messages": messages}}),
            _json({"custom_id": name, "result": {"type": "succeeded", "message": message}}),
        ]
    if form < 88:
        return [_json(ours)]
    if form < 91:
        del chat["usage"]
        return [_json({"request": {"model": model, "messages": messages}, "response": chat})]
    if form < 93:
        return [
            _json({"custom_id": name, "result": {"type": "errored", "error": {"type": "overloaded_error"}}})
        ]
    if form < 95:
        return [b""]
    if form < 97:
        return [_json(chat)[: dice.randrange(1, 200)]]
    if form < 99:
        return [_json({"level": "info", "message": "the server has started"})]
    return [
        _json(
            {
                "request": {"model": model, "messages": messages},
                "response": chat | {"usage": {"prompt_tokens": -1}},
            }
        )
    ]


def seed_text(dice: random.Random) -> str:
    return f"{dice.getrandbits(80):020x}"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--lines", type=int, default=10_000, metavar="N", help="of the log (default %(default)s)"
    )
    parser.add_argument(
        "--log-seed", type=int, default=1, metavar="N", help="of the log (default %(default)s)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FILE", help="write the log there, a new file, and keep it"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of reading (default %(default)s)")
    parser.add_argument("--no-results", action="store_true", help="write no file of results")
    command.add_options(parser)
    parsed = parser.parse_args()
    if parsed.lines < 1 or parsed.rounds < 1:
        parser.error("--lines and --rounds: expected 1 or more")
    return exit_code(run, parsed)


def run(parsed: argparse.Namespace) -> None:
    """Write the log, and measure. Raises `RequestError`, also if it is there already or cannot be written."""
    command.check(parsed)
    with tempfile.TemporaryDirectory() as folder:
        log = parsed.keep or Path(folder) / "log.jsonl"
        try:
            with log.open("xb") as stream:
                stream.writelines(lines(parsed.lines, parsed.log_seed))
        except OSError as error:
            raise RequestError(f"{log}: the log cannot be written: {error.strerror}") from None
        parsed.logs = [log]
        measure(parsed)


def measure(parsed: argparse.Namespace) -> None:
    """The log is read and priced several times; the report is that of one more."""
    report, _ = command.survey(parsed)  # what is imported and read once is not meant
    seconds = [command.survey(parsed)[0].seconds for _ in range(parsed.rounds)]
    middle = statistics.median(seconds)
    print(
        f"{parsed.lines:,} lines read, counted and priced in {middle:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, "
        f"{parsed.rounds} rounds), {parsed.lines / middle:,.0f} lines/s\n"
    )
    if not parsed.no_results:
        header = Header.now(command_line())
        setting = f"lines={parsed.lines} seed={parsed.log_seed}"
        facts = (header, None, "cost", "moelocal", setting)
        rows = [Row(*facts, "report", "s", middle, min(seconds), max(seconds), parsed.rounds)]
        rows += [
            Row(*facts, figure, unit, value, remark=remark) for figure, unit, value, remark in figures(report)
        ]
        results.append(parsed.results or results.default_folder(), rows)
    command.tell(parsed)


def figures(report: Report) -> Iterator[tuple[str, str, float, str]]:
    """What the report counts and sums: figure, unit, value, remark."""
    for fate, count in report.lines.counts.items():
        yield ("of unknown shape" if fate == "unknown" else fate), "lines", count, ""
    total, here, local = report.tally.total, report.machine, report.local
    yield "billed", "calls", total.calls, ""
    yield "billed and priced", "calls", total.priced, ""
    yield "input of the priced calls", "tokens", total.priced_prompt, ""
    yield "output of the priced calls", "tokens", total.priced_output, ""
    yield "price of the priced calls", "dollars", total.dollars, ""
    speeds = (("prefill", here.prefill, "tokens/s"), ("decode", here.decode, "tokens/s"),
              ("power", here.decode_watts, "W"), ("energy", here.price, "dollars/kWh"))  # fmt: skip
    where = "; ".join(
        f"{name} {each.value:,.4g} {unit} ({each.origin.split(',')[0]})" for name, each, unit in speeds
    )
    remark = f"Here, on this machine: {where}"
    yield "time of the priced calls here", "hours", local.seconds / 3600, remark
    yield "energy of the priced calls here", "kWh", local.kwh, remark
    if report.even is not None and report.even.calls is not None:
        price = f"A machine of {report.even.machine_price:,.0f} dollars over {report.even.years:g} years"
        yield "break-even", "calls/month", report.even.calls, price


if __name__ == "__main__":
    raise SystemExit(main())
