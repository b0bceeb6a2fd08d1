"""The contact sheet: all pictures in one PNG. It is drawn as an SVG that holds them, by the renderer that drew each."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from typing import Final

from moelocal.pelican import render
from moelocal.pelican.gallery import PIXELS, Picture, Section, facts
from moelocal.pelican.markup import NOT_XML
from moelocal.pelican.styles import shortened

MOST_TILES: Final = 240
"""On one sheet; what is beyond is on the page only."""

_SHARPNESS: Final = 2
"""Pixels for one of the layout, on each side: screens of today have as many."""

_TILE: Final = PIXELS // _SHARPNESS
_LETTERS: Final = 28
"""In a line under a picture."""

_GAP, _MARGIN, _HEADING, _TOP = 16, 24, 50, 64
_INK, _GREY, _LINE, _PAPER = "#1d2733", "#667380", "#cfd7de", "#fbfcfd"
_AMBER, _GREEN = "#9a5b00", "#1b7a43"
_GROUND = "#e8eef3"
"""Under a picture that paints no ground: white birds are common, and on white they would not be seen."""


def sheet(title: str, sections: Sequence[Section], footer: str) -> bytes:
    """The sheet as PNG. Raises `Refused` if the renderer fails."""
    count = sum(len(section.pictures) for section in sections)
    if count > MOST_TILES:
        footer = f"{MOST_TILES} of {count} pictures; all are on the page · {footer}"
    svg, width, height = _layout(title, _limited(sections), footer)
    return render.png(svg, _SHARPNESS * max(width, height), seconds=300)


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
    width = 2 * _MARGIN + columns * (_TILE + _GAP) - _GAP
    room = width - 2 * _MARGIN
    parts = [_text(_MARGIN, 42, title, 20, _INK, room, bold=True)]
    y = _TOP
    for section in sections:
        parts.append(_text(_MARGIN, y + 18, section.title, 15, _INK, room, bold=True))
        parts.append(_text(_MARGIN, y + 37, section.subtitle, 12, _GREY, room))
        y += _HEADING
        captions = _captions(section)
        step = _TILE + 12 + 14 * max(len(label) + len(details) for label, details in captions) + _GAP
        for place, (each, caption) in enumerate(zip(section.pictures, captions, strict=True)):
            row, column = divmod(place, columns)
            x = _MARGIN + column * (_TILE + _GAP)
            parts.append(_tile(each, *caption, section.won(each), x, y + row * step))
        y += -(-len(section.pictures) // columns) * step
    parts.append(_text(_MARGIN, y + 16, footer, 11, _GREY, room))
    height = y + 36
    ground = f'<rect width="{width}" height="{height}" fill="{_PAPER}"/>'
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return f"{root}{ground}{''.join(parts)}</svg>", width, height


def _captions(section: Section) -> list[tuple[list[str], list[str]]]:
    """Under each picture: in what it differs from the others, and what it took, in lines."""
    captions = []
    for each in section.pictures:
        answer = each.answer
        if section.hidden:
            captions.append(([each.letter], list[str]()))
            continue
        seed = "" if answer.seed is None else f"seed {answer.seed}"
        label, details = [seed or answer.origin], [[facts(answer)]]
        if section.differ == "model":
            name = answer.model.rpartition("/")[2]  # who published it has no room
            label = [_joined(each.letter, name, "chosen" if section.won(each) else "")]
            details = [[seed, facts(answer)], [answer.quantization.replace(", most in ", ", ")]]
        elif section.differ == "prompt":
            label = textwrap.wrap(answer.prompt, _LETTERS, max_lines=3, placeholder=" …")
            details = [[seed, facts(answer)]]
        details[-1].append("repaired" if each.state == "repaired" else "")
        captions.append((label, list(filter(None, (_joined(*words) for words in details)))))
    return captions


def _joined(*words: str) -> str:
    return " · ".join(filter(None, words))


def _tile(each: Picture, label: Sequence[str], details: Sequence[str], won: bool, x: int, y: int) -> str:
    """A picture with its caption."""
    border = f'"{_GREEN}" stroke-width="3"' if won else f'"{_LINE}"'
    parts = [
        f'<rect x="{x}" y="{y}" width="{_TILE}" height="{_TILE}" rx="6" fill="{_GROUND}" stroke={border}/>'
    ]
    if each.drawn:
        data = base64.b64encode(each.png).decode()
        parts.append(
            f'<image x="{x + 4}" y="{y + 4}" width="{_TILE - 8}" height="{_TILE - 8}" '
            f'href="data:image/png;base64,{data}"/>'
        )
    else:
        for number, line in enumerate(textwrap.wrap(each.reason, _LETTERS)[:8]):
            parts.append(_text(x + 14, y + 40 + 17 * number, line, 12, _AMBER, _TILE - 20))
    below = y + _TILE + 16
    for line in label:
        parts.append(_text(x, below, line, 12, _INK, _TILE, bold=True))
        below += 15
    for line in details:
        parts.append(_text(x, below, line, 11, _GREY, _TILE))
        below += 14
    return "".join(parts)


def _text(x: int, y: int, text: str, size: int, colour: str, room: int, bold: bool = False) -> str:
    # letters of the widest usual font
    shown = shortened(NOT_XML.sub("", text), max(4, int(room / (size * (0.66 if bold else 0.53)))))
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="{size}" fill="{colour}"{weight}>'
        f"{escape(shown)}</text>"
    )
