"""`moelocal pelican`: its flags, what it makes, its table, the vote."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

from moelocal import flags, hub
from moelocal.bench.header import command_line
from moelocal.bench.server import Server
from moelocal.errors import MoelocalError, RequestError
from moelocal.pelican import render, show, vote
from moelocal.pelican.answers import Answer, Answers, one_line, plain, read_files
from moelocal.pelican.gallery import Picture
from moelocal.pelican.makers import Maker, Ours, Theirs
from moelocal.pelican.show import Shown
from moelocal.pelican.styles import shortened

PROMPT: Final = "Generate an SVG of a pelican riding a bicycle"
EMBEDDED: Final = "embedded"
_MOST_NAME: Final = 48
"""Letters of a name in a table."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `pelican`."""
    many: dict[str, Any] = {"action": "append", "default": []}
    folder = f"a folder, a Hugging Face name, or {EMBEDDED}; may be repeated"
    server = "another program's server on this machine, as localhost:1234; may be repeated"
    svgs = "pictures of other models for the first prompt: NAME.svg, NAME-seed7.svg or NAME/any.svg; may be repeated"
    blind = "hide who drew what and draw the order (from SEED) until a person has voted"
    votes = (
        "record votes on what --to shows, as 1=B 2=none, and print the tally; without any, the tally alone"
    )
    who = parser.add_argument_group("who draws (without a flag: the embedded model)")
    who.add_argument("--model", **many, metavar="NAME", help=folder)
    who.add_argument("--server", **many, metavar="ADDRESS[=MODEL]", help=server)
    who.add_argument("--svgs", **many, type=Path, metavar="FOLDER", help=svgs)
    what = parser.add_argument_group("what")
    what.add_argument("--prompt", **many, metavar="TEXT", help=f"default: {PROMPT}; may be repeated")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    what.add_argument(
        "--count", type=int, default=4, metavar="N", help="answers per model and prompt (default 4)"
    )
    what.add_argument("--seed", type=int, default=0, metavar="S", help="the first; then S + 1, … (default 0)")
    what.add_argument("--temperature", type=float, metavar="X", help="default: what the model recommends")
    what.add_argument("--max-tokens", type=int, metavar="N", help="end an answer after so many tokens")
    what.add_argument("--no-thinking", action="store_true", help="answer without thinking first")
    how = parser.add_argument_group("how")
    how.add_argument("--to", type=Path, default=Path("pelicans"), metavar="FOLDER", help="default: pelicans")
    flags.add(how, "--quantization", "--dtype", "--offline")
    how.add_argument("--json", action="store_true", help="one JSON object as the last line")
    voting = parser.add_argument_group("vote")
    voting.add_argument("--blind", nargs="?", type=int, const=-1, metavar="SEED", help=blind)
    voting.add_argument("--vote", nargs="*", metavar="BALLOT=LETTER", help=votes)


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
    for answer in files:
        kept.keep(answer)
    answers, made, failed, stopped = _answers(parsed, makers, prompts, kept)
    answers += files
    if not answers:
        raise KeyboardInterrupt if stopped else failed[0]
    seed = parsed.blind if parsed.blind != -1 else secrets.randbelow(1 << 31)
    pictures, written, unwritten = list[Picture](), dict[str, str](), None
    try:
        if seed is not None:
            vote.ballots(answers, seed)  # raises, before the old page is replaced
        shown = Shown.new(parsed.to, answers, seed, command_line())
        with _bar(len(shown.answers)) as report:
            pictures = show.draw(shown, lambda: report(advance=1))
        written["page"] = str(show.write_page(shown, pictures))
        written["sheet"] = str(show.write_sheet(shown, pictures))
    except MoelocalError as error:
        unwritten = error
    by_model: dict[str, list[Picture]] = {}
    for each in pictures:
        by_model.setdefault(each.answer.model, []).append(each)
    groups = [show.summary(own) for own in by_model.values()]
    if seed is None and groups:
        print("\n".join(_table(groups)))
        for each in pictures:
            if each.reason:
                which = each.answer.origin if each.answer.seed is None else f"seed {each.answer.seed}"
                print(one_line(f"{each.answer.model}, {which}: {each.reason}"))
    for what, where in written.items():
        print(f"{what:<6} {where}")
    if "sheet" in written and not render.fonts():
        print("note   the sheet has no letters: there is no known font on this machine (DejaVu Sans is one)")
    if seed is not None and written:
        print(f"vote   {show.how_to_vote(str(parsed.to))}")
    errors = [*failed, *([unwritten] if unwritten else [])]
    if parsed.json:
        figures = {
            "prompts": prompts,
            "made": made,
            "kept": len(answers) - made - len(files),
            "files": len(files),
            # how a model fared would help to guess which pictures are its own
            "models": groups if seed is None else None,
            "blind_seed": seed,
            "page": written.get("page"),
            "sheet": written.get("sheet"),
            "failed": [str(error) for error in errors],
            "interrupted": stopped,
        }
        print(json.dumps(figures))
    if stopped:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise KeyboardInterrupt
    if unwritten:
        raise unwritten
    if failed:
        raise RequestError(f"{len(failed)} of {len(makers)} models did not answer: {failed[0]}")


