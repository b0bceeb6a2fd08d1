"""The page and the sheet: everything on them, nothing from outside, nothing that runs, nothing that tells too early."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drawings import PELICAN, RICH, answer
from moelocal.errors import RequestError
from moelocal.pelican import gallery, render, show
from moelocal.pelican.answers import Answers, read_files
from moelocal.pelican.gallery import Picture, Section
from moelocal.pelican.page import page
from moelocal.pelican.sheet import MOST_TILES, sheet
from moelocal.pelican.show import Shown
from moelocal.pelican.svg import drawing
from moelocal.pelican.vote import Standing

HOSTILE = """</pre><script>alert(1)</script><img src=http://e.org/x onerror="a()"> & ' " {{ 7 * 7 }} {% raw %} \u202e"""


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.css, self._style = "", "", False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"
        self.text += " "

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        if self._style:
            self.css += data
        else:
            self.text += data


def of(text: str = PELICAN, letter: str = "", **changes) -> Picture:
    """A picture without its pixels, which a page does not need."""
    try:
        return Picture(answer(text=text, **changes), drawing(text), b"", "", letter)
    except gallery.Refused as error:
        return Picture(answer(text=text, **changes), None, b"", str(error), letter)


def write(shown: Shown) -> list[Picture]:
    pictures = show.draw(shown)
    show.write_page(shown, pictures)
    show.write_sheet(shown, pictures)
    return pictures


def check_alone(text: str) -> Reader:
    """The page loads nothing and runs nothing."""
    read = Reader(text)
    names = {tag for tag, _ in read.tags}
    assert not names & {
        "script",
        "svg",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "video",
        "audio",
        "a",
    }
    for tag, attributes in read.tags:
        assert not [key for key in attributes if key.startswith("on")]
        assert "srcset" not in attributes and "href" not in attributes and "style" not in attributes
        if "src" in attributes:
            assert tag == "img" and re.fullmatch(
                r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", attributes["src"] or ""
            )
    assert "url(" not in read.css and "@import" not in read.css
    policy = [attributes for tag, attributes in read.tags if tag == "meta" and "http-equiv" in attributes]
    assert policy == [
        {"http-equiv": "Content-Security-Policy",
         "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'"}
    ]  # fmt: skip
    return read


