"""The page holds everything, escaped, and loads nothing."""

from __future__ import annotations

import re
import stat
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.cost import page
from moelocal.cost.fields import Prompt
from moelocal.cost.sample import Pair, Recorded
from moelocal.engine.completion import Completion, Timing, Usage
from moelocal.errors import RequestError
from moelocal.text.tool_calls import ToolCall

TAGS = set(
    "html head meta title style body h1 h2 p details summary pre div".split()
)  # what the template itself has


class Reader(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def render(text: str, *, done: bool = True) -> str:
    """A page in which every text is `text`."""
    recorded = Recorded(text, text, text, Prompt(((text, text),), tools=({"name": text},)), text, 5, 7, 1.25)
    timing = Timing(0.1, 0.5, 10.0, 20.0, 1)
    completion = Completion(text, text, (ToolCall(text, {"a": text}),), (1, 2), "length", Usage(3, 2), timing)
    pair = Pair(recorded, completion if done else None, 0.5, "" if done else text)
    return page.render([pair], model=text, seed=3, offered=40, report=text, made=text)


@given(st.text(max_size=60))
def test_no_text_becomes_markup(text):
    for done in (True, False):
        found = Reader(render(text, done=done))
        assert found.tags <= TAGS
        assert found.attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "open"}


def test_scripts_of_an_answer_are_text():
    text = "</pre><script src='https://evil.example/x.js'>alert(1)</script><img src=x onerror=alert(1)>"
    found = render(text)
    assert "<script" not in found and "<img" not in found
    assert text in Reader(found).text


def test_the_page_loads_nothing():
    found = render("plain")
    assert not re.search(r"(?i)\bsrc=|href|url\(|@import|https?:", found)
    assert "default-src 'none'; style-src 'unsafe-inline'" in found


def test_both_sides_are_there_with_tokens_and_seconds():
    text = Reader(render("plain")).text
    for part in (
        "5 tokens in, 7 out; 1.25 s",
        "3 tokens in, 2 out; 0.50 s; 20.0 tokens/s; cut off at its limit",
    ):
        assert part in text
    assert "1 of 40 calls" in text and "seed 3" in text
    assert "no answer: plain" in Reader(render("plain", done=False)).text


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    file = tmp_path / "cost.html"
    page.write(file, render("\ud800"))
    assert "<pre>?</pre>" in file.read_text()


def test_the_file_is_for_its_owner_alone_and_whole(tmp_path):
    file = tmp_path / "cost.html"
    page.write(file, render("old"))
    page.write(file, render("new"))
    assert file.read_text() == render("new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["my own notes", "<!doctype html><title>mine</title>"])
def test_a_file_that_is_no_page_of_ours_stays(tmp_path, content):
    file = tmp_path / "cost.html"
    file.write_text(content)
    with pytest.raises(RequestError) as caught:
        page.write(file, render("new"))
    assert str(caught.value) == (
        f"{file}: is there already, and is no page of moelocal cost; name another file with --page, or move it away"
    )
    assert file.read_text() == content


def test_a_page_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(RequestError) as caught:
        page.write(tmp_path / "no" / "cost.html", "x")
    assert str(caught.value) == f"{tmp_path}/no/cost.html: cannot be written: No such file or directory"
