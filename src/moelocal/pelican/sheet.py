"""The contact sheet: all pictures in one PNG. It is drawn as an SVG that holds them, by the renderer that drew each."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Final

from moelocal.pelican import render
from moelocal.pelican.gallery import TILE, Picture, Section, facts
from moelocal.pelican.markup import NOT_XML

MOST_TILES: Final = 240
"""On one sheet; what is beyond is on the page only."""

_GAP, _MARGIN, _CAPTION, _HEADING, _TOP = 16, 24, 40, 44, 64
_INK, _GREY, _LINE, _PAPER, _AMBER = "#1d2733", "#667380", "#cfd7de", "#fbfcfd", "#9a5b00"
_GROUND = "#e8eef3"
"""Under a picture that paints no ground: white birds are common, and on white they would not be seen."""


def sheet(title: str, sections: Sequence[Section], footer: str) -> bytes:
    """The sheet as PNG. Raises `Refused` if the renderer fails."""
    count = sum(len(section.pictures) for section in sections)
    if count > MOST_TILES:
        footer = f"{MOST_TILES} of {count} pictures; all are on the page · {footer}"
    svg, width, height = _layout(title, _limited(sections), footer)
    return render.png(svg, max(width, height), seconds=60)


def _limited(sections: Sequence[Section]) -> list[Section]:
    kept, room = [], MOST_TILES
    for section in sections:
        if room > 0:
            kept.append(replace(section, pictures=section.pictures[:room]))
            room -= len(section.pictures)
    return kept


def _layout(title: str, sections: Sequence[Section], footer: str) -> tuple[str, int, int]:
    """The sheet as SVG, its width and its height in pixels."""
    most = max((len(section.pictures) for section in sections), default=1)
    columns = max(3, min(most, 4 if most <= 12 else 6))
    width = 2 * _MARGIN + columns * (TILE + _GAP) - _GAP
    parts = [_text(_MARGIN, 42, title, 20, _INK, width - 2 * _MARGIN, bold=True)]
    y = _TOP
    for section in sections:
        room = width - 2 * _MARGIN
        left = min(11 * len(section.title), room // 2)  # letters of 15 pixels
        parts.append(_text(_MARGIN, y + 20, section.title, 15, _INK, left, bold=True))
        parts.append(_text(width - _MARGIN, y + 20, section.subtitle, 12, _GREY, room - left - 16, end=True))
        y += _HEADING - 10
        shared = _shared([each.answer.prompt for each in section.pictures]) if section.by_prompt else 0
        for place, each in enumerate(section.pictures):
            row, column = divmod(place, columns)
            x = _MARGIN + column * (TILE + _GAP)
            parts.append(_tile(each, section, shared, x, y + row * (TILE + _CAPTION + _GAP)))
        y += -(-len(section.pictures) // columns) * (TILE + _CAPTION + _GAP)
    parts.append(_text(_MARGIN, y + 16, footer, 11, _GREY, width - 2 * _MARGIN))
    height = y + 36
    ground = f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>'
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return f"{root}{ground}{''.join(parts)}</svg>", width, height


def _shared(prompts: Sequence[str]) -> int:
    """How many words all prompts begin with: a caption has no room for what it shares with the others."""
    words = [prompt.split() for prompt in prompts]
    same = [len(set(column)) == 1 for column in zip(*words, strict=False)]
    return [*same, False].index(False) if len(prompts) > 1 else 0


def _tile(each: Picture, section: Section, shared: int, x: int, y: int) -> str:
    """A picture with its caption. `shared`: words of the prompts that captions leave out."""
    won = bool(section.winner) and section.winner == each.answer.model
    border = _AMBER if won else _LINE
    parts = [
        f'<rect x="{x}" y="{y}" width="{TILE}" height="{TILE}" rx="6" fill="{_GROUND}" stroke="{border}"/>'
    ]
    if each.drawn:
        data = base64.b64encode(each.png).decode()
        parts.append(
            f'<image x="{x + 4}" y="{y + 4}" width="{TILE - 8}" height="{TILE - 8}" '
            f'href="data:image/png;base64,{data}"/>'
        )
    else:
        for number, line in enumerate(_lines(each.reason, 28)[:8]):
            parts.append(_text(x + 14, y + 40 + 17 * number, line, 12, _AMBER, TILE - 20))
    answer = each.answer
    if section.hidden:
        label, second = each.letter, ""
    else:
        seed = answer.origin if answer.seed is None else f"seed {answer.seed}"
        if section.by_prompt:
            seed = ("… " if shared else "") + " ".join(answer.prompt.split()[shared:])
        label = " · ".join(part for part in (each.letter, answer.model if each.letter else "", seed) if part)
        label += " · chosen" if won else ""
        second = facts(answer)
    if each.state == "repaired" and not section.hidden:
        second = " · ".join(part for part in (second, "repaired") if part)
    parts.append(_text(x, y + TILE + 16, label, 12, _INK, TILE, bold=True))
    parts.append(_text(x, y + TILE + 32, second, 11, _GREY, TILE))
    return "".join(parts)


def _text(
    x: int, y: int, text: str, size: int, colour: str, room: int, bold: bool = False, end: bool = False
) -> str:
    text = NOT_XML.sub("", " ".join(text.split()))
    most = max(4, int(room / (size * (0.62 if bold else 0.53))))  # letters of the widest usual font
    shown = text if len(text) <= most else f"{text[: most - 1]}…"
    weight = ' font-weight="bold"' if bold else ""
    anchor = ' text-anchor="end"' if end else ""
    return (
        f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="{size}" fill="{colour}"{weight}{anchor}>'
        f"{escape(shown)}</text>"
    )


def _lines(text: str, most: int) -> list[str]:
    """A text in lines of at most so many letters, at spaces."""
    lines = [""]
    for word in text.split():
        word = word[:most]
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
