"""Reads the markup of an SVG as models write it: cut off, tags unclosed, quotes missing, any entity. What it gives
back is a tree, so whatever is written from it is well-formed; each repair is told.

No XML parser is used: one would refuse what is to be repaired, and would expand the entities that are to be refused.
"""

from __future__ import annotations

import html.entities
import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

MOST_ELEMENTS: Final = 20_000
MOST_DEPTH: Final = 128

ENTITIES: Final = "it declares XML entities, which can grow without end or read files"

EMPTY: Final = "nothing to draw"
"""How the reason begins where an answer is harmless and holds no picture."""

START: Final = re.compile(r"<(?:[A-Za-z_][\w.-]*:)?svg(?=[\s/>])", re.IGNORECASE)

_DECLARES: Final = re.compile(r"<!(?:ENTITY|DOCTYPE[^<>]*\[)", re.IGNORECASE)
_SPACE: Final = re.compile(r"\s*")
_NAME: Final = re.compile(r"[A-Za-z_][\w.:-]*", re.ASCII)
_ATTRIBUTE: Final = re.compile(
    # name, and what follows "=": in quotes, or bare, or quotes that end nowhere before the next tag
    r"""\s*([A-Za-z_][\w.:-]*)(?:\s*=\s*(?:"([^"<]*)"|'([^'<]*)'|([^\s"'<>]+)|(["'][^<]*)))?""",
    re.ASCII,
)
_ENTITY: Final = re.compile(r"&(?:#(\d{1,7})|#[xX]([0-9a-fA-F]{1,6})|(\w{1,32}));|&")
NOT_XML: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

# These hold no drawing: what is drawn inside one was meant to stand behind it.
_CHILDLESS: Final = frozenset("rect circle ellipse line polyline polygon path use stop image".split())
_INSIDE_SHAPES: Final = frozenset("title desc metadata animate animatetransform animatemotion set".split())


class Refused(Exception):
    """An SVG that is not drawn. It never leaves this package: its reason stands where the picture would."""


@dataclass(slots=True)
class Element:
    """An element with its namespace prefix, if it has one; its text and its elements in their order."""

    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)


@dataclass(slots=True)
class Parsed:
    """An <svg> of a text. `end`: where it ends there; `whole`: whether its end tag is there; `repairs`: what was
    repaired, and how often."""

    root: Element
    end: int
    whole: bool
    repairs: Counter[str]


def parse(text: str, start: int, stop: int) -> Parsed | None:
    """The <svg> that begins at `start`, up to its end tag, or else to `stop`. None if even its first tag is cut off.

    Raises `Refused` for one beyond `MOST_ELEMENTS` or `MOST_DEPTH`, or with a document type inside.
    """
    return _Parser(text, stop).parse(start)


