"""Drawing an SVG: in a process of its own, within a time, and never nothing without saying so."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from drawings import PELICAN, RICH
from moelocal.errors import RequestError
from moelocal.pelican import render
from moelocal.pelican.markup import Refused
from moelocal.pelican.svg import drawing

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20">'


@pytest.fixture
def resvg():
    return pytest.importorskip("resvg_py")


@pytest.fixture(autouse=True)
def forget_fonts():
    render.fonts.cache_clear()
    yield
    render.fonts.cache_clear()


def png(rows: list[bytes]) -> bytes:
    """A PNG of 8 bits RGBA, from rows without their filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (len(rows[0]) // 4).to_bytes(4, "big") + len(rows).to_bytes(4, "big")
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    # in two parts, as large ones are
    parts = chunk(b"IDAT", data[:5]) + chunk(b"IDAT", data[5:])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x06\0\0\0") + parts + chunk(b"IEND", b"")


def test_a_picture_is_drawn_at_its_size(resvg):
    drawn = render.png(f'{OPEN}<rect width="40" height="20" fill="red"/></svg>', 64)
    assert render.dimensions(drawn) == (64, 32)
    assert render.dimensions(render.png(drawing(PELICAN).svg, 100)) == (100, 100)


def test_letters_are_drawn_with_a_font_that_is_there(resvg):
    if not render.fonts():
        pytest.skip("this machine has no font that is known")
    assert not render.blank(render.png(f'{OPEN}<text y="15" font-family="No Such Font">abc</text></svg>', 64))
    assert not render.blank(render.png(drawing(RICH).svg, 64))


def test_a_machine_without_fonts_says_so(resvg, monkeypatch):
    monkeypatch.setattr(render, "_FAMILIES", {"font_family": ("No Such Font",)})
    with pytest.raises(Refused) as error:
        render.png(f'{OPEN}<text y="15">abc</text></svg>', 64)
    assert str(error.value) == (
        "nothing to draw: no shape in the SVG can be seen (there is no known font on this machine)"
    )


@pytest.mark.parametrize(
    "inside",
    [
        '<circle r="0"/>',
        '<rect x="99" width="9" height="9"/>',
        '<path d="M0 0"/>',
        '<g opacity="0"><circle r="9"/></g>',
    ],
)
def test_a_picture_on_which_nothing_can_be_seen_is_nothing(resvg, inside):
    with pytest.raises(Refused) as error:
        render.png(f"{OPEN}{inside}</svg>", 32)
    assert str(error.value) == "nothing to draw: no shape in the SVG can be seen"


def test_white_on_nothing_can_be_seen(resvg):
    assert render.png(f'{OPEN}<circle r="9" fill="white"/></svg>', 32)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("byte", range(8))
def test_one_byte_anywhere_is_not_blank(row, byte):
    rows = [bytearray(8), bytearray(8)]
    assert render.blank(png([bytes(each) for each in rows]))
    rows[row][byte] = 1
    assert not render.blank(png([bytes(each) for each in rows]))


def test_what_takes_too_long_is_given_up(resvg):
    noise = '<filter id="f"><feTurbulence numOctaves="100000" baseFrequency="0.1"/></filter>'
    svg = drawing(f'{OPEN}{noise}<rect width="40" height="20" filter="url(#f)"/></svg>').svg
    begin = time.monotonic()
    with pytest.raises(Refused) as error:
        render.png(svg, 512, seconds=0.5)
    assert str(error.value) == "it takes more than 0.5 seconds to draw"
    assert time.monotonic() - begin < 20  # without a limit it takes many minutes


def test_what_the_renderer_refuses_is_told(resvg):
    with pytest.raises(Refused) as error:
        render.png("<svg", 32)
    assert str(error.value).startswith("it cannot be drawn: ")


def test_a_renderer_that_crashes_takes_nothing_along(monkeypatch, tmp_path):
    crashing = tmp_path / "renderer.py"
    crashing.write_text("import os\nos.abort()\n")
    monkeypatch.setattr(render, "_RENDERER", crashing)
    with pytest.raises(Refused) as error:
        render.png(f"{OPEN}</svg>", 32)
    assert str(error.value) == "the renderer crashed over it, or took more than 2 GB of memory"


def test_a_renderer_that_fills_the_memory_is_stopped(resvg, monkeypatch, tmp_path):
    if sys.platform != "linux":
        pytest.skip("only Linux limits the memory of a process")
    greedy = tmp_path / "renderer.py"
    monkeypatch.setattr(render, "_RENDERER", greedy)
    picture = f'{OPEN}<circle r="9"/></svg>'
    text = (Path(render.__file__).parent / "renderer.py").read_text()
    greedy.write_text(text.replace("import resvg_py", "import resvg_py; bytearray(1 << 30)"))
    assert render.png(picture, 32)
    greedy.write_text(text.replace("import resvg_py", "import resvg_py; bytearray(2 << 30)"))
    with pytest.raises(Refused) as error:
        render.png(picture, 32)
    assert str(error.value) == "the renderer crashed over it, or took more than 2 GB of memory"


def test_what_is_no_picture_is_told(monkeypatch, tmp_path):
    silent = tmp_path / "renderer.py"
    silent.write_text("")
    monkeypatch.setattr(render, "_RENDERER", silent)
    with pytest.raises(Refused) as error:
        render.png(f"{OPEN}</svg>", 32)
    assert str(error.value) == "the renderer gave no picture"


def test_without_resvg_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError) as error:
        render.require_renderer()
    assert str(error.value) == f"drawing needs resvg: {sys.executable} -m pip install resvg-py"


def test_the_renderer_needs_nothing_of_the_package(resvg):
    """Its process starts fast, and what lies beside the file is not taken for a module."""
    run = f"import sys, runpy; runpy.run_path({str(render._RENDERER)!r})"
    code = f"{run}; print(any('moelocal' in name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
