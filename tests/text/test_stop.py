"""Stop strings across the borders of pieces."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.errors import RequestError
from moelocal.text.stop import StopStrings


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop, out = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = stop.add(piece)
        out += text
        if stopped:
            assert stop.finish() == ""
            assert stop.add("more") == ("", True)
            return out, True
    return out + stop.finish(), False


def expected(stops: list[str], text: str) -> tuple[str, bool]:
    """By the definition: try every end, shortest text first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


SMALL = st.text("ab<", max_size=20)


@given(stops=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4), pieces=st.lists(SMALL, max_size=8))
def test_the_pieces_do_not_matter(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == expected(stops, "".join(pieces))


@given(stops=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=4), pieces=st.lists(SMALL, max_size=8))
def test_only_a_possible_beginning_is_held_back(stops: list[str], pieces: list[str]) -> None:
    stop, seen, out = StopStrings(stops), "", ""
    for piece in pieces:
        text, stopped = stop.add(piece)
        seen, out = seen + piece, out + text
        if stopped:
            return
        held = seen[len(out) :]
        assert held == "" or any(string.startswith(held) for string in stops)


def test_the_stop_string_is_not_text() -> None:
    assert run(["END"], ["one E", "N", "D two"]) == ("one ", True)
    assert run(["END"], ["one E", "NX"]) == ("one ENX", False)
    assert run([], ["any", "thing"]) == ("anything", False)


def test_the_first_complete_one_wins() -> None:
    assert run(["abc", "b"], ["abc"]) == ("a", True)
    assert run(["ab", "b"], ["xab"]) == ("x", True)


def test_a_single_string_is_one_stop_string() -> None:
    assert StopStrings("END").add("E D N END!") == ("E D N ", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3], [None]])
def test_bad_stop_strings(stops: list[str]) -> None:
    bad = next(stop for stop in stops if not isinstance(stop, str) or not stop)
    with pytest.raises(
        RequestError, match=re.escape(f"stop strings must be non-empty strings, but got {bad!r}")
    ):
        StopStrings(stops)
