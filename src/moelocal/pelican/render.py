"""An SVG as pixels: by resvg, in a process of its own, within a time."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from moelocal.errors import RequestError
from moelocal.pelican.markup import EMPTY, Refused

SECONDS: Final = 10.0
"""That drawing one picture may take; usual are some hundredths."""

_RENDERER: Final = Path(__file__).with_name("renderer.py")
_REFUSED: Final = 3
_LETTER: Final = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text y="9" font-family="{}">M</text></svg>'
)
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_SERIF: Final = "Times New Roman,Liberation Serif,DejaVu Serif,Noto Serif,DejaVu Sans,Noto Sans".split(",")
_FAMILIES: Final = {
    "font_family": _SERIF,
    "serif_family": _SERIF,
    "sans_serif_family": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans", "Noto Sans"],
    "monospace_family": ["Menlo", "Courier New", "Liberation Mono", "DejaVu Sans Mono", "Noto Sans Mono"],
}
"""What the generic names of CSS mean, the first that is on this machine: of a font that is not, resvg draws nothing."""


def require_renderer() -> None:
    """Raises `RequestError` if resvg is not installed."""
    if importlib.util.find_spec("resvg_py") is None:
        raise RequestError(f"drawing needs resvg: {sys.executable} -m pip install resvg-py")


def png(svg: str, size: int, seconds: float = SECONDS) -> bytes:
    """The picture on a transparent ground, as PNG, its longer side `size` pixels.

    Raises `Refused` if it cannot be drawn, takes more than `seconds` or 2 GB, or is empty.
    """
    written = _drawn(svg, size, fonts() if "<text" in svg else {"skip_system_fonts": True}, seconds)
    if blank(written):
        missing = " (there is no known font on this machine)" if "<text" in svg and not fonts() else ""
        raise Refused(f"{EMPTY}: no shape in the SVG can be seen{missing}")
    return written


@cache
def fonts() -> dict[str, str]:
    """The families of fonts that stand for the generic names on this machine; empty if it has none that is known."""
    found = {}
    for generic, families in _FAMILIES.items():
        for family in families:
            if not blank(_drawn(_LETTER.format(family), 9, {}, SECONDS)):
                found[generic] = family
                break
    return found


def blank(written: bytes) -> bool:
    """Whether nothing is on a PNG of resvg (8 bits RGBA): if every pixel is 0, so is every filtered one, and back."""
    width, height = dimensions(written)
    data, at = b"", 8
    while at < len(written):
        length = int.from_bytes(written[at : at + 4], "big")
        if written[at + 4 : at + 8] == b"IDAT":
            data += written[at + 8 : at + 8 + length]
        at += length + 12
    pixels = zlib.decompress(data)
    stride = 4 * width + 1  # a row begins with the number of its filter
    return not any(any(pixels[row * stride + 1 : (row + 1) * stride]) for row in range(height))


def dimensions(written: bytes) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    width, height = struct.unpack(">II", written[16:24])
    return width, height


def _drawn(svg: str, size: int, arguments: Mapping[str, object], seconds: float) -> bytes:
    """Raises `Refused`."""
    asked = json.dumps({"svg": svg, "size": size, "fonts": arguments}).encode()
    # -P: the folder of the file is not searched for modules
    command = [sys.executable, "-P", str(_RENDERER)]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise Refused(f"it takes more than {seconds:g} seconds to draw") from None
    if done.returncode == _REFUSED:
        raise Refused(f"it cannot be drawn: {done.stderr.decode('utf-8', 'replace').strip()}")
    if done.returncode:
        raise Refused("the renderer crashed over it, or took more than 2 GB of memory")
    if not done.stdout.startswith(_SIGNATURE):
        raise Refused("the renderer gave no picture")
    return done.stdout
