"""`moelocal pelican`: its flags, what it makes, its table, the vote."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from moelocal import hub
from moelocal.bench.header import command_line
from moelocal.errors import MoelocalError, RequestError
from moelocal.pelican import render, show, vote
from moelocal.pelican.answers import Answer, Answers, one_line, plain, read_files
from moelocal.pelican.makers import Maker, Ours, Theirs, key_of
from moelocal.pelican.show import Shown

PROMPT: Final = "Generate an SVG of a pelican riding a bicycle"
EMBEDDED: Final = "embedded"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `pelican`."""
    who = parser.add_argument_group("who draws (without a flag: the embedded model)")
    who.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help=f"a folder, a Hugging Face name, or {EMBEDDED}; may be repeated",
    )
    who.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="ADDRESS[=MODEL]",
        help="another program's server on this machine, as localhost:1234; may be repeated",
    )
    who.add_argument(
        "--svgs",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="pictures of other models for the first prompt: NAME.svg, NAME-seed7.svg or NAME/any.svg; may be repeated",
    )
    what = parser.add_argument_group("what")
    what.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help=f"default: {PROMPT}; may be repeated"
    )
    what.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    what.add_argument(
        "--count", type=int, default=4, metavar="N", help="answers per model and prompt (default 4)"
    )
    what.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the first seed; then S + 1, … (default 0)"
    )
    what.add_argument("--temperature", type=float, metavar="X", help="default: what the model recommends")
    what.add_argument("--max-tokens", type=int, metavar="N", help="end an answer after so many tokens")
    what.add_argument("--no-thinking", action="store_true", help="answer without thinking first")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--to",
        type=Path,
        default=Path("pelicans"),
        metavar="FOLDER",
        help="of the results (default pelicans)",
    )
    how.add_argument("--quantization", default="auto", metavar="RECIPE", help="as for `moelocal chat`")
    how.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the computation")
    how.add_argument("--offline", action="store_true", help="use what is on this machine; download nothing")
    how.add_argument("--json", action="store_true", help="one JSON object as the last line")
    voting = parser.add_argument_group("vote")
    voting.add_argument(
        "--blind",
        nargs="?",
        type=int,
        const=-1,
        metavar="SEED",
        help="hide who drew what and draw the order (from SEED) until a person has voted",
    )
    voting.add_argument(
        "--vote",
        nargs="*",
        metavar="BALLOT=LETTER",
        help="record votes on what --to shows, as 1=B 2=none, and print the tally; without any, the tally alone",
    )


def run(parsed: argparse.Namespace) -> None:
    """Let models draw a pelican riding a bicycle: each answer is searched for an SVG, which is repaired, made safe and
    drawn. Writes a contact sheet (sheet.png) and a page (index.html). What was made before is kept."""
    render.require_renderer()
    if parsed.vote is not None:
        _vote(parsed)
        return
    prompts = _prompts(parsed)
    show.require_ours(parsed.to)
    makers, files = _drawers(parsed, prompts[0])
    kept = Answers(parsed.to / "answers")
    answers, made, failed = _answers(parsed, makers, prompts, kept)
    for answer in files:
        kept.keep(answer)
    answers += files
    if not answers:
        raise failed[0]
    seed = parsed.blind if parsed.blind != -1 else secrets.randbelow(1 << 31)
    if seed is not None:
        vote.ballots(answers, seed)  # raises, before the old page is replaced
    shown = Shown.new(parsed.to, answers, seed, command_line())
    with _bar("drawing", len(answers)) as bar:
        pictures = show.write(shown, lambda: bar.advance())
    groups = [
        show.summary([each for each in pictures if each.answer.model == model])
        for model in dict.fromkeys(answer.model for answer in answers)
    ]
    if seed is None:
        print("\n".join(_table(groups)))
        for each in pictures:
            if each.reason:
                which = each.answer.origin if each.answer.seed is None else f"seed {each.answer.seed}"
                print(one_line(f"{each.answer.model}, {which}: {each.reason}"))
    print(f"page   {parsed.to / show.PAGE}\nsheet  {parsed.to / show.SHEET}")
    if parsed.json:
        figures = {
            "prompts": prompts,
            "made": made,
            "kept": len(answers) - made - len(files),
            "files": len(files),
            # how a model fared would help to guess which pictures are its own
            "models": [{k: v for k, v in g.items() if k != "words"} for g in groups]
            if seed is None
            else None,
            "blind_seed": seed,
            "page": str(parsed.to / show.PAGE),
            "sheet": str(parsed.to / show.SHEET),
            "failed": [str(error) for error in failed],
        }
        print(json.dumps(figures))
    if failed:
        raise RequestError(f"{len(failed)} of {len(makers)} models did not answer: {failed[0]}")


