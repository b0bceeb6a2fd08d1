"""From an answer of a model to one picture: an SVG found, repaired, and made safe.

Safe is what is on a list: elements, attributes and CSS properties that a still picture can need, and references to its
own elements. All else is left out and named. Refused as a whole is what declares XML entities or passes a limit. So
what comes out can be opened in any browser: it runs nothing, loads nothing and ends.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

from moelocal.pelican import styles
from moelocal.pelican.markup import EMPTY, ENTITIES, START, Element, Parsed, Refused, parse, written

MOST_CHARACTERS: Final = 1 << 20
"""Of an SVG."""

MOST_DRAWN: Final = 100_000
"""Elements, counted as often as they are used: a few <use> in each other draw thousands."""

MOST_REFERENCES: Final = 200
"""Elements on a way from one to what it refers to, and on."""

NAMESPACE: Final = "http://www.w3.org/2000/svg"
DEFAULT_SIZE: Final = (300.0, 150.0)
"""Pixels that browsers give a picture that says nothing of its size."""

SHAPES: Final = frozenset("path rect circle ellipse line polyline polygon text use".split())

_ELEMENTS: Final = SHAPES | frozenset(
    """svg g defs symbol switch style marker clipPath mask pattern linearGradient radialGradient stop tspan textPath
    filter feBlend feColorMatrix feComponentTransfer feComposite feConvolveMatrix feDiffuseLighting feDisplacementMap
    feDistantLight feDropShadow feFlood feFuncA feFuncB feFuncG feFuncR feGaussianBlur feMerge feMergeNode feMorphology
    feOffset fePointLight feSpecularLighting feSpotLight feTile feTurbulence""".split()
)
_ATTRIBUTES: Final = styles.PROPERTIES | frozenset(
    """id class style href viewBox preserveAspectRatio points pathLength x1 x2 y1 y2 dx dy rotate textLength
    lengthAdjust startOffset method spacing offset gradientUnits gradientTransform spreadMethod fx fy fr patternUnits
    patternContentUnits patternTransform clipPathUnits maskUnits maskContentUnits markerWidth markerHeight markerUnits
    refX refY orient filterUnits primitiveUnits in in2 result mode type values operator k1 k2 k3 k4 stdDeviation
    edgeMode order kernelMatrix divisor bias targetX targetY preserveAlpha surfaceScale diffuseConstant specularConstant
    specularExponent limitingConeAngle pointsAtX pointsAtY pointsAtZ azimuth elevation z scale xChannelSelector
    yChannelSelector tableValues slope intercept amplitude exponent radius baseFrequency numOctaves seed stitchTiles
    xml:space requiredFeatures systemLanguage""".split()
)
_BY_LOWER: Final = {name.lower(): name for name in (*_ELEMENTS, *_ATTRIBUTES)}
_REFERRING: Final = frozenset("use linearGradient radialGradient pattern filter textPath".split())
_ANIMATION: Final = frozenset("animate animatetransform animatemotion animatecolor set mpath discard".split())
_UNSEEN: Final = frozenset("title desc metadata view".split())
_LINE_OF_FENCE: Final = re.compile(r"^[ \t>]*(?:```|~~~)[^\n]*$", re.MULTILINE)
_LENGTH: Final = re.compile(
    # ++ and *+ give nothing back: else a long row of digits is split in all ways, the cube of its length
    r"\s*+([+]?(?:\d++\.?\d*+|\.\d++)(?:e[+-]?\d{1,3})?)\s*+(px|pt|pc|in|cm|mm|q|em|ex|rem)?\s*+",
    re.I,
)
_UNITS: Final = {"": 1, "px": 1, "pt": 4 / 3, "pc": 16, "in": 96, "cm": 96 / 2.54, "mm": 96 / 25.4, "q": 96 / 101.6,
                 "em": 16, "rem": 16, "ex": 8}  # fmt: skip
_MOST_CUT: Final = 16
"""Beginnings of an SVG without an end that are looked at."""

_MOST_WHOLE: Final = 1000


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture that is safe to show.

    `svg`: a file of its own, well-formed; `width`, `height` in pixels; `repairs`: what was wrong and is repaired;
    `left_out`: what was taken out because a still, safe picture does not hold it.
    """

    svg: str
    width: float
    height: float
    repairs: tuple[str, ...]
    left_out: tuple[str, ...]