def test_the_page_says_all_that_is_known():
    picture = of(
        RICH,
        settings={"temperature": 0.7, "max_tokens": None},
        reasoning="Let me think.",
        finish_reason="length",
    )
    read = check_alone(
        page("Draw", [Section("one", "4 of 4 drawn", (picture,))], [], ["a remark"], "the footer")
    )
    words = " ".join(read.text.split())
    for expected in (
        "prompt Draw a pelican", "quantization 4.50 bits per weight", "seed 1", "tokens 391", "seconds 2.5",
        "tokens/s 160.0", "finished length: no room for more tokens", "temperature 0.7", "from weights of one",
        "machine a chip", "date 2026-01-02T03:04:05Z", "thinking Let me think.", "4 of 4 drawn", "a remark",
        "the footer",
    ):  # fmt: skip
        assert expected in words, expected
    assert RICH in read.text  # the raw answer, letter by letter
    assert "max tokens" not in words
    images = [attributes["src"] for tag, attributes in read.tags if tag == "img"]
    shown = [base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")).decode() for image in images]
    assert shown == [drawing(RICH).svg]


def test_what_was_repaired_and_left_out_is_said():
    cut = '<svg viewBox="0 0 9 9" onload="x()"><circle r="3"/><rec'
    words = " ".join(check_alone(page("t", [Section("one", "", (of(cut),))], [], [], "")).text.split())
    assert "it is cut off: its end was added" in words
    assert "left out: the event handler onload" in words


def test_what_is_not_drawn_says_why():
    words = check_alone(page("t", [Section("one", "", (of("No."),))], [], [], "")).text
    assert "nothing to draw: there is no <svg> in the answer" in words


def test_whatever_models_and_files_are_called_and_say_is_text():
    hostile = of(f"{HOSTILE}\n{PELICAN}", model=HOSTILE, prompt=HOSTILE, reasoning=HOSTILE, quantization=HOSTILE,
                 finish_reason=HOSTILE, origin=HOSTILE, machine=HOSTILE,
                 date=HOSTILE, settings={HOSTILE: HOSTILE})  # fmt: skip
    section = Section(HOSTILE, HOSTILE, (hostile,), winner=HOSTILE)
    standing = Standing(HOSTILE, 1, 2, 0.1, 0.9, 0.5)
    read = check_alone(page(HOSTILE, [section], [standing], [HOSTILE], HOSTILE))
    assert read.text.count(HOSTILE) >= 12


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_answer_is_shown_letter_by_letter(text):
    read = check_alone(page("t", [Section("one", "", (of(text + "x", reasoning=text),))], [], [], ""))
    # HTML has no NUL, takes every line end for \n, and leaves out the first one in <pre>
    assert text.replace("\0", "\ufffd").strip() in read.text or "\r" in text


def test_a_hidden_section_tells_no_name_and_no_figure():
    picture = of(letter="B", model="the-secret", quantization="the-bits", seed=987654, tokens=123321,
                 finish_reason="length", reasoning="the-thought",
                 origin="the-origin", prompt="the prompt", machine="the-machine")  # fmt: skip
    section = Section("Ballot 1", "not voted yet", (picture,), hidden=True)
    text = page("the prompt", [section], [], [], "")
    check_alone(text)
    for secret in (
        "the-secret",
        "the-bits",
        "987654",
        "123,321",
        "123321",
        "length",
        "the-thought",
        "the-origin",
        "the-machine",
    ):
        assert secret not in text
    assert "picture B" in text and "hidden until voted" in text
    assert "the-secret" in page("the prompt", [Section("Ballot 1", "", (picture,))], [], [], "")


def test_the_page_has_colours_for_light_and_for_dark():
    css = check_alone(page("t", [], [], [], "")).css
    assert "prefers-color-scheme: dark" in css and "color-scheme: light dark" in css


# the sheet


def test_the_sheet_is_one_picture_of_all(monkeypatch):
    pytest.importorskip("resvg_py")
    drawn = gallery.picture(answer())
    refused = gallery.picture(answer("two", None, "No."))
    assert (drawn.state, refused.state) == ("drawn", "empty")
    png = sheet(
        f"A title \0 {HOSTILE}",
        [Section("one", "x", (drawn,) * 5), Section("two", "y", (refused,))],
        "footer",
    )
    width, height = render.dimensions(png)
    # four columns of 224 with gaps of 16 and margins of 24; two rows, and one; two pixels for one
    assert width == 2 * (4 * 240 - 16 + 48)
    assert height == 2 * (64 + 50 + 2 * 280 + 50 + 280 + 36)


def test_a_ballot_that_was_voted_on_tells_all_on_the_sheet(monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "png", lambda svg, size, seconds: drawn.append(svg) or b"")
    pictures = (of(letter="A"), of(letter="B", model="a-name-of-forty-letters-that-ends-in-4bit", seed=2))
    sheet("t", [Section("Ballot 1", "voted: one", pictures, "model", winner="one")], "f")
    labels = re.findall(r">([^<]*)</text>", drawn[0])[3:-1]
    second = "seed 1 · 391 tok · 2.5 s · 160 tok/s"
    assert labels == [
        "A · one · chosen", second, "4.50 bits per weight",
        "B · a-name-of-fort…s-in-4bit", second.replace("1", "2", 1), "4.50 bits per weight",
    ]  # fmt: skip
    assert drawn[0].count('stroke-width="3"') == 1


def test_a_hidden_sheet_tells_no_name(monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "png", lambda svg, size, seconds: drawn.append(svg) or b"")
    picture = of(letter="B", model="the-secret", seed=987654, tokens=123321)
    for hidden in (True, False):
        sheet("t", [Section("Ballot 1", "", (picture,), "model", hidden=hidden)], "f")
    assert (
        all(secret not in drawn[0] for secret in ("the-secret", "987654", "123,321"))
        and ">B</text>" in drawn[0]
    )
    assert "the-secret" in drawn[1]


def test_a_large_sheet_says_what_is_on_the_page_only(monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "png", lambda svg, size, seconds: drawn.append(svg) or b"")
    sheet(
        "t",
        [Section("one", "", (of(),) * 200), Section("two", "", (of(),) * 100), Section("three", "", (of(),))],
        "f",
    )
    assert drawn[0].count("<image ") == MOST_TILES
    assert "240 of 301 pictures; all are on the page · f" in drawn[0] and "three" not in drawn[0]


# what is shown


@pytest.fixture
def drawn_without_pixels(monkeypatch):
    """Pages fast: nothing is rendered."""
    monkeypatch.setattr(render, "png", lambda svg, size, seconds=0: b"\x89PNG")


def keep(folder, answers):
    for each in answers:
        Answers(folder / "answers").keep(each)
    return answers


def test_a_vote_opens_ballot_by_ballot(tmp_path, drawn_without_pixels):
    answers = [answer(model, seed) for model in ("one", "two") for seed in range(2)] + [answer("one", 2)]
    shown = Shown.new(tmp_path, keep(tmp_path, answers), 5, "the command --model one")
    write(shown)
    text = (tmp_path / "index.html").read_text()
    assert "weights of" not in text and "the command" not in text and text.count("<figure") == 4
    again = Shown.open(tmp_path)
    assert again == shown
    again.votes.add(again.round, {2: "two"}, again.ballots)
    write(again)
    text = (tmp_path / "index.html").read_text()
    assert (
        text.count("weights of") == 2
        and "voted: two" in text
        and "the command" not in text
        and "<table" not in text
    )
    again.votes.add(again.round, {1: "none"}, again.ballots)
    write(again)
    text = (tmp_path / "index.html").read_text()
    # the one without a counterpart is shown at the end
    assert text.count("weights of") == 5 and "the command" in text and "<table" in text


def test_pictures_stand_by_prompt_and_model(tmp_path, drawn_without_pixels):
    answers = [
        answer(model, seed, prompt=prompt)
        for model in ("one", "two")
        for prompt in ("P", "Q")
        for seed in (1, 2)
    ]
    pictures = write(Shown.new(tmp_path, keep(tmp_path, answers), None, "c"))
    assert [each.answer for each in pictures] == answers
    read = check_alone((tmp_path / "index.html").read_text())
    assert "2 prompts" in read.text and "8 answers of 2 models" in read.text
    positions = [read.text.index(title) for title in ("one: P", "one: Q", "two: P", "two: Q")]
    assert positions == sorted(positions)


def test_one_picture_of_each_prompt_stands_beside_the_others(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(render, "png", lambda svg, size, seconds=0: drawn.append(svg) or b"\x89PNG")
    answers = [
        answer(model, 0, prompt=prompt)
        for model in ("one", "two")
        for prompt in ("Draw a crab", "Draw a tern that rides on a very old bicycle")
    ]
    write(Shown.new(tmp_path, keep(tmp_path, answers), None, "c"))
    read = check_alone((tmp_path / "index.html").read_text())
    assert [tag for tag, _ in read.tags].count("h2") == 2
    labels = re.findall(r">([^<]*)</text>", drawn[-1])
    took = "seed 0 · 391 tok · 2.5 s · 160 tok/s"
    tiles = ["Draw a crab", took, "Draw a tern that rides on a", "very old bicycle", took]
    words = "4.50 bits per weight · 2 of 2 drawn · all the same picture · 160.0 tokens/s"
    assert labels[1:-1] == ["one", words, *tiles, "two", words, *tiles]


def test_models_with_one_picture_stand_side_by_side(tmp_path, monkeypatch):
    """With their names, quantization and seeds; the one with several has a row of its own."""
    drawn = []
    monkeypatch.setattr(render, "png", lambda svg, size, seconds=0: drawn.append(svg) or b"\x89PNG")
    file = answer("file", None, quantization="", tokens=None, seconds=None, tokens_per_second=None)
    cut = answer("cut", 3, PELICAN[:-6])
    answers = [answer("one", 1), answer("many", 1), answer("many", 2), file, cut]
    write(Shown.new(tmp_path, keep(tmp_path, answers), None, "c"))
    read = check_alone((tmp_path / "index.html").read_text())
    words = " ".join(read.text.split())
    many = "many 4.50 bits per weight · 2 of 2 drawn · all the same picture · 160.0 tokens/s"
    assert (
        0 < words.index(many) < words.index("3 models, one picture each 3 of 3 drawn") < words.index(" one ")
    )
    labels = re.findall(r">([^<]*)</text>", drawn[-1])[1:-1]
    took = "391 tok · 2.5 s · 160 tok/s"
    assert labels == [
        "many", "4.50 bits per weight · 2 of 2 drawn · all the same picture · 160.0 tokens/s",
        "seed 1", took, "seed 2", took,
        "3 models, one picture each", "3 of 3 drawn",
        "one", f"seed 1 · {took}", "4.50 bits per weight", "file",
        "cut", f"seed 3 · {took}", "4.50 bits per weight · repaired",
    ]  # fmt: skip


def test_a_summary_counts_what_became_of_the_answers(monkeypatch):
    texts = [PELICAN, PELICAN, PELICAN[:-6], "No.", f"<!DOCTYPE a [<!ENTITY b 'c'>]>{PELICAN}"]
    pictures = []
    for number, text in enumerate(texts):
        monkeypatch.setattr(render, "png", lambda *arguments: b"")
        pictures.append(
            gallery.picture(answer(seed=number, text=text, tokens_per_second=float(number) or None))
        )
    found = show.summary(pictures)
    counted = {key: found[key] for key in ("answers", "drawn", "repaired", "empty", "refused", "different")}
    # the one that was cut off is the same picture, without the last line break
    assert counted == {"answers": 5, "drawn": 3, "repaired": 1, "empty": 1, "refused": 1, "different": 1}
    assert (found["tokens"], found["seconds"], found["tokens_per_second"]) == (5 * 391, 12.5, 2.5)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"keys": ["0"], "round": "", "seed": null, "command": ""}']
)
def test_a_damaged_list_is_named(tmp_path, content):
    (tmp_path / "shown.json").write_text(content)
    with pytest.raises(RequestError) as error:
        Shown.open(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'shown.json'}: does not fit the answers beside it; run `moelocal pelican` again"
    )


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(RequestError) as error:
        Shown.open(tmp_path)
    assert str(error.value) == f"{tmp_path}: holds no pictures; `moelocal pelican --to {tmp_path}` makes them"