class _Parser:
    def __init__(self, text: str, stop: int) -> None:
        self.text, self.stop = text, stop
        self.repairs: Counter[str] = Counter()
        self.open: list[Element] = []
        self.closed = Element("")
        """The last one that its own end closed."""
        self.elements = 0

    def parse(self, at: int) -> Parsed | None:
        root = None
        while at < self.stop:
            tag = self.text.find("<", at, self.stop)
            self._text(self.text[at : self.stop if tag < 0 else tag], cut=tag < 0)
            if tag < 0:
                break
            at = self._markup(tag)
            if root is None:
                if not self.elements:
                    return None
                root = self.open[0] if self.open else self.closed
            if not self.open:
                return Parsed(root, at, True, self.repairs)
        if root is None:
            return None
        self._close(0)
        self.repairs["it is cut off: its end was added"] += 1
        return Parsed(root, self.stop, False, self.repairs)

    def _markup(self, at: int) -> int:
        """What begins with the "<" at `at`. Returns where it ends."""
        text = self.text
        for opening, closing in (("<!--", "-->"), ("<![CDATA[", "]]>"), ("<?", "?>"), ("<!", ">")):
            if text.startswith(opening, at):
                end = text.find(closing, at + len(opening), self.stop)
                if opening == "<!" and _DECLARES.match(text, at, self.stop):
                    raise Refused(ENTITIES)
                if opening == "<![CDATA[":
                    self._characters(text[at + len(opening) : self.stop if end < 0 else end])
                return self.stop if end < 0 else end + len(closing)
        if text.startswith("</", at):
            return self._end_tag(at)
        name = _NAME.match(text, at + 1, self.stop)
        if name is None:
            if at + 1 < self.stop:  # else the answer ends with it
                self.repairs["a < that begins no tag was taken as text"] += 1
                self._characters("<")
            return at + 1
        return self._start_tag(name)

    def _start_tag(self, name: re.Match[str]) -> int:
        attributes: dict[str, str] = {}
        at = name.end()
        while True:
            found = _ATTRIBUTE.match(self.text, at, self.stop)
            if found:
                key, double, single, bare, endless = found.groups()
                if endless is not None:
                    return self._half(name[0], found.end())
                at = found.end()
                value = double if double is not None else single if single is not None else bare
                if bare is not None:
                    if bare.endswith("/") and self.text[at : at + 1] == ">":
                        value, at = bare[:-1], at - 1
                    if at < self.stop:
                        self.repairs["an attribute without quotes was read"] += 1
                if key in attributes:
                    self.repairs["an attribute given twice counts once"] += 1
                else:
                    attributes[key] = self._decoded(value or "")
                continue
            at = _SPACE.match(self.text, at, self.stop).end()  # type: ignore[union-attr]  # matches anywhere
            if self.text.startswith("/>", at) and at + 1 < self.stop:
                self._begin(name[0], attributes)
                self._pop()
                return at + 2
            if self.text.startswith(">", at) and at < self.stop:
                self._begin(name[0], attributes)
                return at + 1
            if at >= self.stop or self.text[at] == "<":
                return self._half(name[0], at)
            self.repairs["a stray character in a tag was passed over"] += 1
            at += 1

    def _half(self, name: str, at: int) -> int:
        self.repairs[f"a half-written <{name}> was dropped"] += 1
        return at

    def _end_tag(self, at: int) -> int:
        following = self.text.find("<", at + 1, self.stop)
        limit = self.stop if following < 0 else following
        end = self.text.find(">", at, limit)
        if end < 0:
            name = self.text[at + 2 : limit].strip()
            if name and following >= 0:
                self.repairs[f"a half-written </{name[:20]}> was dropped"] += 1
            return limit
        name = self.text[at + 2 : end].strip()
        for depth in range(len(self.open) - 1, -1, -1):
            if self.open[depth].name.lower() == name.lower():
                self._close(depth + 1)
                self._pop()
                break
        else:
            self.repairs[f"</{name[:20]}> that closes nothing was passed over"] += 1
        return end + 1

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        if self.open and self.open[-1].name.lower() in _CHILDLESS and name.lower() not in _INSIDE_SHAPES:
            self._close(len(self.open) - 1)
        self.elements += 1
        if self.elements > MOST_ELEMENTS:
            raise Refused(f"it has more than {MOST_ELEMENTS:,} elements")
        if len(self.open) >= MOST_DEPTH:
            raise Refused(f"its elements are nested more than {MOST_DEPTH} deep")
        element = Element(name, attributes)
        if self.open:
            self.open[-1].children.append(element)
        self.open.append(element)

    def _close(self, depth: int) -> None:
        """Close what is open, down to `depth` elements."""
        while len(self.open) > depth:
            self._pop()
            if depth or self.open:
                self.repairs[f"<{self.closed.name}> was closed"] += 1

    def _pop(self) -> None:
        """The innermost element has its end: pieces of text that stand side by side become one."""
        self.closed = self.open.pop()
        joined: list[Element | str] = []
        for is_text, run in itertools.groupby(self.closed.children, lambda child: isinstance(child, str)):
            pieces = list(run)
            joined += ["".join(map(str, pieces))] if is_text else pieces
        self.closed.children = joined

    def _text(self, text: str, cut: bool) -> None:
        if cut:
            text = re.sub(r"&#?\w*$", "", text)
        self._characters(self._decoded(text))

    def _characters(self, text: str) -> None:
        if not self.open or not text:
            return
        clean = NOT_XML.sub("", text)
        if clean != text:
            self.repairs["control characters were dropped"] += 1
        self.open[-1].children.append(clean)

    def _decoded(self, text: str) -> str:
        if "&" in text:
            text = _ENTITY.sub(self._entity, text)
        if NOT_XML.search(text):
            self.repairs["control characters were dropped"] += 1
            text = NOT_XML.sub("", text)
        return text

    def _entity(self, found: re.Match[str]) -> str:
        decimal, hexadecimal, name = found.groups()
        if decimal or hexadecimal:
            number = int(decimal) if decimal else int(hexadecimal, 16)
            return chr(number) if number < 0x110000 else ""
        if name is None:
            self.repairs["a bare & was taken as text"] += 1
            return "&"
        known = html.entities.html5.get(f"{name};")
        if known is None:
            self.repairs[f"the unknown entity &{name}; was taken as text"] += 1
            return found[0]
        return known


def written(element: Element) -> str:
    """An element as well-formed XML."""
    parts: list[str] = []
    _write(element, parts)
    return "".join(parts)


def _write(element: Element, parts: list[str]) -> None:
    parts.append(f"<{element.name}")
    parts.extend(f' {key}="{_escaped(value, quoted=True)}"' for key, value in element.attributes.items())
    if not element.children:
        parts.append("/>")
        return
    parts.append(">")
    for child in element.children:
        if isinstance(child, str):
            parts.append(_escaped(child))
        else:
            _write(child, parts)
    parts.append(f"</{element.name}>")


def _escaped(text: str, quoted: bool = False) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\r", "&#13;")
    return text.replace('"', "&quot;").replace("\n", "&#10;").replace("\t", "&#9;") if quoted else text