def drawing(answer: str) -> Drawing:
    """The picture in an answer: the last complete SVG in it, or what can be saved of one that is cut off.

    Raises `Refused` with the reason: "nothing to draw: …" or what makes it unsafe.
    """
    parsed, repairs = _found(answer)
    left_out: Counter[str] = Counter()
    root = _clean(parsed.root, parsed.repairs, left_out)
    assert root is not None  # its name is known
    width, height = _sized(root, parsed, left_out)
    if not _draws(root):
        raise Refused(
            f"{EMPTY}: there is no shape in the SVG" + ("" if parsed.whole else ", which is cut off")
        )
    _break_circles_and_count(root, parsed.repairs)
    return Drawing(written(root), width, height, (*repairs, *_told(parsed.repairs)), _told(left_out))


def _found(answer: str) -> tuple[Parsed, list[str]]:
    """The SVG to take, and what to say about the choice."""
    repairs = []
    if not START.search(answer) and re.search(r"&lt;(\w+:)?svg", answer, re.IGNORECASE):
        answer = html.unescape(answer)
        repairs.append("its < and > were written as &lt; and &gt;")
    if re.search(r'<svg[^<>]*=\\"', answer, re.IGNORECASE):
        answer = re.sub(r'\\(["/n])', lambda found: "\n" if found[1] == "n" else found[1], answer)
        repairs.append('its quotes were written as \\"')
    whole: list[tuple[int, Parsed]] = []
    cut: list[tuple[int, Parsed]] = []
    refused, at, tries, seen = None, 0, 0, 0
    fences = [found.start() for found in _LINE_OF_FENCE.finditer(answer)]
    while (begin := START.search(answer, at)) and tries < _MOST_CUT:
        start, seen = begin.start(), seen + 1
        if seen > _MOST_WHOLE:
            raise Refused(f"the answer holds more than {_MOST_WHOLE:,} SVGs")
        stop = next((fence for fence in fences if fence > start), len(answer))
        at = begin.end()
        try:
            if "<!ENTITY" in answer[whole[-1][1].end if whole else 0 : start]:
                raise Refused(ENTITIES)
            parsed = parse(answer, start, min(stop, start + MOST_CHARACTERS))
        except Refused as error:
            refused, tries = error, tries + 1
            continue
        if parsed and parsed.whole:
            at = parsed.end
            # one that draws nothing is a mention in the text, or a part of the real one
            if _shapes(parsed.root):
                whole.append((start, parsed))
        else:
            tries += 1
            if stop - start > MOST_CHARACTERS:
                refused = Refused(f"it is longer than {MOST_CHARACTERS:,} characters")
            elif parsed:
                cut.append((start, parsed))
    if refused:  # not another one instead: what is shown would not be what was answered
        raise refused
    if whole:
        start, parsed = whole[-1]
        if len(whole) > 1:
            repairs.append(f"the answer holds {len(whole)} SVGs: the last one is shown")
        if any(other > start and _shapes(each.root) for other, each in cut):
            repairs.append("a later SVG in the answer is cut off: the last whole one is shown")
        return parsed, repairs
    if cut:
        # a mention of <svg> in a sentence begins one too, and holds the real one
        return max(
            (each for _, each in cut), key=lambda each: (_shapes(each.root), bool(each.root.attributes))
        ), repairs
    if START.search(answer) or re.search(r"<svg$", answer.rstrip()):
        raise Refused(f"{EMPTY}: the SVG is cut off in its first tag, or empty")
    raise Refused(
        f"{EMPTY}: there is no <svg> in the answer" + ("" if answer.strip() else ", which is empty")
    )


