"""From an answer to a picture: found, repaired, made safe, or refused with the reason."""

from __future__ import annotations

import json
import re
import time
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drawings import PELICAN, RICH
from moelocal.pelican.markup import Refused
from moelocal.pelican.svg import NAMESPACE, Drawing, drawing

OPEN = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10" width="10" height="10">'
SMALL = f'{OPEN}<circle r="3"/></svg>'
BARE = '<svg viewBox="0 0 10 10"><circle r="3"/></svg>'
ADDED = "the namespace (xmlns) was missing: it was added"
CUT = "it is cut off: its end was added"


def refusal(answer: str) -> str:
    with pytest.raises(Refused) as error:
        drawing(answer)
    return str(error.value)


def elements(svg: str) -> list[tuple[str, dict[str, str]]]:
    """Elements with their attributes, in the order of the file."""
    return [
        (each.tag.removeprefix(f"{{{NAMESPACE}}}"), dict(each.attrib))
        for each in ElementTree.fromstring(svg).iter()
    ]


# found


@pytest.mark.parametrize(
    "answer",
    [
        SMALL,
        f"Sure!\n```svg\n{SMALL}\n```\nEnjoy.",
        f"```xml\n<?xml version='1.0'?>\n{SMALL}\n```",
        f"```html\n<html><body>{SMALL}</body></html>\n```",
        f"~~~\n{SMALL}\n~~~",
        f"```\n{SMALL}",
        f"Here is the picture: {SMALL} It has a circle.",
        f"The `<svg>` element below has a viewBox.\n```svg\n{SMALL}\n```",
        f"I use <svg> and </svg> around it: {SMALL}",
        f"First the plan: a <g> inside an <svg ...> tag.\n\n{SMALL}",
        f"> ```svg\n{SMALL}\n> ```",
        f"\ufeff{SMALL}\n",
        SMALL.replace("</svg>", "</svg  >"),
        SMALL.replace("<circle", "<!-- </svg> --><circle"),
        SMALL.replace("<circle", "<desc><![CDATA[</svg>]]></desc><circle"),
        SMALL.replace("<circle", '<circle id="&lt;/svg&gt;"').replace(' id="&lt;/svg&gt;"', ""),
    ],
)
def test_the_picture_is_found_wherever_it_stands(answer):
    found = drawing(answer)
    assert found.svg == SMALL
    assert (found.width, found.height, found.repairs, found.left_out) == (10, 10, (), ())


def test_of_several_the_last_is_taken_and_that_is_said():
    assert drawing(f"{PELICAN}\nBetter:\n{SMALL}") == Drawing(
        SMALL, 10, 10, ("the answer holds 2 SVGs: the last one is shown",), ()
    )


def test_a_whole_one_is_taken_before_a_later_one_that_is_cut_off():
    found = drawing(f"{SMALL}\nBetter:\n{PELICAN[:-30]}")
    assert found.svg == SMALL
    assert found.repairs == ("a later SVG in the answer is cut off: the last whole one is shown",)


def test_an_empty_one_does_not_hide_the_real_one():
    assert drawing(f"{SMALL} and <svg></svg>").svg == SMALL


def test_an_inner_svg_is_a_part_of_the_picture():
    inner = f'{OPEN}<svg x="1" width="5" viewBox="0 0 9 9"><rect width="2" height="2"/></svg><circle r="1"/></svg>'
    assert drawing(inner).svg == inner


def test_one_that_is_cut_off_behind_a_mention_is_found():
    found = drawing(f"The <svg> tag:\n{SMALL[:-6]}")
    assert elements(found.svg) == elements(SMALL)
    assert found.repairs == (CUT,)


def test_a_fence_ends_what_is_cut_off():
    found = drawing(f"```svg\n{OPEN}<text>Hi\n```\nI hope you like it!")
    assert found.svg == f"{OPEN}<text>Hi\n</text></svg>"
    assert found.repairs == ("<text> was closed", CUT)


def test_escaped_markup_is_read():
    found = drawing(
        '&lt;svg viewBox="0 0 10 10" xmlns="http://www.w3.org/2000/svg"&gt;&lt;circle r="3"/&gt;&lt;/svg&gt;'
    )
    assert found.svg == SMALL and found.repairs == ("its < and > were written as &lt; and &gt;",)


