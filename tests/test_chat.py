"""The chat with a scripted model: its conversation, commands, files, screen and keyboard."""

import io
import json
import os
import stat
from dataclasses import replace
from types import SimpleNamespace

import pytest

import moelocal
from moelocal.chat import conversation as files
from moelocal.chat.conversation import Conversation
from moelocal.chat.keyboard import Lines, open_history, state_folder
from moelocal.chat.program import HELP, Chat, summary
from moelocal.chat.screen import Screen
from moelocal.engine.completion import Completion, Event, Timing, Usage
from moelocal.engine.reuse import Miss
from moelocal.errors import NumericsError, RequestError
from moelocal.text.tool_calls import ToolCall


class Stream(io.StringIO):
    """A text stream that may say that it is a terminal."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class Script:
    """Stands in for `moelocal.stream`: each call gives the next answer and keeps what it was asked."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.calls = []
        self.closed = 0

    def stream(self, model, prompt, **options):
        self.calls.append((json.loads(json.dumps(prompt)), options))
        answer = self.answers.pop(0)
        try:
            for each in answer if isinstance(answer, list) else said(answer):
                if isinstance(each, BaseException):
                    raise each
                yield each
        finally:
            self.closed += 1


def said(text="", reasoning="", finish="stop", calls=()):
    """The events of one answer, a character at a time."""
    events = [Event(reasoning=each, tokens=(1,)) for each in reasoning]
    events += [Event(text=each, tokens=(2,)) for each in text]
    timing = Timing(0.25, 1.0, 100.0, 40.0, 1_500_000_000)
    usage = Usage(prompt=12, completion=len(events), cached=4)
    done = Completion(text, reasoning, calls, (1,) * len(events), finish, usage, timing)
    return [*events, Event(completion=done)]


STATS = "tokens · 40.0 tokens/s · first token after 0.25 s · 4 of 12 prompt tokens reused · 1.50 GB]"


@pytest.fixture
def chat_with(monkeypatch):
    """Builds a chat over scripted answers; `terminal` makes its streams one terminal in a dialogue."""

    def build(*answers, terminal=False, **options):
        script = Script(*answers)
        monkeypatch.setattr(moelocal, "stream", script.stream, raising=False)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        out, err = Stream(terminal), Stream(terminal)
        chat = Chat(
            SimpleNamespace(name="scripted", session=lambda: "its session"),
            Screen(out, err, dialogue=terminal),
            dialogue=terminal,
            **options,
        )
        return chat, script, out, err

    return build


def user(text):
    return {"role": "user", "content": text}


def assistant(text, reasoning=None):
    message = {"role": "assistant", "content": text}
    return message if reasoning is None else message | {"reasoning_content": reasoning}


def test_turns_follow_one_another(chat_with):
    chat, script, out, err = chat_with(said("Hello", "greet"), "Fine")
    chat.conversation.system = "Be brief."
    chat.run(Lines(io.BytesIO(b"Hi\n\n  \nHow are you?\r\n")))
    system = {"role": "system", "content": "Be brief."}
    assert [prompt for prompt, _ in script.calls] == [
        [system, user("Hi")],
        [system, user("Hi"), assistant("Hello", "greet"), user("How are you?")],
    ]
    assert chat.conversation.messages[-1] == assistant("Fine")
    assert out.getvalue() == "Hello\nFine\n"
    assert err.getvalue() == f"[10 {STATS}\n[4 {STATS}\n"
    assert script.closed == 2


def test_options_reach_the_engine(chat_with):
    chat, script, _, _ = chat_with("a", "b", options={"seed": 3, "stop": ("x",)})
    chat.turn("one")
    chat.turn("/think off")
    chat.turn("two")
    assert [options["thinking"] for _, options in script.calls] == [None, False]
    assert all(options["seed"] == 3 and options["stop"] == ("x",) for _, options in script.calls)


def test_raw_turns_are_texts(chat_with):
    chat, script, _, _ = chat_with("b", "d", raw=True)
    chat.turn("a")
    chat.turn("c")
    assert [prompt for prompt, _ in script.calls] == ["a", "c"]
    assert script.calls[0][1]["raw"] is True


def test_a_terminal_shows_thinking_dimmed_and_the_status_while_it_waits(chat_with):
    chat, _, out, err = chat_with(said("4", "2+2"), terminal=True)
    chat.turn("2+2?")
    dim = "".join(f"\x1b[2m{each}\x1b[0m" for each in "2+2")
    assert out.getvalue() == (
        f"\x1b[2mreading the prompt …\x1b[0m\r\x1b[K{dim}\n\n4\n\x1b[2m[4 {STATS}\x1b[0m\n"
    )
    assert err.getvalue() == ""


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_none_is_wanted(chat_with, monkeypatch, variable, value):
    chat, _, out, _ = chat_with(said("4", "2+2"), terminal=True)
    monkeypatch.setenv(variable, value)
    chat.turn("2+2?")
    assert "\x1b[2m" not in out.getvalue()


