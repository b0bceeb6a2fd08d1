"""`moelocal pelican` from end to end, with the embedded model and with servers and files of the test's own."""

from __future__ import annotations

import argparse
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

import moelocal
from drawings import PELICAN, RICH
from moelocal.errors import NumericsError, RequestError
from moelocal.pelican import command, makers, render
from moelocal.pelican.answers import Answers
from moelocal.pelican.command import PROMPT, add_flags, run
from moelocal.pelican.makers import Maker

pytest.importorskip("resvg_py")


def asked(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(arguments)


def refusal(*arguments: str) -> str:
    with pytest.raises(RequestError) as error:
        run(asked(*arguments))
    return str(error.value)


def figures(capsys, *arguments: str) -> dict:
    """Run with --json: what the last line says."""
    run(asked(*arguments, "--json"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


class Fake(Maker):
    """A maker that draws a pelican with a part that depends on the seed, and fails at one seed."""

    def __init__(self, name: str = "fake", fails: object = None) -> None:
        super().__init__(
            name, "moelocal", f"weights of {name}", {"temperature": None}, "4.00 bits per weight"
        )
        self.name = name  # that of a record of somebody else can be anything
        self.fails = fails
        self.text = PELICAN
        self.made: list[tuple[str, int]] = []
        self.closed = 0

    def answer(self, prompt, seed, report):
        if seed == self.fails:
            raise NumericsError(f"the logits of {self.name} are NaN")
        self.made.append((prompt, seed))
        report(3)
        return self.said(prompt, seed, text=self.text.replace('r="16"', f'r="{seed + 5}"'))

    def close(self):
        self.closed += 1


@pytest.fixture
def fakes(monkeypatch):
    """Makers in place of those that the flags name."""
    placed: list[Fake] = []
    monkeypatch.setattr(command, "_drawers", lambda parsed, prompt: (placed, []))
    return placed


# the embedded model


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Two answers of the embedded model that end early, made once."""
    folder = tmp_path_factory.mktemp("pelicans")
    run(asked("--count", "2", "--seed", "5", "--no-thinking", "--max-tokens", "150", "--to", str(folder)))
    return folder


def test_the_embedded_model_draws_from_end_to_end(embedded, capsys):
    files = {file.name for file in embedded.iterdir()}
    assert files == {"answers", "index.html", "sheet.png", "shown.json"}
    records = [json.loads(file.read_text()) for file in sorted((embedded / "answers").iterdir())]
    assert sorted(each["seed"] for each in records) == [5, 6]
    for each in records:
        assert (each["model"], each["tokens"], each["finish_reason"]) == ("embedded", 150, "length")
        assert each["text"].startswith("<svg") and each["quantization"].startswith("16.00 bits per weight")
        assert each["seconds"] > 0 and each["tokens_per_second"] > 0
    page = (embedded / "index.html").read_text()
    assert page.count("it is cut off: its end was added") == 2 and "data:image/svg+xml;base64," in page
    assert render.dimensions((embedded / "sheet.png").read_bytes())[0] > 600


def test_what_is_there_is_not_made_again_and_no_model_is_loaded(embedded, capsys, monkeypatch):
    monkeypatch.setattr(moelocal, "load", lambda *a, **k: pytest.fail("loaded"))
    flags = ("--seed", "5", "--no-thinking", "--max-tokens", "150", "--to", str(embedded))
    found = figures(capsys, "--count", "2", *flags)
    assert (found["made"], found["kept"], found["files"], found["failed"]) == (0, 2, 0, [])
    assert found["prompts"] == [PROMPT]
    model = found["models"][0]
    assert (model["model"], model["answers"], model["repaired"], model["tokens"]) == ("embedded", 2, 2, 300)
    assert found["blind_seed"] is None and Path(found["page"]).exists() and Path(found["sheet"]).exists()


def test_an_answer_is_that_of_its_seed_and_settings(embedded):
    """What `generate` answers to the same."""
    model = moelocal.load(progress=False)
    done = moelocal.generate(model, PROMPT, max_tokens=150, seed=6, thinking=False)
    records = [json.loads(file.read_text()) for file in (embedded / "answers").iterdir()]
    assert next(each for each in records if each["seed"] == 6)["text"] == done.text


@pytest.mark.parametrize(
    "change", ["prompt", "seed", "max_tokens", "temperature", "thinking", "weights", "dtype", "name"]
)
def test_other_settings_are_other_answers(monkeypatch, change):
    def key(changed: bool) -> str:
        weights = "abd" if changed and change == "weights" else "abc"
        monkeypatch.setattr(makers.Identity, "of", lambda *a: makers.Identity("m", "q", 1, weights))
        settings: dict = {"max_tokens": 9, "temperature": None, "thinking": None}
        if changed and change in settings:
            settings[change] = 1
        name = "n" if changed and change == "name" else "m"
        dtype = "float16" if changed and change == "dtype" else None
        prompt, seed = (
            "Q" if changed and change == "prompt" else "P",
            2 if changed and change == "seed" else 1,
        )
        return makers.Ours(Path("x"), name, dtype, settings, False).key(prompt, seed)

    assert key(False) == key(False) != key(True)


# several models, prompts, and what goes wrong


def test_each_model_draws_each_prompt_with_each_seed(tmp_path, fakes, capsys):
    fakes += [Fake("one"), Fake("two")]
    (tmp_path / "prompts.txt").write_text("A crab\n\n  A heron  \nA pelican\n")
    flags = (
        "--prompt",
        "A pelican",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--to",
        str(tmp_path / "to"),
    )
    found = figures(capsys, *flags, "--count", "2", "--seed", "3")
    assert found["prompts"] == ["A pelican", "A crab", "A heron"]
    expected = [(prompt, seed) for prompt in found["prompts"] for seed in (3, 4)]
    assert fakes[0].made == fakes[1].made == expected
    assert (fakes[0].closed, fakes[1].closed) == (1, 1)
    assert [(m["model"], m["answers"], m["different"]) for m in found["models"]] == [
        ("one", 6, 2),
        ("two", 6, 2),
    ]


def stop(self, prompt, seed, report):
    """As Ctrl-C in the middle of the third answer."""
    if seed == 2:
        raise KeyboardInterrupt
    return self.said(prompt, seed, text=self.text)


def test_a_run_that_was_stopped_shows_what_is_there_and_goes_on_where_it_was(
    tmp_path, fakes, capsys, monkeypatch
):
    fakes += [Fake(), Fake("never asked")]
    flags = ("--to", str(tmp_path), "--json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Fake, "answer", stop)
        run(asked(*flags))
    out, err = capsys.readouterr()
    assert err == "stopped; the same command goes on where it was\n"
    found = json.loads(out.splitlines()[-1])
    assert (found["made"], found["interrupted"], found["failed"]) == (2, True, [])
    assert Path(found["page"]).read_text().count("<figure") == 2
    assert [each.closed for each in fakes] == [1, 0]
    fakes.pop()
    found = figures(capsys, *flags)
    assert (found["made"], found["kept"], found["interrupted"]) == (2, 2, False)
    assert [seed for _, seed in fakes[0].made] == [2, 3]


def test_a_run_that_was_stopped_before_the_first_answer_writes_nothing(tmp_path, fakes, capsys, monkeypatch):
    fakes.append(Fake())
    monkeypatch.setattr(Fake, "answer", stop)
    with pytest.raises(KeyboardInterrupt):
        run(asked("--to", str(tmp_path), "--seed", "2", "--json"))
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lost", "page"), [("shown.json", None), ("index.html", None), ("sheet.png", "index.html")]
)
def test_what_was_made_is_told_and_kept_when_it_cannot_be_shown(
    tmp_path, fakes, capsys, monkeypatch, lost, page
):
    fakes.append(Fake())

    def write(path, content):
        if path.name == lost:
            raise RequestError(f"{path}: cannot be written: No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(command.show, "write_whole", write)
    told = refusal("--to", str(tmp_path), "--count", "2", "--json")
    assert told == f"{tmp_path / lost}: cannot be written: No space left on device"
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["made"], found["failed"], found["sheet"]) == (2, [told], None)
    assert found["page"] == (page and str(tmp_path / page))
    assert [model["answers"] for model in found["models"]] == ([] if lost == "shown.json" else [2])
    assert len(list((tmp_path / "answers").iterdir())) == 2


@pytest.mark.parametrize("fonts", [{}, {"sans_serif_family": "DejaVu Sans"}])
def test_a_sheet_without_letters_is_told(tmp_path, fakes, capsys, monkeypatch, fonts):
    fakes.append(Fake())
    monkeypatch.setattr(render, "fonts", lambda: fonts)
    run(asked("--to", str(tmp_path), "--count", "1"))
    told = "note   the sheet has no letters: there is no known font on this machine (DejaVu Sans is one)\n"
    assert (told in capsys.readouterr().out) == (not fonts)


def test_an_answer_that_cannot_be_kept_is_shown(tmp_path, fakes, capsys, monkeypatch):
    fakes.append(Fake())

    def full(*arguments):
        raise RequestError("full")

    monkeypatch.setattr(Answers, "keep", full)
    assert refusal("--to", str(tmp_path), "--json") == "1 of 1 models did not answer: full"
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["made"] == 1 and Path(found["page"]).read_text().count("<figure") == 1


def test_where_one_of_two_models_fails_there_is_no_vote_but_its_answers_are_told(tmp_path, fakes, capsys):
    fakes += [Fake("one", fails=0), Fake("two")]
    told = refusal("--to", str(tmp_path), "--count", "1", "--blind", "--json")
    assert told == "--blind compares models, got one: two; name more with --model, --server or --svgs"
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["made"], found["page"], found["failed"]) == (1, None, ["the logits of one are NaN", told])


def test_a_model_that_fails_does_not_end_the_run(tmp_path, fakes, capsys):
    fakes += [Fake("one", fails=1), Fake("two")]
    told = refusal("--to", str(tmp_path), "--count", "3", "--json")
    assert told == "1 of 2 models did not answer: the logits of one are NaN"
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert found["failed"] == ["the logits of one are NaN"] and err == "one: the logits of one are NaN\n"
    assert [(m["model"], m["answers"]) for m in found["models"]] == [("one", 1), ("two", 3)]
    assert fakes[0].closed == 1


def test_where_nobody_answers_the_error_is_that_of_the_first(tmp_path, fakes, capsys):
    fakes += [Fake("one", fails=0), Fake("two", fails=0)]
    with pytest.raises(NumericsError, match=r"^the logits of one are NaN$"):
        run(asked("--to", str(tmp_path)))
    assert not (tmp_path / "index.html").exists()


def test_what_is_not_drawn_is_named(tmp_path, fakes, capsys):
    fakes.append(Fake("fake\x07"))  # a record of somebody else
    fakes[0].text = "No."
    run(asked("--to", str(tmp_path), "--count", "1"))
    assert "fake?, seed 0: nothing to draw: there is no <svg> in the answer\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--count", "0"], "--count: expected at least 1, got 0"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
        (["--temperature", "-1"], "--temperature: expected a number from 0, got -1.0"),
        (["--temperature", "nan"], "--temperature: expected a number from 0, got nan"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--blind", "-2"], "--blind: expected at least 0, got -2"),
        (["--prompt", " "], "--prompt: expected a text, got nothing"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt: cannot be read: No such file or directory"),
        (["--svgs", "nowhere"], "--svgs nowhere: expected a folder with .svg files"),
        (["--model", "embedded", "--model", "embedded"],
         "two models are called embedded: rename one, so that they can be told apart"),
        (["--blind", "--max-tokens", "1", "--count", "1"],
         "--blind compares models, got one: embedded; name more with --model, --server or --svgs"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    assert refusal(*flags) == told


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\n \n", "no prompt in it; expected one a line"), (b"a\xff", "is not UTF-8 at byte 1")],
)
def test_a_file_of_prompts_without_one_is_named(tmp_path, content, told):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert refusal("--prompts", str(file)) == f"--prompts {file}: {told}"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, fakes, monkeypatch):
    fakes.append(Fake())
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: path != tmp_path)
        assert refusal("--to", str(tmp_path / "a" / "b")) == (
            f"--to {tmp_path / 'a' / 'b'}: cannot be written; name another folder"
        )
    (tmp_path / "to").write_text("a file")
    told = refusal("--to", str(tmp_path / "to"), "--count", "1")
    assert told == f"--to {tmp_path / 'to'}: cannot be written; name another folder" and not fakes[0].made


@pytest.mark.parametrize("name", ["index.html", "sheet.png"])
def test_the_page_of_something_else_is_not_replaced(tmp_path, fakes, name):
    fakes.append(Fake())
    (tmp_path / name).write_text("of a person")
    assert refusal("--to", str(tmp_path), "--count", "1") == (
        f"--to {tmp_path}: holds {name}, but no shown.json: `moelocal pelican` did not write it and does not replace "
        "it; name another folder, or move it away"
    )
    assert not fakes[0].made and [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of a person"
    (tmp_path / "shown.json").write_text("{")  # of a run of ours that was damaged: it may go on
    run(asked("--to", str(tmp_path), "--count", "1"))
    assert (tmp_path / name).read_bytes() != b"of a person"


# files and servers


def test_files_stand_beside_under_their_names(tmp_path, capsys):
    others = tmp_path / "others"
    others.mkdir()
    (others / "kimi.svg").write_text(RICH)
    (others / "gpt-5.svg").write_text("<svg><script>x</script><rect width='9' height='9'/></svg>")
    twice = ("--svgs", str(others), "--svgs", str(others))
    found = figures(capsys, *twice, "--to", str(tmp_path / "to"))
    assert [(m["model"], m["drawn"], m["repaired"]) for m in found["models"]] == [
        ("gpt-5", 1, 1),
        ("kimi", 1, 0),
    ]
    assert (found["made"], found["kept"], found["files"]) == (0, 0, 2)
    assert "left out: &lt;script&gt;" in (tmp_path / "to" / "index.html").read_text()


class Handler(BaseHTTPRequestHandler):
    """Enough of the OpenAI API: two models, and the pelican in three pieces."""

    models = ("alpha", "beta")
    bodies: ClassVar[list[dict]] = []

    def do_GET(self):
        self._send("application/json", json.dumps({"data": [{"id": name} for name in self.models]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        third = len(PELICAN) // 3
        pieces = [PELICAN[:third], PELICAN[third : 2 * third], PELICAN[2 * third :]]
        events: list[dict] = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        events.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 300}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
        self._send("text/event-stream", "".join(lines).encode())

    def _send(self, kind, content):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Handler.bodies.clear()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_draws_too(tmp_path, capsys):
    with serving() as address:
        flags = ("--server", f"{address}=beta", "--count", "2", "--temperature", "0.5", "--to", str(tmp_path))
        found = figures(capsys, *flags)
        again = figures(capsys, *flags)
    assert (found["made"], again["made"], again["kept"]) == (2, 0, 2)
    assert [(m["model"], m["source"], m["drawn"]) for m in found["models"]] == [("beta", "server", 2)]
    assert found["models"][0]["tokens"] == 600
    asked_for = [
        (b["model"], b["messages"], b["seed"], b["temperature"], b["max_tokens"]) for b in Handler.bodies
    ]
    message = [{"role": "user", "content": PROMPT}]
    assert asked_for == [("beta", message, 0, 0.5, 16384), ("beta", message, 1, 0.5, 16384)]


def test_a_server_with_several_models_has_to_be_told_which(tmp_path):
    with serving() as address:
        assert refusal("--server", address).startswith(f"server {address}: it serves 2 models; name one")


EVIL = "evil\x1b]0;pwn\x07\x9b2J\u202e [/red]"
PLAIN = "evil?]0;pwn??2J? [/red]"


def test_the_name_of_a_model_does_not_steer_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Handler, "models", (EVIL,))
    with serving() as address:
        flags = ("--server", address, "--count", "1", "--to", str(tmp_path))
        found = figures(capsys, *flags)
        run(asked(*flags))
    assert Handler.bodies[0]["model"] == EVIL  # the server is asked by the name that it knows
    assert [model["model"] for model in found["models"]] == [PLAIN]
    printed = capsys.readouterr().out
    assert PLAIN in printed and printed.replace("\n", "").isprintable()
    kept = [json.loads(file.read_text()) for file in (tmp_path / "answers").iterdir()]
    assert [(each["model"], each["origin"]) for each in kept] == [(PLAIN, f"server {address}, model {PLAIN}")]


def test_the_name_of_a_file_does_not_steer_the_terminal(tmp_path, capsys):
    (tmp_path / "evil\x1b[2J.svg").write_text("No.")
    run(asked("--svgs", str(tmp_path), "--to", str(tmp_path / "to")))
    printed = capsys.readouterr().out
    assert "evil?[2J, evil?[2J.svg: nothing to draw" in printed and printed.replace("\n", "").isprintable()
    (kept,) = (tmp_path / "to" / "answers").iterdir()
    assert json.loads(kept.read_text())["origin"] == "evil?[2J.svg"


def test_names_in_a_folder_of_somebody_else_do_not_steer_the_terminal(tmp_path, fakes, capsys):
    """Its records and votes are files that anybody can write."""
    fakes += [Fake("one\x1b[2J"), Fake("two")]
    run(asked("--to", str(tmp_path), "--count", "1", "--blind", "1"))
    run(asked("--to", str(tmp_path), "--vote", "1=A"))
    run(asked("--to", str(tmp_path), "--count", "1"))
    printed = capsys.readouterr().out
    assert printed.count("one?[2J") == 2 and printed.replace("\n", "").isprintable()


def test_the_bar_shows_a_name_as_it_is(tmp_path, fakes, capsys, monkeypatch):
    """Not as a style of rich: an end of one that was not begun would be an error."""
    fakes.append(Fake("a [/red]"))
    monkeypatch.setattr(command.sys.stderr, "isatty", lambda: True, raising=False)
    run(asked("--to", str(tmp_path), "--count", "1"))
    assert "a [/red] " in capsys.readouterr().out


def test_a_prompt_stays_on_this_machine(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("a connection was opened"))
    told = refusal("--server", "example.org:80")
    assert told.startswith("server example.org:80: example.org is not this machine")


# the vote


def test_a_vote_from_end_to_end(tmp_path, fakes, capsys):
    fakes += [Fake("one"), Fake("two")]
    to = ("--to", str(tmp_path))
    run(asked(*to, "--count", "2", "--blind", "7", "--json"))
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["blind_seed"] == 7 and json.loads(last)["models"] is None
    page = tmp_path / "index.html"
    assert lines == [f"page   {page}", f"sheet  {tmp_path / 'sheet.png'}",
                     f"vote   moelocal pelican --to {tmp_path} --vote 1=A 2=none …"]  # fmt: skip
    assert "weights of" not in page.read_text()
    assert f"Vote with: moelocal pelican --to {tmp_path.name} --vote 1=A 2=none …;" in page.read_text()
    run(asked(*to, "--vote"))
    assert capsys.readouterr().out == "no votes yet\nwithout a vote: 1, 2\n"
    result = figures(capsys, *to, "--vote", "2=A")
    assert result["votes"] == 1 and result["open"] == [1]
    winner = result["standings"][0]
    assert winner["model"] in ("one", "two") and (winner["wins"], winner["ballots"]) == (1, 1)
    assert page.read_text().count("weights of") == 2
    assert refusal(*to, "--vote", "1=C") == "vote '1=C': expected A, B or none after the ="
    run(asked(*to, "--vote", "1=none"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "won", "ballots", "share", "95", "%", "interval", "by", "chance"]
    assert lines[1].split() == [winner["model"], "1", "2", "50", "%", "9", "to", "91", "%", "50", "%"]
    assert page.read_text().count("weights of") == 4


def test_a_page_that_was_not_written_after_a_vote_is_written_later(tmp_path, fakes, capsys, monkeypatch):
    fakes += [Fake("one"), Fake("two")]
    to = ("--to", str(tmp_path))
    run(asked(*to, "--count", "1", "--blind"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command.show, "draw", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        run(asked(*to, "--vote", "1=A"))
    assert "weights of" not in (tmp_path / "index.html").read_text()
    run(asked(*to, "--vote"))
    assert "weights of" in (tmp_path / "index.html").read_text()


def test_a_vote_is_told_when_the_page_cannot_be_written(tmp_path, fakes, capsys, monkeypatch):
    fakes += [Fake("one"), Fake("two")]
    to = ("--to", str(tmp_path))
    run(asked(*to, "--count", "1", "--blind"))

    def full(*arguments):
        raise RequestError("full")

    monkeypatch.setattr(command.show, "write_page", full)
    assert refusal(*to, "--vote", "1=A", "--json") == "full"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["votes"] == 1


def test_votes_need_hidden_names(tmp_path, fakes, capsys):
    fakes.append(Fake())
    run(asked("--to", str(tmp_path), "--count", "1"))
    assert refusal("--to", str(tmp_path), "--vote", "1=A") == (
        f"{tmp_path}: names are shown there; begin a vote with `moelocal pelican --blind`"
    )
    assert Answers(tmp_path / "answers").find(fakes[0].key(PROMPT, 0)) is not None