def test_markup_in_json_is_read():
    found = drawing(json.dumps({"note": "a bird\n", "svg": SMALL.replace("><", ">\n<")}))
    assert elements(found.svg) == elements(SMALL) and found.repairs == ('its quotes were written as \\"',)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "nothing to draw: there is no <svg> in the answer, which is empty"),
        ("I cannot draw.", "nothing to draw: there is no <svg> in the answer"),
        ("```svg\n<svg", "nothing to draw: the SVG is cut off in its first tag, or empty"),
        ('<svg xmlns="http://', "nothing to draw: the SVG is cut off in its first tag, or empty"),
        ("<svg></svg>", "nothing to draw: the SVG is cut off in its first tag, or empty"),
        ("<svg><g>", "nothing to draw: there is no shape in the SVG, which is cut off"),
        ("<svg><defs><rect/></defs></svg>", "nothing to draw: there is no shape in the SVG"),
        (
            "<svg><foreignObject><rect/></foreignObject></svg>",
            "nothing to draw: there is no shape in the SVG",
        ),
        ("<svg><rect/>" + " " * (1 << 20), "it is longer than 1,048,576 characters"),
        ("<svg><rect/></svg>" * 1001, "the answer holds more than 1,000 SVGs"),
        (
            '<svg viewBox="0 0 1e300 1e300"><rect/></svg>',
            "its size is 1e+300 x 1e+300, with a view of 1e+300 x 1e+300",
        ),
    ],
)
def test_what_cannot_be_drawn_is_told(answer, reason):
    assert refusal(answer) == reason


# repaired


def test_a_missing_namespace_is_added_and_a_wrong_one_put_right():
    assert drawing(BARE) == Drawing(SMALL, 10, 10, (ADDED,), ())
    wrong = drawing(BARE.replace("<svg", '<svg xmlns="https://www.w3.org/2000/svg"'))
    assert wrong == Drawing(
        SMALL, 10, 10, ("the namespace was https://www.w3.org/2000/svg: it was put right",), ()
    )


def test_a_prefix_is_taken_off():
    prefixed = f'<svg:svg xmlns:svg="{NAMESPACE}" viewBox="0 0 10 10"><svg:circle r="3"/></svg:svg>'
    assert drawing(prefixed) == Drawing(SMALL, 10, 10, (), ())


@pytest.mark.parametrize(
    ("attributes", "box", "size"),
    [
        ('viewBox="0 0 40 20"', "0 0 40 20", (40, 20)),
        ('viewBox="-5,-5, 40 20" width="100%" height="100%"', "-5 -5 40 20", (40, 20)),
        ('viewBox="0 0 40 20" width="200"', "0 0 40 20", (200, 100)),
        ('viewBox="0 0 40 20" height="200"', "0 0 40 20", (400, 200)),
        ('viewBox="0 0 40 20" width="1in" height="2cm"', "0 0 40 20", (96, 2 * 96 / 2.54)),
        ('width="30px" height="20"', "0 0 30 20", (30, 20)),
        ('width="30"', "0 0 30 150", (30, 150)),
        ('viewBox="0 0 0 20" width="30" height="40"', "0 0 30 40", (30, 40)),
        ('viewBox="0 0 nan 20" width="-3" height="40"', "0 0 300 40", (300, 40)),
        ('viewBox="0 0 20" width="1e400" height="x"', "0 0 300 150", (300, 150)),
        ("", "0 0 300 150", (300, 150)),
    ],
)
def test_a_size_is_found_as_browsers_find_it(attributes, box, size):
    found = drawing(f'<svg xmlns="{NAMESPACE}" {attributes}><rect/></svg>')
    assert (found.width, found.height) == pytest.approx(size, rel=1e-12)
    root = ElementTree.fromstring(found.svg)
    assert root.attrib["viewBox"] == box
    # ten digits are written
    assert (float(root.attrib["width"]), float(root.attrib["height"])) == pytest.approx(size, rel=1e-9)
    missing = box == "0 0 300 150"
    assert found.repairs == (("it says no size: 300 x 150 pixels, as in a browser",) if missing else ())


def test_names_in_the_wrong_case_are_read():
    found = drawing(
        '<SVG XMLNS="x" viewbox="0 0 9 9"><LinearGradient gradientunits="userSpaceOnUse" id="g"/><Rect/></svg>'
    )
    names = [name for name, _ in elements(found.svg)]
    assert names == ["svg", "linearGradient", "rect"]
    assert "<LinearGradient> was taken as <linearGradient>" in found.repairs
    assert "the attribute gradientunits was taken as gradientUnits" in found.repairs
    assert found.svg.count('viewBox="0 0 9 9"') == 1