def test_a_model_cannot_steer_the_terminal_but_a_pipe_gets_its_bytes(chat_with):
    hostile = "\x1b[2Ja\x07\tb\x9b1m\n"
    chat, _, out, _ = chat_with(hostile, terminal=True)
    chat.turn("x")
    assert "␛[2Ja␇\tb\ufffd1m\n" in out.getvalue()
    chat, _, out, _ = chat_with(hostile)
    chat.turn("x")
    assert out.getvalue() == hostile


def test_interrupt_ends_the_answer_and_keeps_its_part(chat_with):
    half = [*said("Once upon", "hm")[:6], KeyboardInterrupt()]
    chat, script, out, _ = chat_with(half, "The end", terminal=True)
    chat.turn("Tell")
    assert chat.conversation.messages == [user("Tell"), assistant("Once", "hm")]
    assert "(stopped after 6 tokens, " in out.getvalue()
    assert "the part above stays in the conversation" in out.getvalue()
    assert script.closed == 1
    chat.turn("Go on")
    assert script.calls[1][0] == [user("Tell"), assistant("Once", "hm"), user("Go on")]


def test_interrupt_before_the_first_word_takes_the_message_back(chat_with):
    chat, _, out, _ = chat_with([KeyboardInterrupt()], terminal=True)
    chat.turn("Tell")
    assert chat.conversation.messages == []
    assert "your message was taken back" in out.getvalue()


