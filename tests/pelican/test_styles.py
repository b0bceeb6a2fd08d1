"""What an attribute or a style sheet may say."""

from __future__ import annotations

import re
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.pelican import styles


@pytest.mark.parametrize(
    "value",
    [
        "red",
        "rgb(1, 2, 3)",
        "url(#a)",
        "url('#a') none",
        "translate(1 2) ROTATE(3)",
        "calc((1px + 2px) * 3)",
        "var(--a, url(#a))",
        "var(--a, rgb(calc(1 + (2)), 0, 0)) URL( '#b' )",
        "drop-shadow(0 0 1px var(--c))",
        "#fff",
        "",
    ],
)
def test_what_a_picture_needs_is_harmless(value):
    left_out = Counter()
    assert styles.harmless(value, left_out) and not left_out


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("url(http://a/b)", "a reference to http://a/b"),
        ("url(#a) url(b)", "a reference to b"),
        ("URL( 'x' )", "a reference to x"),
        ("url(#a", "a reference to #a"),
        ("url(" + "x" * 79 + "y", "a reference to " + "x" * 39 + "…" + "x" * 19 + "y"),
        ("'url(x)'", "a reference to x"),
        ("element(#a)", "a reference to #a"),
        ("expression(1)", "expression()"),
        ("\\75rl(x)", "a CSS escape (\\)"),
        ("var(--a,url(http://e/))", "a reference to http://e/"),
        ('var(--a, URL(\n"//e/x"))', "a reference to //e/x"),
        ("blur(url(//e/x))", "a reference to //e/x"),
        ("rgb(calc((image-set('x' 1x))))", "a reference to x"),
        ("var(--a, url(#a) url(b))", "a reference to b"),
        ("var(--a,/**/url(/**/x))", "a reference to /**/x"),
        ("(url(x))", "a reference to x"),
        ("var(--a,u\\72l(x))", "a CSS escape (\\)"),
        ("var(url(#a)url(x))", "a reference to x"),
        ("rgburl(#a)(1)", "rgburl()"),  # without what is in the middle it would be rgb(1)
        ("url(\u00a0#a)", "a reference to #a"),  # for CSS a file with a name of one letter
        ("url(#a\u00a0)", "a reference to #a"),
        ("\u2460url(x)", "\u2460url()"),
        ("var(" + "url(" * 9, "a reference to url"),
    ],
)
def test_what_leads_outside_is_counted(value, told):
    left_out = Counter()
    assert not styles.harmless(value, left_out)
    assert left_out == {told: 1}


ALLOWED = ["rgb", "VAR", "calc", "", "blur", "color-mix"]
OTHERS = ["url", "Url", "URL", "src", "image", "image-set", "element", "xurl", "é", "rgbx", "-rgb"]
SPACES = st.sampled_from(["", " ", "\n\t", "/* ( */", ","])


def calls(names):
    """Functions in each other, with what may stand between them."""
    leaf = st.sampled_from(["", "1", "--a", "'b'", "url(#a)", 'URL( "#b" )'])
    return st.recursive(
        leaf,
        lambda inner: st.builds(
            lambda name, arguments, space: f"{name}({space}{f' {space}'.join(arguments)})",
            st.sampled_from(names),
            st.lists(inner, max_size=3),
            SPACES,
        ),
        max_leaves=8,
    )


@given(calls(ALLOWED), SPACES)
def test_functions_on_the_list_may_stand_in_each_other(value, space):
    assert styles.harmless(space + value, Counter())


@given(calls(ALLOWED), calls(ALLOWED), st.sampled_from(OTHERS), st.sampled_from(["x", "", "'//e'", "#"]))
def test_one_that_is_not_on_the_list_is_found_wherever_it_stands(before, after, name, argument):
    for value in (
        f"{before} {name}({argument}) {after}",
        f"var(--a, {before} calc({name}({argument} {after})))",
    ):
        assert not styles.harmless(value, Counter())


def test_a_sheet_keeps_its_plain_rules():
    """Those whose selector holds nothing in brackets, which could open what a reader takes for a function."""
    left_out = Counter()
    text = (
        ".a, #b > c { fill : red ; stroke:url(#g);nonsense:1; } /* no { */ d{} "
        "e[f='g']{opacity:.5} h:first-child { fill: blue"
    )
    assert styles.sheet(text, left_out) == (
        ".a, #b > c { fill: red; stroke: url(#g) }\nh:first-child { fill: blue }"
    )
    assert not left_out


PIECES = [
    *(
        "a",
        "{",
        "}",
        ";",
        ":",
        "fill:",
        "url(",
        "#a",
        ")",
        '"',
        "'",
        "@import ",
        "@media x",
        "/*",
        "*/",
        "\\",
        "http://e",
    ),
    *("var(--a,url(//e)", "a{filter:blur(", "src(", " ", "\n", "rgb(", "</style>", "<!--", "(", "stroke:red"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=50).map("".join))
def test_whatever_a_sheet_says_what_is_kept_loads_nothing(text):
    kept = styles.sheet(text, Counter())
    assert "@" not in kept and "\\" not in kept and "<" not in kept
    local = re.sub(r"url\(\s*[\"']?#[^\s\"'()<>\\]+[\"']?\s*\)", "", kept)
    assert set(re.findall(r"([\w-]+)\(", local)) <= {"rgb", "var", "blur"}


LONG = [
    "0",
    "a",
    "(",
    "a(",
    "a)",
    "-",
    "é",
    "@a{",
    "@",
    "url(",
    "url(#",
    "/*",
    "{",
    "}",
    ";",
    ":",
    "(",
    "'",
    "a{fill:red",
    "@a;",
    " ",
    "url(\n",
]


@pytest.mark.parametrize("piece", LONG)
def test_reading_takes_time_in_proportion_to_the_length(piece):
    text = "a{fill:" + piece * ((1 << 20) // len(piece))
    begin = time.process_time()
    styles.sheet(text, Counter())
    list(styles.declarations(text, Counter()))
    # at most 1 s here; the bound leaves room for a slow machine, and the square of 2^20 takes hours
    assert time.process_time() - begin < 10