def test_a_css_background_is_drawn_as_a_rectangle():
    found = drawing('<svg viewBox="1 2 3 4" style="background-color: #def; fill: red"><rect/></svg>')
    assert elements(found.svg)[0][1]["style"] == "fill: red"
    assert elements(found.svg)[1] == (
        "rect", {"x": "1", "y": "2", "width": "3", "height": "4", "fill": "#def", "stroke": "none"}
    )  # fmt: skip


@pytest.mark.parametrize("svg", [PELICAN, RICH])
@pytest.mark.parametrize("fence", ["", "```svg\n"])
def test_cut_anywhere_it_is_the_beginning_of_the_picture_or_nothing(svg, fence):
    """At every byte. What is drawn holds the same elements, in their order, up to some point."""
    whole = elements(drawing(svg).svg)
    content = (fence + svg).encode()
    drawn = 0
    for end in range(len(content)):
        try:
            found = drawing(content[:end].decode("utf-8", "replace"))
        except Refused as error:
            assert str(error).startswith("nothing to draw: ")
            assert drawn == 0  # once there is a shape, a longer beginning has one too
            continue
        part = elements(found.svg)
        assert part == whole[: len(part)] and len(part) >= drawn
        assert CUT in found.repairs
        drawn = len(part)
    assert drawn == len(whole)


# safe

DEFS = '<defs><g id="a"><circle r="3"/></g></defs>'


@pytest.mark.parametrize(
    ("inside", "left", "told"),
    [
        ("<script>alert(1)</script>", "", ["<script>"]),
        ("<script href='http://a/b.js'/><SCRIPT>x</SCRIPT>", "", ["<script>", "<SCRIPT>"]),
        ("<svg:script>x</svg:script>", "", ["<script>"]),
        ("<g onclick='x' OnLoad='y'/>", "<g/>", ["the event handler onclick", "the event handler onload"]),
        ("<foreignObject><iframe src='http://a'/></foreignObject>", "", ["<foreignObject>"]),
        ("<iframe/><object/><embed/><link/><meta/><handler/><listener/>", "",
         ["<iframe>", "<object>", "<embed>", "<link>", "<meta>", "<handler>", "<listener>"]),
        ("<image href='http://a/b.png'/>", "", ["<image>"]),
        ("<image href='data:image/svg+xml;base64,PHN2Zz4='/>", "", ["<image>"]),
        ("<filter><feImage href='http://a/b'/></filter>", "<filter/>", ["<feImage>"]),
        ("<use href='http://a/b.svg#c'/>", "<use/>", ["a reference to http://a/b.svg#c"]),
        ("<use xlink:href='b.svg#c'/>", "<use/>", ["a reference to b.svg#c"]),
        ("<use href='data:image/svg+xml,x#a'/>", "<use/>", ["a reference to data:image/svg+xml,x#a"]),
        ("<use href='&#35;a'/>", '<use href="#a"/>', []),
        ("<a href='javascript:alert(1)'><rect/></a>", "<g><rect/></g>", ["a reference to javascript:alert(1)"]),
        ("<text><a href='#a'>x</a></text>", "<text><tspan>x</tspan></text>", ["a reference to #a"]),
        ("<rect fill='url(http://a/b#c)'/>", "<rect/>", ["a reference to http://a/b#c"]),
        ("<rect fill='url(&quot;//a&quot;)'/>", "<rect/>", ["a reference to //a"]),
        ("<rect fill='url( &quot;#a&quot; )' mask='URL(#a)'/>",
         '<rect fill="url( &quot;#a&quot; )" mask="URL(#a)"/>', []),
        (r"<rect fill='u\72l(http://a)'/>", "<rect/>", ["a CSS escape (\\)"]),
        ("<rect fill='u&#114;l(http://a)'/>", "<rect/>", ["a reference to http://a"]),
        ("<rect style='fill:red;background:url(x)'/>", '<rect style="fill: red"/>', ["a reference to x"]),
        ("<rect style='behavior:url(x);-moz-binding:url(y)'/>", "<rect/>", ["a reference to x", "a reference to y"]),
        ("<rect style='width:expression(alert(1))'/>", "<rect/>", ["expression()"]),
        ("<rect style='fill:red/*;*/;cursor:pointer'/>", '<rect style="fill: red"/>', []),
        ("<style>@import 'http://a'; .a{fill:red}</style>", "<style>.a { fill: red }</style>",
         ["the CSS rule @import"]),
        ("<style>@font-face{src:url(x)}</style>", "", ["the CSS rule @font-face"]),
        ("<style>@media all{a{fill:red}} b{fill:red}</style>", "<style>b { fill: red }</style>",
         ["the CSS rule @media"]),
        ("<style>a{fill:image-set('x' 1x)}</style>", "", ["a reference to x"]),
        ("<style href='x' type='text/xsl'>a{}</style>", "", ["a reference to x"]),
        ("<rect><animate attributeName='href' to='x'/><set/></rect>", "<rect/>",
         ["animation: the picture is shown still (2 times)"]),
        ("<mpath/><discard/>", "", ["animation: the picture is shown still (2 times)"]),
        ("<rect data-x='1' aria-label='x' inkscape:y='2' xmlns:e='http://e' tabindex='1'/>", "<rect/>", []),
        ("<metadata><rdf:RDF/></metadata><sodipodi:namedview/><title>t</title>", "", []),
        ("<g xmlns='http://www.w3.org/1999/xhtml'><rect/></g>", "<g><rect/></g>", []),
        ("<?xml-stylesheet href='http://a'?>", "", []),
    ],
)  # fmt: skip
def test_what_a_still_picture_does_not_need_is_left_out_and_named(inside, left, told):
    found = drawing(SMALL.replace("<circle", f"{inside}<circle"))
    assert found.svg == SMALL.replace("<circle", f"{left}<circle")
    assert found.left_out == tuple(told)
    assert found.repairs == () or found.repairs == ("<SCRIPT> was taken as <script>",)


