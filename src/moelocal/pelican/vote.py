"""A vote by a person: ballots of pictures in a drawn order without names, votes in a small file, and their tally."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Final

from moelocal.errors import RequestError
from moelocal.pelican.answers import Answer, now
from moelocal.whole import write_whole

COLUMNS: Final = ("date", "round", "ballot", "prompt", "models", "chosen")
NONE: Final = "none"
"""Chosen where no picture is."""

Z95: Final = 1.959963984540054
"""Of the normal distribution, two-sided 95 %."""


@dataclass(frozen=True, slots=True)
class Vote:
    """A choice. `round`: which drawing of the order; `ballot`: its number there, from 1; `models`: those whose pictures
    were on it, in the order of the letters; `chosen`: one of them, or "none"."""

    date: str
    round: str
    ballot: int
    prompt: str
    models: tuple[str, ...]
    chosen: str


@dataclass(frozen=True, slots=True)
class Standing:
    """How a model stands: chosen `wins` times on `ballots`. `low`, `high`: 95 % interval of the share (Wilson 1927).
    `chance`: the share that it would have if each picture were as likely to be chosen."""

    model: str
    wins: int
    ballots: int
    low: float
    high: float
    chance: float


def ballots(answers: Sequence[Answer], seed: int) -> list[list[Answer]]:
    """For each prompt the first picture of every model, then the second, …, each ballot in an order drawn from `seed`.

    What has no counterpart is on none. Raises `RequestError` if there are not two models to compare.
    """
    models = list(dict.fromkeys(answer.model for answer in answers))
    require_two(models)
    draw = random.Random(seed)
    found = []
    for prompt in dict.fromkeys(answer.prompt for answer in answers):
        rows = [[a for a in answers if a.prompt == prompt and a.model == model] for model in models]
        for place in range(max(map(len, rows))):
            ballot = [row[place] for row in rows if place < len(row)]
            if 2 <= len(ballot) <= len(ascii_uppercase):
                draw.shuffle(ballot)
                found.append(ballot)
    return found


def require_two(models: Sequence[str]) -> None:
    """Raises `RequestError` if there are not two models to compare."""
    if len(models) < 2:
        raise RequestError(
            f"--blind compares models, got one: {models[0]}; name more with --model, --server or --svgs"
        )


def choices(words: Iterable[str], ballots: Sequence[Sequence[Answer]]) -> dict[int, str]:
    """Votes as they are typed, "2=B" or "2=none": number of the ballot -> model, or "none". Raises `RequestError`."""
    found: dict[int, str] = {}
    for word in words:
        number, _, letter = (part.strip() for part in word.partition("="))
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= len(ballots):
            raise RequestError(f"vote {word!r}: expected a ballot from 1 to {len(ballots)}, as in 1=A")
        ballot = ballots[int(number) - 1]
        letters = ascii_uppercase[: len(ballot)]
        if letter.lower() != NONE and (len(letter) != 1 or letter.upper() not in letters):
            raise RequestError(f"vote {word!r}: expected {', '.join(letters)} or {NONE} after the =")
        if int(number) in found:
            raise RequestError(f"vote {word!r}: ballot {number} has a vote already")
        found[int(number)] = NONE if letter.lower() == NONE else ballot[letters.index(letter.upper())].model
    return found


class Votes:
    """The file of votes: tab-separated, one a line. It is replaced as a whole with every vote."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[Vote]:
        """All votes so far. Raises `RequestError` for a file that is not one, with the line."""
        try:
            lines = self.file.read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{self.file}: cannot be read: {error}") from None
        if lines[:1] != ["\t".join(COLUMNS)]:
            raise RequestError(f"{self.file}: line 1: expected the columns {', '.join(COLUMNS)}")
        return [self._vote(number, line) for number, line in enumerate(lines[1:], 2)]

    def add(self, round_: str, chosen: Mapping[int, str], ballots: Sequence[Sequence[Answer]]) -> list[Vote]:
        """Write votes down. Raises `RequestError` if one of the ballots has its vote already: names are shown then."""
        with self._locked():
            votes = self.read()
            done = {vote.ballot for vote in votes if vote.round == round_}
            for number in chosen:
                if number in done:
                    raise RequestError(
                        f"vote {number}: this ballot was voted on, and its names are shown; for a new order run "
                        "`moelocal pelican --blind` again"
                    )
            for number, model in chosen.items():
                ballot = ballots[number - 1]
                models = tuple(answer.model for answer in ballot)
                votes.append(Vote(now(), round_, number, ballot[0].prompt, models, model))
            lines = ["\t".join(COLUMNS), *("\t".join(self._row(vote)) for vote in votes)]
            write_whole(self.file, ("\n".join(lines) + "\n").encode())
            return votes

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Two votes at once are written one after the other."""
        try:
            folder = os.open(self.file.parent, os.O_RDONLY)
        except OSError as error:
            raise RequestError(f"{self.file}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    @staticmethod
    def _row(vote: Vote) -> list[str]:
        # as JSON a prompt has no line break and no tab
        prompt, models = json.dumps(vote.prompt), json.dumps(vote.models, ensure_ascii=False)
        return [vote.date, vote.round, str(vote.ballot), prompt, models, vote.chosen]

    def _vote(self, number: int, line: str) -> Vote:
        try:
            date, round_, ballot, prompt, models, chosen = line.split("\t")
            vote = Vote(date, round_, int(ballot), json.loads(prompt), tuple(json.loads(models)), chosen)
            if chosen not in (*vote.models, NONE):
                raise ValueError
            return vote
        except (ValueError, TypeError):
            raise RequestError(
                f"{self.file}: line {number}: is no vote; put it right or delete the line"
            ) from None


def tally(votes: Iterable[Vote]) -> list[Standing]:
    """The models by their share of wins, the best first."""
    listed = list(votes)
    standings = []
    for model in dict.fromkeys(model for vote in listed for model in vote.models):
        on = [vote for vote in listed if model in vote.models]
        wins = sum(vote.chosen == model for vote in on)
        chance = sum(1 / len(vote.models) for vote in on) / len(on)
        standings.append(Standing(model, wins, len(on), *wilson(wins, len(on)), chance))
    return sorted(standings, key=lambda each: (-each.wins / each.ballots, -each.ballots, each.model))


def wilson(wins: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, which holds for few votes and for shares of 0 and 1 too (Wilson 1927)."""
    share, square = wins / count, Z95 * Z95
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return max(0.0, middle - half), min(1.0, middle + half)