def _prompts(parsed: argparse.Namespace) -> list[str]:
    """What to ask for. Raises `RequestError`."""
    if parsed.count < 1:
        raise RequestError(f"--count: expected at least 1, got {parsed.count}")
    if parsed.max_tokens is not None and parsed.max_tokens < 1:
        raise RequestError(f"--max-tokens: expected at least 1, got {parsed.max_tokens}")
    if parsed.temperature is not None and not 0 <= parsed.temperature < float("inf"):
        raise RequestError(f"--temperature: expected a number from 0, got {parsed.temperature}")
    if parsed.seed < 0:
        raise RequestError(f"--seed: expected a number from 0, got {parsed.seed}")
    if parsed.blind is not None and parsed.blind < -1:
        raise RequestError(f"--blind: expected a number from 0, got {parsed.blind}")
    prompts = [plain(prompt) for prompt in parsed.prompt]
    if parsed.prompts is not None:
        try:
            lines = parsed.prompts.read_text("utf-8").splitlines()
        except OSError as error:
            raise RequestError(f"--prompts {parsed.prompts}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise RequestError(f"--prompts {parsed.prompts}: is not UTF-8 at byte {error.start}") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise RequestError(f"--prompts {parsed.prompts}: no prompt in it; expected one a line")
        prompts += found
    if any(not prompt.strip() for prompt in prompts):
        raise RequestError("--prompt: expected a text, got nothing")
    return list(dict.fromkeys(prompts)) or [PROMPT]


def _drawers(parsed: argparse.Namespace, prompt: str) -> tuple[list[Maker], list[Answer]]:
    """Who draws, each under a name of its own, and the answers that are there as files. Raises `RequestError`, and what
    finding a model raises."""
    settings = {
        "max_tokens": parsed.max_tokens,
        "temperature": parsed.temperature,
        "thinking": False if parsed.no_thinking else None,
    }
    # addresses first: a wrong one is told before a model was downloaded
    theirs = [Theirs.at(named, settings) for named in parsed.server]
    files = [answer for folder in parsed.svgs for answer in read_files(folder, prompt)]
    names = parsed.model or ([] if theirs or files else [EMBEDDED])
    makers: list[Maker] = [*(_ours(parsed, name, settings) for name in names), *theirs]
    called = [*(maker.name for maker in makers), *{answer.model for answer in files}]
    for name in called:
        if called.count(name) > 1:
            raise RequestError(f"two models are called {name}: rename one, so that they can be told apart")
    return makers, files


def _ours(parsed: argparse.Namespace, name: str, settings: dict[str, Any]) -> Ours:
    # imported here: a person who only votes does not wait for it
    from moelocal.quantize.once import prepared

    named = None if name == EMBEDDED else name
    progress = sys.stderr.isatty()
    folder = prepared(named, parsed.quantization, offline=parsed.offline, progress=progress)
    place = hub.EMBEDDED if named is None else hub.locate(named)
    shown = name if isinstance(place, str) or named is None else place.absolute().name
    return Ours(folder, one_line(shown), parsed.dtype, settings, progress)


def _answers(
    parsed: argparse.Namespace, makers: list[Maker], prompts: list[str], kept: Answers
) -> tuple[list[Answer], int, list[MoelocalError]]:
    """All answers of the makers, how many of them were made now, and what kept a model from answering: the others go
    on, since an evening of drawing should not end with the first."""
    answers, made, failed = [], 0, list[MoelocalError]()
    with _bar("", len(makers) * len(prompts) * parsed.count) as bar:
        for maker in makers:
            try:
                for prompt in prompts:
                    for seed in range(parsed.seed, parsed.seed + parsed.count):
                        answer = kept.find(key_of(maker, prompt, seed))
                        if answer is None:
                            bar.name(f"{maker.name}, seed {seed}")
                            answer = maker.answer(prompt, seed, bar.tokens)
                            kept.keep(answer)
                            made += 1
                        answers.append(answer)
                        bar.advance()
            except MoelocalError as error:
                print(f"{maker.name}: {error}", file=sys.stderr)
                failed.append(error)
            finally:
                maker.close()  # the next one needs the memory
    return answers, made, failed


def _vote(parsed: argparse.Namespace) -> None:
    """Record votes, show their names, print the tally."""
    shown = Shown.open(parsed.to)
    ballots = shown.ballots
    if parsed.vote:
        if not ballots:
            raise RequestError(
                f"{parsed.to}: names are shown there; begin a vote with `moelocal pelican --blind`"
            )
        shown.votes.add(shown.round, vote.choices(parsed.vote, ballots), ballots)
    votes = shown.votes.read()
    # without a new vote too: what was stopped between a vote and its page is put right
    with _bar("drawing", len(shown.answers)) as bar:
        show.write(shown, lambda: bar.advance())
    standings = vote.tally(votes)
    if not standings:
        print("no votes yet")
    else:
        print(f"{'model':<40}{'won':>6}{'ballots':>9}{'share':>8}   95 % interval   by chance")
    for each in standings:
        interval = f"{100 * each.low:.0f} to {100 * each.high:.0f} %"
        share = f"{100 * each.wins / each.ballots:.0f} %"
        print(
            f"{one_line(each.model):<40}{each.wins:>6}{each.ballots:>9}{share:>8}   {interval:<15} "
            f"{100 * each.chance:.0f} %"
        )
    done = {each.ballot for each in votes if each.round == shown.round}
    if still := [number for number in range(1, len(ballots) + 1) if number not in done]:
        print(f"without a vote: {', '.join(map(str, still))}")
    if parsed.json:
        listed = [
            {
                "model": s.model,
                "wins": s.wins,
                "ballots": s.ballots,
                "low": s.low,
                "high": s.high,
                "chance": s.chance,
            }
            for s in standings
        ]
        print(json.dumps({"votes": len(votes), "standings": listed, "open": still}))


def _table(groups: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"{'model':<32}{'answers':>9}{'drawn':>7}{'repaired':>10}{'empty':>7}{'refused':>9}{'different':>11}"
        f"{'tokens/s':>10}"
    )
    for each in groups:
        rate = f"{each['tokens_per_second']:.1f}" if each["tokens_per_second"] else "-"
        yield (
            f"{one_line(each['model']):<32}{each['answers']:>9}{each['drawn']:>7}{each['repaired']:>10}{each['empty']:>7}"
            f"{each['refused']:>9}{each['different']:>11}{rate:>10}"
        )


class _Bar(Protocol):
    def name(self, what: str) -> None: ...
    def tokens(self, count: int) -> None: ...
    def advance(self) -> None: ...


class _NoBar:
    def name(self, what: str) -> None:
        pass

    def tokens(self, count: int) -> None:
        pass

    def advance(self) -> None:
        pass


@contextmanager
def _bar(what: str, total: int) -> Iterator[_Bar]:
    """A progress bar, on a terminal."""
    if not sys.stderr.isatty():
        yield _NoBar()
        return
    # imported here: only a terminal needs it
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),  # a [ in the name of a model is no style
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, tokens="")

        class Bar:
            def name(self, what: str) -> None:
                progress.update(task, description=what, tokens="")

            def tokens(self, count: int) -> None:
                progress.update(task, tokens=f"{count} tokens")

            def advance(self) -> None:
                progress.advance(task)

        yield Bar()