def test_interrupt_ends_the_program_in_a_pipe(chat_with):
    chat, _, _, _ = chat_with([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        chat.turn("Tell")


class Keys:
    """A terminal's keyboard: lines, interrupts, then the end."""

    def __init__(self, *keys) -> None:
        self.keys = list(keys)

    def read(self):
        key = self.keys.pop(0) if self.keys else None
        if isinstance(key, BaseException):
            raise key
        return key


def test_interrupt_at_the_prompt_clears_the_line(chat_with):
    chat, script, _, _ = chat_with("a", terminal=True)
    chat.run(Keys(KeyboardInterrupt(), "Hi", KeyboardInterrupt()))
    assert len(script.calls) == 1


def test_an_error_is_shown_in_a_dialogue_and_ends_a_pipe(chat_with):
    broken = [Event(text="a", tokens=(1,)), NumericsError("the logits are NaN")]
    chat, _, out, _ = chat_with(broken, "b", terminal=True)
    chat.run(Keys("one", "two"))
    assert "a\n\x1b[2merror: the logits are NaN\x1b[0m\n" in out.getvalue()
    assert chat.conversation.messages == [user("two"), assistant("b")]
    chat, _, out, _ = chat_with(broken)
    with pytest.raises(NumericsError):
        chat.run(Lines(io.BytesIO(b"one\n")))
    assert out.getvalue() == "a\n"


def test_what_else_an_answer_can_end_with(chat_with):
    call = ToolCall("weather", {"city": "Oslo"})
    chat, _, _, err = chat_with(said("", finish="tool_calls", calls=(call,)), said("abc", finish="length"))
    chat.turn("Weather?")
    chat.turn("Count")
    assert "calls the tool weather with {'city': 'Oslo'}" in err.getvalue()
    assert "cut off" in err.getvalue()
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert chat.conversation.messages[1]["tool_calls"] == [{"type": "function", "function": function}]


def test_commands(chat_with):
    chat, script, out, err = chat_with("a", "b")
    assert chat.turn("/help")
    assert chat.turn("/system Be kind. ")
    assert chat.turn("Hi")
    assert chat.turn("/reset")
    assert chat.turn("/think on")
    assert chat.turn("/system")
    assert chat.turn("Hi")
    assert not chat.turn("/quit")
    assert script.calls[0][0] == [{"role": "system", "content": "Be kind."}, user("Hi")]
    assert script.calls[1] == ([user("Hi")], {"thinking": True, "raw": False})
    assert out.getvalue() == "a\nb\n"
    assert err.getvalue().startswith(HELP)


def test_stats(chat_with):
    chat, _, _, err = chat_with("a", "bc")
    chat.turn("1")
    chat.turn("2")
    chat.turn("/stats")
    assert err.getvalue().splitlines()[-6:] == [
        "model     scripted",
        "thinking  as the template has it",
        "messages  4",
        "answers   2, 3 tokens",
        "prompts   24 tokens, 8 of them not read again",
        "memory    1.50 GB at most",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hepl", "/hepl: no such command; /help lists them (a space first sends it as a message)"),
        ("/think maybe", "/think: expected on or off, got 'maybe'"),
        ("/save", "/save: expected the name of a file"),
        ("/svg x.svg", "/svg: no answer holds a complete <svg>…</svg>"),
        ("/load nowhere.json", "nowhere.json: cannot be read: No such file or directory"),
        ("/save no/where.json", "no/where.json: cannot be written: No such file or directory"),
    ],
)
def test_commands_that_cannot_be_obeyed(chat_with, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    chat, _, _, _ = chat_with()
    with pytest.raises(RequestError) as caught:
        chat.turn(line)
    assert str(caught.value).removeprefix(f"{tmp_path}/") == message


def test_save_and_load(chat_with, tmp_path):
    chat, _, _, err = chat_with(said("Grüße 🦩", "hm"))
    chat.turn("/system Kurz.")
    chat.turn("/think off")
    chat.turn("Hallo")
    chat.turn(f"/save {tmp_path}/chat file.json")
    saved = json.loads((tmp_path / "chat file.json").read_text(encoding="utf-8"))
    assert saved == {
        "format": "moelocal-chat",
        "version": 1,
        "model": "scripted",
        "thinking": False,
        "system": "Kurz.",
        "messages": [user("Hallo"), assistant("Grüße 🦩", "hm")],
    }
    other, _, _, err = chat_with()
    other.model.name = "another"
    other.turn(f"/load {tmp_path}/chat file.json")
    assert other.conversation == chat.conversation
    assert "they were exchanged with scripted" in err.getvalue()
    assert [each.name for each in tmp_path.iterdir()] == ["chat file.json"]


GOOD = {
    "format": "moelocal-chat",
    "version": 1,
    "model": "m",
    "thinking": None,
    "system": None,
    "messages": [],
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "expected JSON in UTF-8: "),
        (b"{", "expected JSON in UTF-8: "),
        (b"[" * 100_000, "expected JSON in UTF-8: "),
        (GOOD | {"system": "\ud800"}, "expected JSON in UTF-8: "),
        ([], 'expected a chat saved with /save ("format": "moelocal-chat")'),
        ({"messages": []}, 'expected a chat saved with /save ("format": "moelocal-chat")'),
        (GOOD | {"version": 2}, "version: expected 1, got 2"),
        (GOOD | {"model": None}, "model: expected a string, got NoneType"),
        (GOOD | {"system": 1}, "system: expected a string or null, got int"),
        (GOOD | {"thinking": "on"}, "thinking: expected true, false or null, got str"),
        (GOOD | {"messages": {}}, "messages: expected a list, got dict"),
        (GOOD | {"messages": ["Hi"]}, "messages[0]: expected an object, got str"),
        (
            GOOD | {"messages": [user("a"), {"role": "bot", "content": ""}]},
            "messages[1].role: expected one of system, user, assistant, tool, got 'bot'",
        ),
        (GOOD | {"messages": [user(None)]}, "messages[0].content: expected a string, got NoneType"),
        (
            GOOD | {"messages": [assistant("a", reasoning=["b"])]},
            "messages[0].reasoning_content: expected a string, got list",
        ),
    ],
)
def test_a_file_that_is_no_chat_changes_nothing(chat_with, tmp_path, content, message):
    path = tmp_path / "chat.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    chat, _, _, _ = chat_with("a")
    chat.turn("Hi")
    before = Conversation(messages=list(chat.conversation.messages))
    with pytest.raises(RequestError) as caught:
        chat.turn(f"/load {path}")
    assert str(caught.value).startswith(f"{path}: {message}")
    assert chat.conversation == before


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "chat.json"
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RequestError, match="cannot be written: No space left on device"):
        files.save(path, Conversation(), "m")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_svg(chat_with, tmp_path):
    first = '<svg xmlns="http://www.w3.org/2000/svg" width="9"><rect/></svg>'
    nested = '<svg\n width="8"><svg><circle/></svg></svg >'
    chat, _, _, _ = chat_with(f"```svg\n{first}\n``` or {nested} or <svg> cut", "no picture, only <svgx>")
    chat.turn("Draw")
    chat.turn("Thanks")
    chat.turn(f"/svg {tmp_path}/a.svg")
    expected = '<svg xmlns="http://www.w3.org/2000/svg"\n width="8"><svg><circle/></svg></svg >\n'
    assert (tmp_path / "a.svg").read_text() == expected
    assert Conversation(messages=[assistant(first)]).last_svg() == first + "\n"


def test_lines_that_are_not_utf8():
    lines = Lines(io.BytesIO("ä\n".encode() + b"ab\xff\n"))
    assert lines.read() == "ä"
    with pytest.raises(RequestError) as caught:
        lines.read()
    assert str(caught.value) == "standard input, line 2: expected UTF-8, got the byte 0xff at position 2"


def test_history_is_private_and_does_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    path = state_folder() / "history"
    assert path == tmp_path / "moelocal" / "history"
    history = open_history(path)
    history.append_string("Hi\nthere")
    assert list(open_history(path).load_history_strings()) == ["Hi\nthere"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.mkdir()
    history.append_string("lost, but no error")
    open_history(path).append_string("kept in memory")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_folder().is_absolute()


def test_the_line_of_figures_says_why_no_more_was_reused():
    done = said("Hi")[-1].completion
    assert done is not None
    miss = Miss(4, "old", "new", "reasoning dropped")
    told = summary(replace(done, usage=replace(done.usage, miss=miss)))
    assert " · 4 of 12 prompt tokens reused (no more: reasoning dropped) · " in told
