"""`moelocal cost`: its flags, its progress, its order of work."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from moelocal import flags, hub, machine
from moelocal.bench import results
from moelocal.bench.header import machine_name
from moelocal.config import ModelConfig
from moelocal.cost import local, prices, private
from moelocal.cost.estimate import Tally
from moelocal.cost.local import number
from moelocal.cost.logs import Lines, Logs, Progress
from moelocal.cost.prices import Prices
from moelocal.cost.report import Report
from moelocal.cost.sample import Pair, Recorded, Sampler, run_again, texts
from moelocal.engine.completion import Completion
from moelocal.engine.generate import generate
from moelocal.engine.load import load
from moelocal.errors import RequestError
from moelocal.text.tokenizer import Tokenizer

_MOST_SAMPLED: Final = 1_000


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `cost`."""
    parser.add_argument(
        "logs",
        nargs="*",
        type=_file,
        metavar="LOG",
        help="a file of calls (.jsonl, .json, also .gz), or a folder of them",
    )
    parser.add_argument(
        "--copy-prices",
        nargs="?",
        type=_file,
        const=Path(),
        metavar="FILE",
        help="copy the built-in prices to be edited, and leave; without FILE to ~/.config/moelocal/prices.toml, "
        "which is used from then on",
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of `cost` but for the logs, and for what is done instead of reading them."""
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as .png, .svg or .pdf")
    parser.add_argument(
        "--rejects",
        type=Path,
        metavar="FILE",
        help="write there every line that is not read, with its place and the reason",
    )
    group = parser.add_argument_group("prices of the APIs")
    group.add_argument(
        "--prices", type=Path, metavar="FILE", help="a price table; else your own, else the built-in one"
    )
    group.add_argument(
        "--local-as",
        metavar="MODEL",
        help="price the local calls of our own logs as if MODEL had answered them",
    )
    group = parser.add_argument_group(
        "this machine (without a flag: as moelocal bench measured it, else assumed)"
    )
    group.add_argument(
        "--tokens-per-second",
        type=number(0),
        metavar="X",
        help=f"of decoding (else assumed {local.DECODE:g})",
    )
    group.add_argument(
        "--prefill-tokens-per-second",
        type=number(0),
        metavar="X",
        help=f"of prompts (else assumed {local.PREFILL:g})",
    )
    group.add_argument(
        "--watts",
        type=number(0, zero=True),
        metavar="X",
        help=f"while it works (else assumed {local.WATTS:g})",
    )
    group.add_argument(
        "--price-per-kwh",
        type=number(0, zero=True),
        metavar="X",
        help=f"of electricity, in dollars (else assumed {local.PRICE_PER_KWH:g})",
    )
    group.add_argument(
        "--machine-price", type=number(0), metavar="X", help="in dollars, for the break-even volume"
    )
    group.add_argument(
        "--years",
        type=number(0),
        default=local.YEARS,
        metavar="X",
        help="that it serves (default %(default)g)",
    )
    group.add_argument("--results", type=Path, metavar="FOLDER", help="of moelocal bench")
    group = parser.add_argument_group("ask again, here")
    group.add_argument(
        "--sample", type=int, default=0, metavar="N", help="ask N of the recorded prompts again"
    )
    group.add_argument(
        "--model", metavar="NAME", help="a folder, or a name in the Hugging Face cache; else the embedded one"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the sample and its answers (default 0)"
    )
    group.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="of each answer (default %(default)s)"
    )
    group.add_argument("--no-thinking", action="store_true", help="answer without thinking first")
    group.add_argument(
        "--page",
        type=Path,
        default=Path("cost.html"),
        metavar="FILE",
        help="where both answers stand side by side (default %(default)s)",
    )


def run(parsed: argparse.Namespace) -> None:
    """Say what the API calls of a log cost, and what they would cost on this machine. Reads exports of OpenAI and
    Anthropic and logs of moelocal; opens no connection."""
    if parsed.copy_prices is not None:
        to = prices.user_file() if parsed.copy_prices == Path() else parsed.copy_prices
        print(f"{prices.copy_table(to)}: the built-in prices, to be edited")
        return
    if not parsed.logs:
        raise RequestError("name a log to read: a file or a folder")
    check(parsed)
    tell(parsed)


def tell(parsed: argparse.Namespace) -> None:
    """Read the logs and print the report; with the flags also a list of rejects, a sample, a picture."""
    report, sampler = survey(parsed)
    pairs: list[Pair] = []
    # what was read and answered is in the JSON whatever fails behind it
    try:
        lines = [_printable(line) for line in report.as_lines()]
        print("\n".join(lines))
        if parsed.rejects:
            rejected = f"{report.lines.rejected:,}, with their reasons"
            print(f"\nrejects    {rejected}: {_printable(str(parsed.rejects))}")
        if parsed.sample:
            _ask_again(parsed, report, sampler, lines, pairs)
        if parsed.plot is not None:
            # imported here: matplotlib takes a second, and is an extra
            from moelocal.cost.plot import plot

            plot(report.tally, report.even, parsed.plot)
    finally:
        if parsed.json:
            found = report.as_dict()
            if parsed.sample:
                found["sample"] = {
                    "page": str(parsed.page),
                    "offered": sampler.offered,
                    "pairs": [_facts(pair) for pair in pairs],
                }
            print(json.dumps(found))


def survey(parsed: argparse.Namespace) -> tuple[Report, Sampler]:
    """Read the logs, price them, and compare. Raises `RequestError`, `ConfigError`; `TokenizerError`, `ModelNotFound`
    if tokens must be counted and the model's tokenizer cannot be read."""
    logs = Logs.find(parsed.logs)
    if parsed.rejects and parsed.rejects.resolve() in [file.resolve() for file in logs.files]:
        raise RequestError(f"--rejects {parsed.rejects}: is among the logs that are read; name another file")
    counting = _Tokenizer(parsed.model)
    sampler = Sampler(parsed.sample, parsed.seed)
    table = Prices.open(parsed.prices)
    if parsed.local_as and table.find(parsed.local_as, None, 0) is None:
        raise RequestError(f"--local-as {parsed.local_as}: no such model in {table.file}")
    # before the logs are read: it may be damaged
    rows = local.measured(parsed.results or results.default_folder(), machine_name())
    tally = Tally(table, counting.count, sampler.offer if parsed.sample else None, parsed.local_as)
    lines = Lines()
    started = time.perf_counter()
    with ExitStack() as open_:
        if parsed.rejects:
            write = open_.enter_context(private.writing(parsed.rejects))
            lines.reject = lambda rejected: write(json.dumps(rejected) + "\n")
        progress = open_.enter_context(_bar("reading the logs", "nbytes"))
        for place, entry in logs.read(lines, progress):
            tally.add(place, entry)
    tally.finish()
    seconds = time.perf_counter() - started
    total = tally.total
    here = local.machine(
        rows,
        parsed.model,
        total.prompt / total.calls if total.calls else 0.0,
        prefill=parsed.prefill_tokens_per_second,
        decode=parsed.tokens_per_second,
        watts=parsed.watts,
        price=parsed.price_per_kwh,
    )
    priced = local.cost(here, total.priced_prompt, total.priced_output)
    everything = local.cost(here, total.prompt, total.output)
    even = None
    if parsed.machine_price is not None and total.priced:
        tokens = total.priced_prompt + total.priced_output
        even = local.break_even(
            parsed.machine_price,
            parsed.years,
            total.dollars,
            priced,
            total.priced,
            tokens,
            tally.priced_per_month,
        )
    return Report(logs, lines, tally, here, priced, everything, even, counting.name, seconds), sampler


class _Tokenizer:
    """Counts tokens where a log does not say them. Opened when it is first needed."""

    def __init__(self, model: str | None) -> None:
        self._model, self._opened = model, None
        self.name = "the embedded model" if model is None else model
        self._tokenizer: Tokenizer | None = None

    def count(self, text: str) -> int:
        """Tokens of a text. Half surrogate pairs, which JSON may hold, count as the character for the unknown."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.open(hub.resolve(self._model, offline=True))
        return len(self._tokenizer.encode(text.encode("utf-8", "replace").decode())) if text else 0


def _ask_again(
    parsed: argparse.Namespace, report: Report, sampler: Sampler, lines: list[str], pairs: list[Pair]
) -> None:
    """Answer the sample, which goes into `pairs` one by one, and write the page."""
    recorded = texts(report.logs, sampler.drawn())
    if not recorded:
        print("\nsample: no billed call with its prompt and answer as text, so none can be asked again")
        return
    model = load(parsed.model, offline=True, progress=sys.stderr.isatty())
    thinking = False if parsed.no_thinking else None

    def answer(messages: list[dict[str, Any]], tools: list[Mapping[str, Any]] | None) -> Completion:
        return generate(
            model, messages, tools=tools, seed=parsed.seed, max_tokens=parsed.max_tokens, thinking=thinking
        )

    pairs.extend(_with_bar(recorded, answer))
    # imported here: only a sample needs jinja2
    from moelocal.cost import page

    made = f"Made on {datetime.now(UTC):%Y-%m-%d} on {machine.chip() or 'an unknown chip'}."
    text = page.render(
        pairs,
        model=model.name,
        seed=parsed.seed,
        offered=sampler.offered,
        report="\n".join(lines),
        made=made,
    )
    page.write(parsed.page, text)
    answered = [pair for pair in pairs if pair.done is not None]
    prompts = "1 prompt" if len(pairs) == 1 else f"{len(pairs)} prompts"
    print(
        f"\nsample     {len(answered)} of {prompts} answered by {model.name}: {_printable(str(parsed.page))}"
    )


def _with_bar(recorded: list[Recorded], answer: Callable[..., Completion]) -> Iterator[Pair]:
    with _bar("asking again", "prompts") as progress:
        for done, pair in enumerate(run_again(recorded, answer), 1):
            progress(done, len(recorded))
            yield pair


def _facts(pair: Pair) -> dict[str, Any]:
    """Of a pair without its texts."""
    recorded, done = pair.recorded, pair.done
    return {
        "where": recorded.where,
        "kind": recorded.kind,
        "model": recorded.model,
        "recorded_prompt_tokens": recorded.prompt_tokens,
        "recorded_output_tokens": recorded.output_tokens,
        "recorded_seconds": recorded.seconds,
        "prompt_tokens": done.usage.prompt if done else None,
        "output_tokens": done.usage.completion if done else None,
        "seconds": pair.seconds,
        "error": pair.error,
    }


def check(parsed: argparse.Namespace) -> None:
    """Before anything takes long: what could only fail at the end. Raises `RequestError`; for the model of a
    sample also `ModelNotFound`, `ConfigError`, `UnsupportedModel`."""
    if not 0 <= parsed.sample <= _MOST_SAMPLED:
        raise RequestError(f"--sample {parsed.sample}: expected 0 to {_MOST_SAMPLED}")
    if parsed.sample and parsed.max_tokens < 1:
        raise RequestError(f"--max-tokens {parsed.max_tokens}: expected 1 or more")
    page_file = parsed.page if parsed.sample else None
    written: dict[Path, str] = {}
    for flag, file in (("--plot", parsed.plot), ("--page", page_file), ("--rejects", parsed.rejects)):
        if file is None:
            continue
        if (other := written.setdefault(file.resolve(), flag)) != flag:
            raise RequestError(f"{flag} {file}: is the file of {other} too; name another one")
        if file.is_dir():
            raise RequestError(f"{flag} {file}: is a folder; expected the name of a file")
        if not file.absolute().parent.is_dir():
            raise RequestError(f"{flag} {file}: no folder {file.absolute().parent}")
    if parsed.sample:
        from moelocal.cost import page  # imported here: only a sample needs jinja2

        page.require_own(parsed.page)
        ModelConfig.read(hub.resolve(parsed.model, offline=True))
    if parsed.rejects is not None:
        private.require_own(
            parsed.rejects, b'{"rejected": ', "list of such lines; name another file with --rejects"
        )
    if parsed.plot is not None:
        flags.require_plot(parsed.plot)


def _file(text: str) -> Path:
    """An argument that names a file or a folder; an empty one, as of a variable that is not set, would be `.`."""
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file or a folder, got ''")
    return Path(text)


def _printable(text: str) -> str:
    """The name of a file may hold bytes that are no text."""
    return text.encode("utf-8", "replace").decode()


@contextmanager
def _bar(what: str, unit: str) -> Iterator[Progress]:
    """A progress bar with the time that is left, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    # imported here: only a terminal needs it
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    amount = DownloadColumn() if unit == "nbytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
