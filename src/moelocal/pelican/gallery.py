"""Answers as pictures: each drawn, or the reason why not."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final

from moelocal.pelican import render
from moelocal.pelican.answers import Answer
from moelocal.pelican.markup import EMPTY, Refused
from moelocal.pelican.svg import Drawing, drawing

PIXELS: Final = 448
"""Of the longer side of a picture on the contact sheet."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An answer and what it looks like: `drawn` and `png`, its longer side `PIXELS`; or else `reason`. `letter`:
    what it is called on a ballot."""

    answer: Answer
    drawn: Drawing | None
    png: bytes
    reason: str
    letter: str = ""

    @property
    def state(self) -> str:
        """ "drawn", "repaired" (drawn after repairs), "empty" (nothing to draw) or "refused"."""
        if self.drawn:
            return "repaired" if self.drawn.repairs or self.drawn.left_out else "drawn"
        return "empty" if self.reason.startswith(EMPTY) else "refused"

    @property
    def data(self) -> str:
        """The SVG as a data URI."""
        assert self.drawn is not None
        return f"data:image/svg+xml;base64,{base64.b64encode(self.drawn.svg.encode()).decode()}"


@dataclass(frozen=True, slots=True)
class Section:
    """Pictures that stand together. `differ`: in what, "seed", "prompt" or "model". `winner`: of a ballot, the model
    chosen there, or "none"; empty before the vote. `hidden`: nothing may tell who drew what."""

    title: str
    subtitle: str
    pictures: tuple[Picture, ...]
    differ: str = "seed"
    hidden: bool = False
    winner: str = ""

    def won(self, each: Picture) -> bool:
        """Whether this picture was chosen."""
        return bool(self.winner) and self.winner == each.answer.model


def picture(answer: Answer, seconds: float = render.SECONDS) -> Picture:
    """Draw an answer."""
    try:
        drawn = drawing(answer.text)
        return Picture(answer, drawn, render.png(drawn.svg, PIXELS, seconds), "")
    except Refused as error:
        reason = str(error)
        return Picture(answer, None, b"", reason if reason.startswith(EMPTY) else f"refused: {reason}")


def facts(answer: Answer) -> str:
    """What it took, in a few words; empty where nobody says."""
    words = [f"{answer.tokens:,} tok"] if answer.tokens is not None else []
    words += [f"{answer.seconds:.1f} s"] if answer.seconds is not None else []
    words += [f"{answer.tokens_per_second:.0f} tok/s"] if answer.tokens_per_second else []
    return " · ".join(words)
