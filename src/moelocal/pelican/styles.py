"""What an attribute or a style sheet of a picture may say: how something on it looks, and nothing of elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Final

PROPERTIES: Final = frozenset(
    """alignment-baseline baseline-shift clip-path clip-rule color color-interpolation color-interpolation-filters
    direction display dominant-baseline fill fill-opacity fill-rule filter flood-color flood-opacity font font-family
    font-kerning font-size font-stretch font-style font-variant font-weight image-rendering isolation letter-spacing
    lighting-color marker marker-end marker-mid marker-start mask mask-type mix-blend-mode opacity overflow paint-order
    shape-rendering stop-color stop-opacity stroke stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin
    stroke-miterlimit stroke-opacity stroke-width text-anchor text-decoration text-rendering transform
    transform-box transform-origin unicode-bidi vector-effect visibility word-spacing writing-mode cx cy r rx ry x y
    width height d""".split()
)
"""CSS properties, most of them attributes as well, that a still picture can need."""

_FUNCTIONS: Final = frozenset(
    """rgb rgba hsl hsla hwb lab lch oklab oklch color-mix calc min max clamp var matrix matrix3d translate translatex
    translatey scale scalex scaley rotate skewx skewy skew blur brightness contrast drop-shadow grayscale hue-rotate
    invert opacity saturate sepia""".split()
)
_LOADING: Final = frozenset("url src image image-set cross-fade element".split())
# Only the name and its bracket are taken, the argument is looked at: the functions in it are found too. A name begins
# where no letter is before it, and is never tried shorter: the time is in proportion to the length.
_FUNCTION: Final = re.compile(r"(?<![\w-])([\w-]*+)\((?=\s*[\"']?([^\"'()]{0,80}))")
# The spaces are those of CSS: with any other before it, # is the end of a file name.
_URL: Final = re.compile(r"""url\([ \t\n\r\f]*(["']?)#([^\s"'()<>\\]+)\1[ \t\n\r\f]*\)""", re.IGNORECASE)
_COMMENT: Final = re.compile(r"/\*.*?(?:\*/|$)", re.DOTALL)
_WORD: Final = re.compile(r"[\w-]*")
_SELECTOR: Final = re.compile(r"[\w\s.#*,>+~:-]+")


def harmless(value: str, left_out: Counter[str]) -> bool:
    """Whether a value names nothing outside the picture. If it does, that is counted in `left_out`.

    Quotes and comments are not looked at: what looks like a function is taken for one wherever it stands, in another
    function too.
    """
    if "\\" in value:  # an escape can spell url( in a way that no search finds
        left_out["a CSS escape (\\)"] += 1
        return False
    for found in _FUNCTION.finditer(value):
        function, argument = found.groups()
        if not function or function.lower() in _FUNCTIONS or _URL.match(value, found.start()):
            continue
        loading = function.lower() in _LOADING
        left_out[f"a reference to {shortened(argument)}" if loading else f"{function[:20]}()"] += 1
        return False
    return True


def references(value: str) -> list[str]:
    """The ids of the elements that a value points to by url(#…)."""
    return [found[1] for found in _URL.findall(value)]


def declarations(style: str, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """Properties and values of a style attribute, or of a rule: those that are known and harmless."""
    for declaration in _COMMENT.sub(" ", style).split(";"):
        name, colon, value = declaration.partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon or not value or not harmless(value, left_out):
            continue
        if (
            name in PROPERTIES
            or name in ("background", "background-color")
            or re.fullmatch(r"--[\w-]+", name)
        ):
            yield name, value


def sheet(text: str, left_out: Counter[str]) -> str:
    """A style sheet with what is harmless in it: plain rules. At-rules are left out: they name files and fonts
    elsewhere, or other media than a picture."""
    rules = []
    for rule in _without_at_rules(_COMMENT.sub(" ", text), left_out).split("}"):
        selector, _, body = rule.partition("{")
        kept = "; ".join(f"{name}: {value}" for name, value in declarations(body, left_out))
        selector = " ".join(selector.split())
        if kept and _SELECTOR.fullmatch(selector):
            rules.append(f"{selector} {{ {kept} }}")
    return "\n".join(rules)


def _without_at_rules(text: str, left_out: Counter[str]) -> str:
    kept, at = [], 0
    while (begin := text.find("@", at)) >= 0:
        kept.append(text[at:begin])
        word = _WORD.match(text, begin + 1)
        left_out[f"the CSS rule @{word[0][:20] if word else ''}"] += 1
        depth = 0
        for at in range(begin, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if (text[at] == ";" and depth == 0) or (text[at] == "}" and depth <= 0):
                break
        at += 1
    kept.append(text[at:])
    return "".join(kept)


def shortened(text: str, most: int = 60) -> str:
    """A text in one line of at most so many letters; its two ends tell the most."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[-(most // 3) :]}"