def _prompts(parsed: argparse.Namespace) -> list[str]:
    """What to ask for. Raises `RequestError`."""
    blind = None if parsed.blind == -1 else parsed.blind  # without a number
    numbers = ("count", parsed.count, 1), ("max-tokens", parsed.max_tokens, 1), ("seed", parsed.seed, 0)
    for flag, value, least in (*numbers, ("blind", blind, 0)):
        if value is not None and value < least:
            raise RequestError(f"--{flag}: expected at least {least}, got {value}")
    if parsed.temperature is not None and not 0 <= parsed.temperature < float("inf"):
        raise RequestError(f"--temperature: expected a number from 0, got {parsed.temperature}")
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
    theirs = [Theirs(*Server.named(words), settings) for words in parsed.server]
    found = (answer for folder in parsed.svgs for answer in read_files(folder, prompt))
    files = list({answer.key: answer for answer in found}.values())  # a folder may be named twice
    names = parsed.model or ([] if theirs or files else [EMBEDDED])
    makers: list[Maker] = [*(_ours(parsed, name, settings) for name in names), *theirs]
    called = [*(maker.name for maker in makers), *{answer.model for answer in files}]
    for name in called:
        if called.count(name) > 1:
            raise RequestError(f"two models are called {name}: rename one, so that they can be told apart")
    if parsed.blind is not None:
        vote.require_two(called)
    return makers, files


def _ours(parsed: argparse.Namespace, name: str, settings: dict[str, Any]) -> Ours:
    # imported here: a person who only votes does not wait for it
    from moelocal.quantize.once import prepared

    named = None if name == EMBEDDED else name
    progress = sys.stderr.isatty()
    folder = prepared(named, parsed.quantization, offline=parsed.offline, progress=progress)
    place = hub.EMBEDDED if named is None else hub.locate(named)
    shown = name if isinstance(place, str) or named is None else place.absolute().name
    return Ours(folder, shown, parsed.dtype, settings, progress)


def _answers(
    parsed: argparse.Namespace, makers: list[Maker], prompts: list[str], kept: Answers
) -> tuple[list[Answer], int, list[MoelocalError], bool]:
    """All answers of the makers, how many of them were made now, what kept a model from answering (the others go on,
    since an evening of drawing should not end with the first), and whether Ctrl-C ended it: what is made is shown."""
    answers, made, failed = list[Answer](), 0, list[MoelocalError]()
    with _bar(len(makers) * len(prompts) * parsed.count) as report:
        for maker in makers:
            try:
                for prompt, seed in product(prompts, range(parsed.seed, parsed.seed + parsed.count)):
                    if found := kept.find(maker.key(prompt, seed)):
                        answers.append(found)
                    else:
                        report(description=f"{maker.name}, seed {seed}", tokens="")
                        answers.append(maker.answer(prompt, seed, lambda n: report(tokens=f"{n} tokens")))
                        made += 1
                        kept.keep(answers[-1])  # what cannot be kept is shown all the same
                    report(advance=1)
            except MoelocalError as error:
                print(f"{maker.name}: {error}", file=sys.stderr)
                failed.append(error)
            except KeyboardInterrupt:
                return answers, made, failed, True
            finally:
                maker.close()  # the next one needs the memory
    return answers, made, failed, False


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
    standings = vote.tally(votes)
    if not standings:
        print("no votes yet")
    else:
        width = _width(each.model for each in standings)
        print(f"{'model':<{width}}{'won':>6}{'ballots':>9}{'share':>8}   95 % interval   by chance")
    for each in standings:
        interval = f"{100 * each.low:.0f} to {100 * each.high:.0f} %"
        share = f"{100 * each.wins / each.ballots:.0f} %"
        name = one_line(shortened(each.model, _MOST_NAME))
        chance = f"{100 * each.chance:.0f} %"
        print(f"{name:<{width}}{each.wins:>6}{each.ballots:>9}{share:>8}   {interval:<15} {chance}")
    if still := sorted({*range(1, len(ballots) + 1)} - {*shown.chosen}):
        print(f"without a vote: {', '.join(map(str, still))}")
    if parsed.json:
        listed = [asdict(standing) for standing in standings]
        print(json.dumps({"votes": len(votes), "standings": listed, "open": still}))
    # last, since the vote is told even if they cannot be written; without a new vote too: what was stopped between a
    # vote and its page is put right
    with _bar(len(shown.answers)) as report:
        pictures = show.draw(shown, lambda: report(advance=1))
    show.write_page(shown, pictures)
    show.write_sheet(shown, pictures)


def _width(names: Iterable[str]) -> int:
    """Letters of the column of names."""
    return 2 + max(12, *(min(len(name), _MOST_NAME) for name in names))


def _table(groups: list[dict[str, Any]]) -> Iterator[str]:
    width = _width(each["model"] for each in groups)
    columns = {"answers": 9, "drawn": 7, "repaired": 10, "empty": 7, "refused": 9, "different": 11}
    yield f"{'model':<{width}}{''.join(f'{name:>{room}}' for name, room in columns.items())}{'tokens/s':>12}"
    for each in groups:
        rate = f"{each['tokens_per_second']:.1f}" if each["tokens_per_second"] else "-"
        cells = "".join(f"{each[name]:>{room}}" for name, room in columns.items())
        yield f"{one_line(shortened(each['model'], _MOST_NAME)):<{width}}{cells}{rate:>12}"


@contextmanager
def _bar(total: int) -> Iterator[Callable[..., None]]:
    """A progress bar, on a terminal: it is called with what changes."""
    # imported here: a vote that is refused does not need it
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}", markup=False),  # a [ in the name of a model is no style
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        yield partial(progress.update, progress.add_task("drawing", total=total, tokens=""))
