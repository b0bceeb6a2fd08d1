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
        ("url(" + "x" * 99, "a reference to " + "x" * 59 + "…"),
        ("'url(x)'", "a reference to x"),
        ("element(#a)", "a reference to #a"),
        ("expression(1)", "expression()"),
        ("\\75rl(x)", "a CSS escape (\\)"),
    ],
)
def test_what_leads_outside_is_counted(value, told):
    left_out = Counter()
    assert not styles.harmless(value, left_out)
    assert left_out == {told: 1}


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
    *("src(", " ", "\n", "rgb(", "</style>", "<!--", "(", "stroke:red"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=50).map("".join))
def test_whatever_a_sheet_says_what_is_kept_loads_nothing(text):
    kept = styles.sheet(text, Counter())
    assert "@" not in kept and "\\" not in kept and "<" not in kept
    local = re.sub(r"url\(\s*[\"']?#[^\s\"'()<>\\]+[\"']?\s*\)", "", kept)
    assert set(re.findall(r"([\w-]+)\(", local)) <= {"rgb"}


LONG = ["@a{", "@", "url(", "url(#", "/*", "{", "}", ";", ":", "(", "'", "a{fill:red", "@a;", " ", "url(\n"]


@pytest.mark.parametrize("piece", LONG)
def test_reading_takes_time_in_proportion_to_the_length(piece):
    text = "a{fill:" + piece * (300_000 // len(piece))
    begin = time.process_time()
    styles.sheet(text, Counter())
    list(styles.declarations(text, Counter()))
    # at most 0.3 s here; the bound leaves room for a slow machine
    assert time.process_time() - begin < 10