def _shapes(element: Element) -> int:
    """How many there are in it, whether they are drawn or only defined."""
    inside = sum(_shapes(child) for child in element.children if isinstance(child, Element))
    return inside + (element.name.lower().rpartition(":")[2] in SHAPES)


def _told(counts: Counter[str]) -> tuple[str, ...]:
    return tuple(what if count == 1 else f"{what} ({count} times)" for what, count in counts.items())


def _clean(
    element: Element, repairs: Counter[str], left_out: Counter[str], in_text: bool = False
) -> Element | None:
    """The element with what is allowed of it; None if it is not."""
    prefix, _, local = element.name.rpartition(":")
    name = _BY_LOWER.get(local.lower(), local)
    if (prefix and prefix.lower() != "svg") or name not in (*_ELEMENTS, "a"):
        if local.lower() in _ANIMATION:
            left_out["animation: the picture is shown still"] += 1
        elif local.lower() not in _UNSEEN and prefix.lower() in ("", "svg"):
            left_out[f"<{local[:30]}>"] += 1
        return None
    if name != local:
        repairs[f"<{local[:30]}> was taken as <{name}>"] += 1
    if name == "a":  # what is linked is drawn, the link is not kept
        name = "tspan" if in_text else "g"
    kept = Element(name)
    in_text = name in ("text", "tspan", "textPath")
    for key, value in element.attributes.items():
        _keep(kept, key, value, repairs, left_out)
    if name == "style":
        text = "".join(child for child in element.children if isinstance(child, str))
        kept.attributes, kept.children = {}, [styles.sheet(text, left_out)]
        return kept if kept.children != [""] else None
    for child in element.children:
        cleaned = child if isinstance(child, str) else _clean(child, repairs, left_out, in_text)
        # text beside shapes is not drawn; without it no half sentence of a cut answer is carried along
        if cleaned is not None and (in_text or not isinstance(cleaned, str)):
            kept.children.append(cleaned)
    return kept


def _keep(kept: Element, key: str, value: str, repairs: Counter[str], left_out: Counter[str]) -> None:
    """Put one attribute into `kept`, if it is allowed."""
    lower = key.lower()
    if lower in ("href", "xlink:href"):
        reference = value.strip()
        if kept.name in _REFERRING and re.fullmatch(r"#[^\s\"'()<>\\]+", reference):
            kept.attributes["href"] = reference
        else:
            left_out[f"a reference to {styles.shortened(reference)}"] += 1
        return
    if lower.startswith("on"):
        left_out[f"the event handler {lower[:30]}"] += 1
        return
    name = key if key in _ATTRIBUTES else _BY_LOWER.get(lower, key)
    if name not in _ATTRIBUTES:
        return  # of editors, for readers of screens, namespaces: none is drawn
    if name != key:
        repairs[f"the attribute {key[:30]} was taken as {name}"] += 1
    if name == "style":
        pairs = styles.declarations(value, left_out)
        value = "; ".join(f"{prop}: {what}" for prop, what in pairs)
        if value:
            kept.attributes["style"] = value
    elif name in ("id", "class") or styles.harmless(value, left_out):
        kept.attributes.setdefault(name, value)


def _sized(root: Element, parsed: Parsed, left_out: Counter[str]) -> tuple[float, float]:
    """Width and height in pixels, after giving the root what it needs to be a file of its own."""
    given = parsed.root.attributes.get("xmlns" if ":" not in parsed.root.name else "xmlns:svg")
    if given is None:
        parsed.repairs["the namespace (xmlns) was missing: it was added"] += 1
    elif given.strip() != NAMESPACE:
        parsed.repairs[f"the namespace was {styles.shortened(given)}: it was put right"] += 1
    attributes = root.attributes
    box = _box(attributes.pop("viewBox", ""))
    width, height = (_length(attributes.pop(side, "")) for side in ("width", "height"))
    for name in ("x", "y"):
        attributes.pop(name, None)
    if box is None and width is None and height is None:
        parsed.repairs["it says no size: {:.0f} x {:.0f} pixels, as in a browser".format(*DEFAULT_SIZE)] += 1
    if box:
        ratio = box[3] / box[2]
        width = width or (height / ratio if height else box[2])
        height = height or width * ratio
    else:
        width, height = width or DEFAULT_SIZE[0], height or DEFAULT_SIZE[1]
        box = (0.0, 0.0, width, height)
    if not all(1e-6 < side < 1e9 for side in (*box[2:], width, height)):
        raise Refused(f"its size is {width:g} x {height:g}, with a view of {box[2]:g} x {box[3]:g}")
    view = " ".join(f"{number:.10g}" for number in box)
    sizes = {"xmlns": NAMESPACE, "viewBox": view, "width": f"{width:.10g}", "height": f"{height:.10g}"}
    root.attributes = {**sizes, **{key: value for key, value in attributes.items() if key not in sizes}}
    _paint_background(root, box)
    return width, height


