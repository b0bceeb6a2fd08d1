"""Reading markup: equal to an XML parser on what is well-formed, and repaired where one would give up."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.pelican.markup import MOST_DEPTH, MOST_ELEMENTS, Element, Parsed, Refused, parse, written

# "stop", "rect" and the like hold no elements: what a rectangle holds in a file, the parser puts behind it
NAMES = st.sampled_from(["g", "text", "defs", "lineargradient", "clipPath", "a1", "f-o.o", "_x"])
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t&<>\"'"), max_size=12)
ATTRIBUTES = st.dictionaries(st.sampled_from(["id", "d", "data-x", "fill", "x.y"]), TEXTS, max_size=3)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Character data as XML writes it, in one of the four ways."""
    text = draw(TEXTS)
    how = draw(st.sampled_from(["plain", "CDATA", "numbers", "comment"]))
    if how == "CDATA":
        return f"<![CDATA[{text.replace(']]>', '')}]]>"
    if how == "numbers":
        return "".join(
            f"&#{ord(letter)};" if i % 2 else f"&#x{ord(letter):x};" for i, letter in enumerate(text)
        )
    if how == "comment":
        return f"<!-- {text.replace('-', '')} -->"
    return escape(text).replace("]]&gt;", "")


def elements(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def build(name: str, attributes: dict[str, str], inside: list[str], short: bool) -> str:
        told = "".join(f" {key} = {quoteattr(value)}" for key, value in attributes.items())
        if not inside and short:
            return f"<{name}{told}/>"
        return f"<{name}{told} >{''.join(inside)}</{name}\n>"

    return st.builds(build, NAMES, ATTRIBUTES, st.lists(children, max_size=4), st.booleans())


DOCUMENTS = st.recursive(elements(texts()), lambda inner: elements(st.one_of(inner, texts())), max_leaves=12)


def tree_of(element: Element) -> tuple:
    """Name, attributes, children; texts as they are."""
    children = [child if isinstance(child, str) else tree_of(child) for child in element.children]
    return element.name, element.attributes, [child for child in children if child]


def tree_of_xml(element: ElementTree.Element) -> tuple:
    children: list = [element.text]
    for child in element:
        children += [tree_of_xml(child), child.tail]
    return element.tag, dict(element.attrib), [child for child in children if child]


def parsed(text: str) -> Parsed:
    found = parse(text, 0, len(text))
    assert found is not None
    return found


@given(DOCUMENTS)
def test_what_is_well_formed_is_read_as_by_an_xml_parser(inside):
    document = f"<svg>{inside}</svg>"
    found = parsed(document + " and prose")
    assert tree_of(found.root) == tree_of_xml(ElementTree.fromstring(document))
    assert found.whole and found.end == len(document) and not found.repairs


@given(DOCUMENTS)
def test_what_is_written_is_read_back_the_same(inside):
    found = parsed(f"<svg>{inside}</svg>").root
    assert tree_of_xml(ElementTree.fromstring(written(found))) == tree_of(found)


PIECES = [
    *(
        "<svg",
        "<g",
        "<rect ",
        "</g>",
        "</",
        ">",
        "/>",
        "/",
        "=",
        '"',
        "'",
        " ",
        "x",
        "id=",
        "&",
        "&amp;",
        "&#0;",
        "&#xD800;",
    ),
    *(
        "&#99999999;",
        "&nbsp;",
        "<!--",
        "-->",
        "<![CDATA[",
        "]]>",
        "]]",
        "<?",
        "?>",
        "\0",
        "\ufffe",
        "\ud800",
        "é",
        "<",
        "\n",
    ),
    *("<1", "xmlns", "<text>", "</text>", "</svg>", "<a b=c d e='f' e=\"g\">", '<x y="<z'),
]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_whatever_is_read_is_written_well_formed(inside):
    text = f"<svg>{inside}"
    found = parsed(text)
    # of our own parser an XML parser wants only that prefixes are declared, which the pieces have none of
    assert tree_of_xml(ElementTree.fromstring(written(found.root))) == tree_of(found.root)
    if "</svg>" not in inside:
        assert not found.whole and "it is cut off: its end was added" in found.repairs


@pytest.mark.parametrize(
    ("inside", "tree", "repairs"),
    [
        ("<rect x=1 y='2'>", [("rect", {"x": "1", "y": "2"}, [])],
         {"an attribute without quotes was read": 1, "<rect> was closed": 1}),
        ("<rect x=1/>", [("rect", {"x": "1"}, [])], {"an attribute without quotes was read": 1}),
        ("<rect x='1' x='2'/>", [("rect", {"x": "1"}, [])], {"an attribute given twice counts once": 1}),
        ("<rect><circle></rect>", [("rect", {}, []), ("circle", {}, [])],
         {"<rect> was closed": 1, "<circle> was closed": 1, "</rect> that closes nothing was passed over": 1}),
        ("<rect><title>t</title></rect>", [("rect", {}, [("title", {}, ["t"])])], {}),
        ("<g><g></svg>", [("g", {}, [("g", {}, [])])], {"<g> was closed": 2}),
        ("<g></p></g>", [("g", {}, [])], {"</p> that closes nothing was passed over": 1}),
        ("<g>a & b &foo; &lt;</g>", [("g", {}, ["a & b &foo; <"])],
         {"a bare & was taken as text": 1, "the unknown entity &foo; was taken as text": 1}),
        ("<g>1 < 2</g>", [("g", {}, ["1 < 2"])], {"a < that begins no tag was taken as text": 1}),
        ('<g id="a><rect/></g>', [("rect", {}, [])],
         {"a half-written <g> was dropped": 1, "</g> that closes nothing was passed over": 1}),
        ("<G id='a'></g>", [("G", {"id": "a"}, [])], {}),
        ("<g></g <rect/>", [("g", {}, [("rect", {}, [])])],
         {"a half-written </g> was dropped": 1, "<g> was closed": 1}),
        ("<g ,id='a'/>", [("g", {"id": "a"}, [])], {"a stray character in a tag was passed over": 1}),
        ("<g = id='a'/>", [("g", {"id": "a"}, [])], {"a stray character in a tag was passed over": 1}),
        ("<g>\0é</g>", [("g", {}, ["é"])], {"control characters were dropped": 1}),
        ("<!DOCTYPE svg PUBLIC 'x' 'http://y'><g/>", [("g", {}, [])], {}),
        ("<?php <g/> ?><g/>", [("g", {}, [])], {}),
    ],
)  # fmt: skip
def test_repairs_are_made_and_told(inside, tree, repairs):
    found = parsed(f"<svg>{inside}</svg>".replace("</svg></svg>", "</svg>"))
    assert tree_of(found.root)[2] == tree
    assert found.repairs == Counter(repairs) and found.whole


@pytest.mark.parametrize(
    ("text", "tree", "dropped"),
    [
        ("<svg><g><rect x='1'/><circle r='", [("g", {}, [("rect", {"x": "1"}, [])])], "circle"),
        ("<svg><g><rect x='1'/></", [("g", {}, [("rect", {"x": "1"}, [])])], ""),
        ("<svg><g><rect x='1'/><", [("g", {}, [("rect", {"x": "1"}, [])])], ""),
        ("<svg><g>one &am", [("g", {}, ["one "])], ""),
        ("<svg><g>one <![CDATA[two", [("g", {}, ["one two"])], ""),
        ("<svg><g>one <!-- two", [("g", {}, ["one "])], ""),
    ],
)
def test_what_is_cut_off_keeps_what_is_whole(text, tree, dropped):
    found = parsed(text)
    assert tree_of(found.root)[2] == tree and not found.whole
    expected = {"it is cut off: its end was added": 1, "<g> was closed": 1}
    assert found.repairs == Counter(
        expected | ({f"a half-written <{dropped}> was dropped": 1} if dropped else {})
    )


@pytest.mark.parametrize("text", ["<svg", "<svg ", '<svg xmlns="http://www.w3', "<svg xmlns='x' <g>"])
def test_a_first_tag_that_is_cut_off_is_nothing(text):
    assert parse(text, 0, len(text)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<svg>" + "<g>" * MOST_DEPTH, "its elements are nested more than 128 deep"),
        ("<svg>" + "<g/>" * MOST_ELEMENTS, "it has more than 20,000 elements"),
        (
            "<svg><!DOCTYPE a [<!ENTITY b 'c'>]>",
            "it declares XML entities, which can grow without end or read files",
        ),
        ("<svg><!ENTITY b 'c'>", "it declares XML entities, which can grow without end or read files"),
    ],
)
def test_limits_are_refused(text, reason):
    with pytest.raises(Refused) as error:
        parse(text, 0, len(text))
    assert str(error.value) == reason


def test_the_limits_themselves_are_allowed():
    assert written(parsed("<svg>" + "<g>" * (MOST_DEPTH - 1)).root).count("<g") == MOST_DEPTH - 1
    assert written(parsed("<svg>" + "<g/>" * (MOST_ELEMENTS - 1)).root).count("<g") == MOST_ELEMENTS - 1


@pytest.mark.parametrize(
    "piece",
    ["<", "&", "<g ", '<g a="', "</", "</g", "<!--", "<![CDATA[", "<a b", "=", "'", " a", "a=' ", "<g a=b "],
)
def test_reading_takes_time_in_proportion_to_the_length(piece):
    """300 kB of anything in a second: what grows with the square of the length would take hours."""
    text = "<svg>" + piece * (300_000 // len(piece))
    begin = time.process_time()
    with suppress(Refused):
        parse(text, 0, len(text))
    # at most 0.5 s here; the bound leaves room for a slow machine
    assert time.process_time() - begin < 10