@pytest.mark.parametrize(
    "answer",
    [
        f'<!DOCTYPE svg [<!ENTITY lol "lol">]>{SMALL}',
        f'<?xml version="1.0"?>\n<!DOCTYPE svg [\n <!ENTITY a SYSTEM "file:///etc/passwd">\n]>\n{SMALL}',
        f'{PELICAN}\n<!DOCTYPE svg [<!ENTITY lol "lol">]>{SMALL}',
        SMALL.replace("<circle", '<!ENTITY lol "lol"><circle'),
        SMALL.replace("<circle", "<!DOCTYPE x [ <circle"),
    ],
)
def test_entities_are_refused(answer):
    assert refusal(answer) == "it declares XML entities, which can grow without end or read files"


def test_a_plain_document_type_is_passed_over():
    assert drawing(RICH).repairs == ()


def test_a_few_elements_that_draw_thousands_are_refused():
    """Six levels of ten uses each are a million circles."""
    levels = "".join(f"<g id='a{i}'>" + f"<use href='#a{i - 1}'/>" * 10 + "</g>" for i in range(1, 7))
    bomb = f'<svg><defs><g id="a0"><circle r="1"/></g>{levels}</defs><use href="#a6"/></svg>'
    assert refusal(bomb) == "it draws more than 100,000 elements, by using them again and again"
    assert "a3" in drawing(bomb.replace('<use href="#a6"/>', "<rect/>").replace("#a3'", "#a0'")).svg


@pytest.mark.parametrize("piece", ["0", "(", "a", "1 ", "rgb(", "url(#a) "])
@pytest.mark.parametrize("name", ["d", "fill", "width", "viewBox", "style", "id"])
def test_a_long_attribute_takes_time_in_proportion_to_its_length(name, piece):
    text = ("fill:" if name == "style" else "") + piece * (1_000_000 // len(piece)) + "!"
    begin = time.process_time()
    drawing(f'<svg {name}="{text}"><rect width="9" height="9"/></svg>')
    # at most 0.4 s here; 40,000 digits took 7 s when the time grew with the square
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    "part",
    [
        '<rect mask="var(--a,url(http://e.org/m.svg#x))"/>',
        '<rect style="fill: var(--a, url(http://e.org/x))"/>',
        "<style>rect{filter:blur(url(http://e.org/x))}</style><rect/>",
        '<g fill="rgb(calc(1 + image-set(&quot;http://e.org/x&quot; 1x)))"><rect/></g>',
    ],
)
def test_what_leads_outside_within_another_function_is_left_out(part):
    found = drawing(f"{OPEN}{part}</svg>")
    assert "e.org" not in found.svg and "url" not in found.svg
    assert len(found.left_out) == 1 and found.left_out[0].startswith("a reference to http://e.org/")


def test_patterns_that_paint_each_other_thousands_of_times_are_refused():
    levels = "".join(
        f"<pattern id='p{i}'>" + f"<rect fill='url(#p{i - 1})'/>" * 12 + "</pattern>" for i in range(1, 6)
    )
    assert refusal(f'<svg>{levels}<rect fill="url(#p5)"/></svg>').startswith(
        "it draws more than 100,000 elements"
    )