def _paint_background(root: Element, box: tuple[float, float, float, float]) -> None:
    """Browsers paint the CSS background of an SVG; renderers do not: as a rectangle both do."""
    style = dict(styles.declarations(root.attributes.get("style", ""), Counter()))
    colour = style.pop("background-color", None) or style.pop("background", None)
    style.pop("background", None)
    if "style" in root.attributes:
        root.attributes["style"] = "; ".join(f"{name}: {value}" for name, value in style.items())
        if not style:
            del root.attributes["style"]
    if colour and re.fullmatch(r"#[0-9a-fA-F]{3,8}|[a-zA-Z]+|(rgb|hsl)a?\([^()]*\)", colour):
        x, y, width, height = (f"{number:.10g}" for number in box)
        paint = Element(
            "rect", {"x": x, "y": y, "width": width, "height": height, "fill": colour, "stroke": "none"}
        )
        root.children.insert(0, paint)


def _length(value: str) -> float | None:
    """Pixels; None for what is no length, 0, or a share (%)."""
    found = _LENGTH.fullmatch(value)
    pixels = float(found[1]) * _UNITS[(found[2] or "").lower()] if found else 0.0
    return pixels if pixels and math.isfinite(pixels) else None


def _box(value: str) -> tuple[float, float, float, float] | None:
    try:
        x, y, width, height = (float(number) for number in value.replace(",", " ").split())
    except ValueError:
        return None
    numbers = (x, y, width, height)
    return numbers if width > 0 and height > 0 and all(map(math.isfinite, numbers)) else None


def _draws(element: Element) -> bool:
    """Whether there is a shape in it that is not only defined."""
    return any(
        isinstance(child, Element)
        and child.name not in ("defs", "symbol", "marker", "clipPath", "mask", "pattern", "filter")
        and (child.name in SHAPES or _draws(child))
        for child in element.children
    )


def _break_circles_and_count(root: Element, repairs: Counter[str]) -> None:
    """Take out references that lead back to where they stand. Raises `Refused` if more than `MOST_DRAWN` elements are
    drawn in all."""
    named: dict[str, Element] = {}
    stack = [root]
    while stack:
        element = stack.pop()
        named.setdefault(element.attributes.get("id", ""), element)
        stack.extend(child for child in element.children if isinstance(child, Element))
    named.pop("", None)
    counts: dict[int, int] = {}
    above: set[int] = set()

    def count(element: Element) -> int:
        if (known := counts.get(id(element))) is not None:
            return known
        if len(above) >= MOST_REFERENCES:
            raise Refused(f"its references lead over more than {MOST_REFERENCES} elements")
        above.add(id(element))
        total = 1 + sum(count(child) for child in element.children if isinstance(child, Element))
        for key, value in list(element.attributes.items()):
            ids = [value[1:]] if key == "href" else styles.references(value)
            targets = [named[each] for each in ids if each in named]
            if any(id(target) in above for target in targets):
                del element.attributes[key]
                repairs["a reference that leads back to itself was taken out"] += 1
            else:
                total += sum(count(target) for target in targets)
        above.discard(id(element))
        if total > MOST_DRAWN:
            raise Refused(f"it draws more than {MOST_DRAWN:,} elements, by using them again and again")
        counts[id(element)] = total
        return total

    count(root)
