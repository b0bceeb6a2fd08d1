"""What a folder of answers shows: which pictures, in which order, hidden or not; and writing its sheet and its page."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from string import ascii_uppercase
from typing import Any, Final

from moelocal.errors import RequestError
from moelocal.pelican import vote
from moelocal.pelican.answers import Answer, Answers
from moelocal.pelican.gallery import Picture, Section, picture
from moelocal.pelican.markup import Refused
from moelocal.pelican.page import page
from moelocal.pelican.sheet import sheet
from moelocal.pelican.vote import Votes
from moelocal.whole import write_whole

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
    def prompts(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys(answer.prompt for answer in self.answers))

    @property
    def ballots(self) -> list[list[Answer]]:
        """Those of the vote, in their drawn order; none without one."""
        return [] if self.seed is None else vote.ballots(self.answers, self.seed)

    @property
    def votes(self) -> Votes:
        """The file of votes."""
        return Votes(self.folder / VOTES)

    @property
    def chosen(self) -> dict[int, str]:
        """What was chosen, by the number of the ballot. Raises `RequestError`."""
        return {each.ballot: each.chosen for each in self.votes.read() if each.round == self.round}

    @property
    def hidden(self) -> bool:
        """Whether a ballot waits for its vote. Raises `RequestError`."""
        return len(self.chosen) < len(self.ballots)


def require_ours(folder: Path) -> None:
    """Before hours of drawing: raises `RequestError` for a folder that cannot be written, or has a page or a sheet of
    something else."""
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"--to {folder}: cannot be written; name another folder")
    if os.path.lexists(folder / SHOWN):  # written before them
        return
    for name in (PAGE, SHEET):
        if os.path.lexists(folder / name):
            raise RequestError(
                f"--to {folder}: holds {name}, but no {SHOWN}: `moelocal pelican` did not write it and does not "
                "replace it; name another folder, or move it away"
            )


def draw(shown: Shown, report: Callable[[], None] = lambda: None) -> list[Picture]:
    """The pictures of the answers, in their order. `report` is called after each."""
    pictures = []
    for answer in shown.answers:
        pictures.append(picture(answer))
        report()
    return pictures


def write_page(shown: Shown, pictures: Sequence[Picture]) -> Path:
    """Write the page of what is shown. Raises `RequestError`."""
    sections, footer = _sections(shown, pictures), _footer(shown)
    remarks, standings = [f"{len(pictures)} answers of {_models(pictures)}"], list[vote.Standing]()
    if shown.hidden:
        command = how_to_vote(shown.folder.absolute().name)
        remarks.append(
            f"Names are hidden. Vote with: {command}; a ballot shows its names when it has its vote."
        )
    else:
        standings = vote.tally(shown.votes.read())
    file = shown.folder / PAGE
    write_whole(file, page(_title(shown), sections, standings, remarks, footer).encode())
    return file


def write_sheet(shown: Shown, pictures: Sequence[Picture]) -> Path:
    """Write the contact sheet of what is shown. Raises `RequestError`."""
    file = shown.folder / SHEET
    try:
        write_whole(file, sheet(_title(shown), _sections(shown, pictures), _footer(shown)))
    except Refused as error:
        raise RequestError(f"{file}: {error}") from None
    return file


def how_to_vote(folder: str) -> str:
    """The command."""
    return f"moelocal pelican --to {shlex.quote(folder)} --vote 1=A 2=none …"


def _title(shown: Shown) -> str:
    return shown.prompts[0] if len(shown.prompts) == 1 else f"{len(shown.prompts)} prompts"


def _models(pictures: Sequence[Picture]) -> str:
    count = len({each.answer.model for each in pictures})
    return f"{count} model{'s' if count > 1 else ''}"


def _footer(shown: Shown) -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC" + ("" if shown.hidden else f" · {shown.command}")


def _sections(shown: Shown, pictures: Sequence[Picture]) -> list[Section]:
    several = len(shown.prompts) > 1
    return list(_by_model(pictures, several) if shown.seed is None else _by_ballot(shown, pictures, several))


def _by_model(pictures: Sequence[Picture], several: bool) -> Iterator[Section]:
    """The pictures of a model stand together; of models with one picture each, those of a prompt."""
    groups: dict[tuple[str, str], list[Picture]] = {}
    for each in pictures:
        groups.setdefault((each.answer.prompt, each.answer.model), []).append(each)
    alone = {key: own[0] for key, own in groups.items() if len(own) == 1}
    if several and len(alone) == len(groups):
        for model in dict.fromkeys(model for _, model in groups):
            own = tuple(picture for key, picture in alone.items() if key[1] == model)
            yield Section(model, _words(own), own, "prompt")
        return
    for (prompt, model), listed in groups.items():
        together = tuple(picture for key, picture in alone.items() if key[0] == prompt)
        if len(listed) > 1 or len(together) == 1:
            yield Section(f"{model}: {prompt}" if several else model, _words(listed), tuple(listed))
        elif listed[0] is together[-1]:
            title = f"{_models(together)}, one picture each"
            yield Section(f"{title}: {prompt}" if several else title, _words(together), together, "model")


def _by_ballot(shown: Shown, pictures: Sequence[Picture], several: bool) -> Iterator[Section]:
    done = shown.chosen
    by_key = {each.answer.key: each for each in pictures}
    ballots = shown.ballots
    for number, ballot in enumerate(ballots, 1):
        lettered = tuple(
            replace(by_key.pop(answer.key), letter=letter)
            for letter, answer in zip(ascii_uppercase, ballot, strict=False)
        )
        chosen = done.get(number, "")
        title = f"Ballot {number}" + (f": {ballot[0].prompt}" if several else "")
        words = f"voted: {chosen}" if chosen else "not voted yet"
        yield Section(title, words, lettered, "model", not chosen, chosen)
    if not shown.hidden:  # before, those without a counterpart would tell who draws how
        yield from _by_model(list(by_key.values()), several)


def summary(pictures: Sequence[Picture]) -> dict[str, Any]:
    """Figures of the pictures of one model: how many were drawn (of them repaired), had nothing to draw, were refused;
    how many differ; sums of tokens and seconds, the median of tokens/s."""
    answers = [each.answer for each in pictures]
    states = Counter(each.state for each in pictures)
    tokens = [answer.tokens for answer in answers if answer.tokens is not None]
    seconds = [answer.seconds for answer in answers if answer.seconds is not None]
    rates = [answer.tokens_per_second for answer in answers if answer.tokens_per_second]
    return {
        "model": answers[0].model,
        "source": answers[0].source,
        "origin": answers[0].origin if answers[0].source != "file" else "",
        "quantization": answers[0].quantization,
        "answers": len(answers),
        "drawn": states["drawn"] + states["repaired"],
        "repaired": states["repaired"],
        "empty": states["empty"],
        "refused": states["refused"],
        "different": len({each.drawn.svg for each in pictures if each.drawn}),
        "tokens": sum(tokens) if tokens else None,
        "seconds": round(sum(seconds), 3) if seconds else None,
        "tokens_per_second": median(rates) if rates else None,
    }


def _words(pictures: Sequence[Picture]) -> str:
    """The summary in a few words; of several models only what they share."""
    found = summary(pictures)
    drawn, different = found["drawn"], found["different"]
    words = [f"{drawn} of {len(pictures)} drawn"]
    if len({each.answer.model for each in pictures}) == 1:
        if found["quantization"]:
            words.insert(0, found["quantization"])
        if drawn > 1:
            words.append("all the same picture" if different == 1 else f"{different} different")
        if found["tokens_per_second"]:
            words.append(f"{found['tokens_per_second']:.1f} tokens/s")
    return " · ".join(words)