# answers on disk


@pytest.mark.parametrize(
    "damage", [lambda t: t[: len(t) // 2], lambda t: "{}", lambda t: t.replace("tokens", "tok")]
)
def test_a_damaged_answer_is_named(tmp_path, damage):
    kept = Answers(tmp_path)
    kept.keep(answer())
    file = tmp_path / f"{answer().key}.json"
    assert kept.find(answer().key) == answer() and kept.find("0" * 16) is None
    file.write_text(damage(file.read_text()))
    with pytest.raises(RequestError) as error:
        kept.find(answer().key)
    assert str(error.value) == f"{file}: is no answer of this version; delete it to have it made anew"


def test_names_of_files_are_names_of_models(tmp_path):
    for name in ("gpt-5.svg", "opus 4.5-seed7.svg", "qwen3.5_seed_12.SVG", "kimi/a.svg", "kimi/b.md", "kimi/old/c.txt",
                 ".hidden.svg", ".git/x.svg", "notes.json"):  # fmt: skip
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PELICAN)
    (tmp_path / "bytes.svg").write_bytes(b"\xff" + PELICAN.encode())
    (tmp_path / "wide.svg").write_bytes(PELICAN.encode("utf-16"))
    western = '<?xml version="1.0" encoding="ISO-8859-1"?><svg>\xe9</svg>'
    (tmp_path / "western.svg").write_bytes(western.encode("latin-1"))
    found = read_files(tmp_path, "P")
    assert [(each.model, each.seed, each.origin) for each in found] == [
        ("bytes", None, "bytes.svg"), ("gpt-5", None, "gpt-5.svg"), ("kimi", None, "kimi/a.svg"),
        ("kimi", None, "kimi/b.md"), ("kimi", None, "kimi/old/c.txt"), ("opus 4.5", 7, "opus 4.5-seed7.svg"),
        ("qwen3.5", 12, "qwen3.5_seed_12.SVG"), ("western", None, "western.svg"), ("wide", None, "wide.svg"),
    ]  # fmt: skip
    assert len({each.key for each in found}) == 9
    assert [each.text for each in found] == ["\ufffd" + PELICAN] + [PELICAN] * 6 + [western, PELICAN]


def test_a_folder_without_pictures_and_a_file_too_large_are_named(tmp_path):
    for folder, told in (
        (tmp_path, "no .svg file in it"),
        (tmp_path / "no", "expected a folder with .svg files"),
    ):
        with pytest.raises(RequestError) as error:
            read_files(folder, "P")
        assert str(error.value) == f"--svgs {folder}: {told}"
    (tmp_path / "a.svg").write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(RequestError) as error:
        read_files(tmp_path, "P")
    assert (
        str(error.value)
        == f"{tmp_path / 'a.svg'}: has more than 4,194,304 bytes; a picture has some thousands"
    )