def test_a_chain_of_references_has_an_end():
    chain = "".join(f'<g id="a{i}"><use href="#a{i + 1}"/></g>' for i in range(300))
    assert refusal(f"<svg>{chain}<rect/></svg>") == "its references lead over more than 200 elements"


@pytest.mark.parametrize(
    ("inside", "left"),
    [
        ('<g id="a"><use href="#a"/></g>', '<g id="a"><use/></g>'),
        ('<g id="a" mask="url(#a)"/>', '<g id="a"/>'),
        (
            '<g id="a"><use href="#b"/></g><g id="b"><use href="#a"/></g>',
            '<g id="a"><use href="#b"/></g><g id="b"><use/></g>',
        ),
    ],
)
def test_a_reference_in_a_circle_is_taken_out(inside, left):
    found = drawing(SMALL.replace("<circle", f"{inside}<circle"))
    assert found.svg == SMALL.replace("<circle", f"{left}<circle")
    assert found.repairs == ("a reference that leads back to itself was taken out",)


PIECES = [
    *("<svg", "<svg>", "<g ", "<rect", "<script", "<style>", "</style>", "<foreignObject>", "<image "),
    *("<use ", "<a ", "<animate ", "<text>", "</g>", "</svg>", "/>", ">", '"', "'", "=", " onload="),
    *(" href=", " xlink:href=", " style=", " fill=", " id=", "url(", "#a", ")", "http://e.org/x"),
    *("javascript:x", "//e", "@import ", "{", "}", ";", ":", "\\75rl(", "/*", "*/", "&", "&#117;"),
    *("&lt;", "<!--", "-->", "<![CDATA[", "]]>", "<!DOCTYPE svg>", "<?x ", "?>", "xmlns:x=", "x:y "),
    *("image-set(", "src(", "fill", "\0", "\n"),
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map("".join))
def test_whatever_is_asked_what_comes_out_is_safe(inside):
    """Read by an XML parser: only elements of a list, no handler, no reference but to an id, no file in a style."""
    try:
        svg = drawing(f"<svg><circle r='1'/>{inside}</svg>").svg
    except Refused:
        return
    for element in ElementTree.fromstring(svg).iter():
        assert element.tag.startswith(f"{{{NAMESPACE}}}")
        name = element.tag.removeprefix(f"{{{NAMESPACE}}}").lower()
        assert name in {"svg", "g", "rect", "circle", "style", "use", "text", "tspan"}
        for key, value in element.attrib.items():
            assert not key.lower().startswith("on") and "}" not in key
            if key == "href":
                assert value.startswith("#")
            elif key not in ("id", "class"):
                check_css(value)
        if name == "style":
            check_css(element.text or "")
            assert "@" not in (element.text or "")


def check_css(value: str) -> None:
    """No escape, and no function but a reference to an id."""
    assert "\\" not in value
    assert (
        re.findall(
            r"[\w-]+\s*\(", re.sub(r"url\(\s*[\"']?#[^\s\"'()<>\\]+[\"']?\s*\)", "", value, flags=re.I)
        )
        == []
    )


def test_the_check_sees_what_is_unsafe():
    with pytest.raises(AssertionError):
        check_css("url(http://e)")
    check_css("url(#a) red")


SHAPES = st.sampled_from(
    ['<rect width="9" height="9" fill="red"/>', '<circle cx="5" cy="5" r="3"/>', '<path d="M0 0 L9 9 L0 9 Z"/>',
     '<g opacity=".5">\n<rect width="4" height="3"/></g>', "<!-- a < b -->",
     '<text x="1" y="8">Pelikan über &amp; é</text>',
     '<defs><linearGradient id="g"><stop offset="0"/></linearGradient></defs>', "<style>rect { stroke: red }</style>"]
)  # fmt: skip


@given(st.lists(SHAPES, min_size=1, max_size=6), st.floats(0, 1))
def test_a_valid_svg_cut_at_any_byte_is_rendered_or_nothing_to_draw(shapes, share):
    resvg_py = pytest.importorskip("resvg_py")
    content = f'<svg xmlns="{NAMESPACE}" viewBox="0 0 9 9">{"".join(shapes)}</svg>'.encode()
    try:
        found = drawing(content[: int(share * len(content))].decode("utf-8", "replace"))
    except Refused as error:
        assert str(error).startswith("nothing to draw: ")
        return
    assert resvg_py.svg_to_bytes(svg_string=found.svg, skip_system_fonts=True).startswith(b"\x89PNG")
