"""What a folder of answers shows: which pictures, in which order, hidden or not; and writing its sheet and its page."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from string import ascii_uppercase
from typing import Any, Final

from moelocal.errors import RequestError
from moelocal.pelican import vote
from moelocal.pelican.answers import Answer, Answers, write_whole
from moelocal.pelican.gallery import Picture, Section, picture
from moelocal.pelican.markup import Refused
from moelocal.pelican.page import page
from moelocal.pelican.sheet import sheet
from moelocal.pelican.vote import Votes

SHOWN: Final = "shown.json"
VOTES: Final = "votes.tsv"
SHEET: Final = "sheet.png"
PAGE: Final = "index.html"


@dataclass(frozen=True, slots=True)
class Shown:
    """What is shown in a folder: the answers in their order; `round` and `seed` of a vote without names, or empty and
    None."""

    folder: Path
    answers: tuple[Answer, ...]
    round: str
    seed: int | None
    command: str

    @classmethod
    def new(cls, folder: Path, answers: Iterable[Answer], seed: int | None, command: str) -> Shown:
        """Keep what is to be shown. `seed` begins a vote. Raises `RequestError`."""
        listed = tuple(answers)
        round_ = "" if seed is None else f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{seed}"
        content = {
            "keys": [answer.key for answer in listed],
            "round": round_,
            "seed": seed,
            "command": command,
        }
        write_whole(folder / SHOWN, json.dumps(content, indent=1).encode())
        return cls(folder, listed, round_, seed, command)

    @classmethod
    def open(cls, folder: Path) -> Shown:
        """What was shown last. Raises `RequestError`."""
        file, kept = folder / SHOWN, Answers(folder / "answers")
        try:
            content = json.loads(file.read_text("utf-8"))
            found = [kept.find(each) for each in content["keys"]]
            if None in found:
                raise ValueError
            return cls(
                folder,
                tuple(answer for answer in found if answer),
                content["round"],
                content["seed"],
                content["command"],
            )
        except FileNotFoundError:
            raise RequestError(
                f"{folder}: holds no pictures; `moelocal pelican --to {folder}` makes them"
            ) from None
        except OSError as error:
            raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise RequestError(
                f"{file}: does not fit the answers beside it; run `moelocal pelican` again"
            ) from None

    @property
    def ballots(self) -> list[list[Answer]]:
        """Those of the vote, in their drawn order; none without one."""
        return [] if self.seed is None else vote.ballots(self.answers, self.seed)

    @property
    def votes(self) -> Votes:
        """The file of votes."""
        return Votes(self.folder / VOTES)


def require_ours(folder: Path) -> None:
    """Raises `RequestError` for a folder with a page or a sheet of something else."""
    if os.path.lexists(folder / SHOWN):  # written before them
        return
    for name in (PAGE, SHEET):
        if os.path.lexists(folder / name):
            raise RequestError(
                f"--to {folder}: holds {name}, but no {SHOWN}: `moelocal pelican` did not write it and does not "
                "replace it; name another folder, or move it away"
            )


def write(shown: Shown, report: Callable[[], None] = lambda: None) -> list[Picture]:
    """Draw all pictures, write the contact sheet and the page; returns the pictures, in the order of the answers.
    `report` is called after each. Raises `RequestError`."""
    pictures = {}
    for answer in shown.answers:
        pictures[answer.key] = picture(answer)
        report()
    votes = shown.votes.read()
    prompts = list(dict.fromkeys(answer.prompt for answer in shown.answers))
    title = prompts[0] if len(prompts) == 1 else f"{len(prompts)} prompts"
    if shown.seed is None:
        sections = list(_by_model(shown.answers, pictures, several=len(prompts) > 1))
    else:
        done = {each.ballot: each.chosen for each in votes if each.round == shown.round}
        sections = _by_ballot(shown, pictures, done)
    models = list(dict.fromkeys(answer.model for answer in shown.answers))
    hidden = any(section.hidden for section in sections)
    remarks = [f"{len(shown.answers)} answers of {len(models)} model{'s' if len(models) > 1 else ''}"]
    if hidden:
        remarks.append(
            f"Names are hidden. Vote with: moelocal pelican --to {shown.folder.name} --vote 1=A 2=none …; a ballot "
            "shows its names when it has its vote."
        )
    footer = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC" + ("" if hidden else f" · {shown.command}")
    standings = [] if hidden else vote.tally(votes)
    try:
        write_whole(shown.folder / SHEET, sheet(title, sections, footer))
    except Refused as error:
        raise RequestError(f"{shown.folder / SHEET}: {error}") from None
    write_whole(shown.folder / PAGE, page(title, sections, standings, remarks, footer).encode())
    return [pictures[answer.key] for answer in shown.answers]


def _by_model(answers: Sequence[Answer], pictures: dict[str, Picture], several: bool) -> Iterable[Section]:
    groups = Counter((answer.prompt, answer.model) for answer in answers)
    if several and max(groups.values()) == 1:
        for model in dict.fromkeys(answer.model for answer in answers):
            own = tuple(pictures[answer.key] for answer in answers if answer.model == model)
            yield Section(model, summary(own)["words"], own, by_prompt=True)
        return
    for prompt, model in groups:
        own = tuple(pictures[a.key] for a in answers if (a.prompt, a.model) == (prompt, model))
        yield Section(f"{model}: {prompt}" if several else model, summary(own)["words"], own)


def _by_ballot(shown: Shown, pictures: dict[str, Picture], done: dict[int, str]) -> list[Section]:
    sections, on = [], set()
    ballots = shown.ballots
    several = len({answer.prompt for answer in shown.answers}) > 1
    for number, ballot in enumerate(ballots, 1):
        on |= {answer.key for answer in ballot}
        lettered = tuple(
            replace(pictures[answer.key], letter=letter)
            for letter, answer in zip(ascii_uppercase, ballot, strict=False)
        )
        chosen = done.get(number, "")
        words = f"voted: {chosen}" if chosen else "not voted yet"
        title = f"Ballot {number}" + (f": {ballot[0].prompt}" if several else "")
        sections.append(Section(title, words, lettered, not chosen, chosen))
    loose = [answer for answer in shown.answers if answer.key not in on]
    if loose and len(done) == len(ballots):  # before, they would tell who draws how
        sections += _by_model(loose, pictures, several=True)
    return sections


def summary(pictures: Sequence[Picture]) -> dict[str, Any]:
    """Figures of the pictures of one model: counts by what became of them, how many differ, medians; and `words`."""
    answers = [each.answer for each in pictures]
    states = [each.state for each in pictures]
    different = len({each.drawn.svg for each in pictures if each.drawn})
    tokens = [answer.tokens for answer in answers if answer.tokens is not None]
    seconds = [answer.seconds for answer in answers if answer.seconds is not None]
    rates = [answer.tokens_per_second for answer in answers if answer.tokens_per_second]
    figures: dict[str, Any] = {
        "model": answers[0].model,
        "source": answers[0].source,
        "origin": answers[0].origin if answers[0].source != "file" else "",
        "quantization": answers[0].quantization,
        "answers": len(answers),
        **{state: states.count(state) for state in ("drawn", "repaired", "empty", "refused")},
        "different": different,
        "tokens": sum(tokens) if tokens else None,
        "seconds": round(sum(seconds), 3) if seconds else None,
        "tokens_per_second": median(rates) if rates else None,
    }
    words = [answers[0].quantization] if answers[0].quantization else []
    words.append(f"{states.count('drawn') + states.count('repaired')} of {len(answers)} drawn")
    if len(answers) > 1:
        words.append(f"{different} different")
    if rates:
        words.append(f"{median(rates):.1f} tokens/s")
    return {**figures, "words": " · ".join(words)}
