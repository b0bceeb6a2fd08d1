"""The chat itself: reads turns, streams answers, obeys commands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moelocal
from moelocal.chat import conversation as files
from moelocal.chat.conversation import Conversation, Message
from moelocal.chat.keyboard import Keyboard
from moelocal.chat.screen import Screen
from moelocal.cost import record
from moelocal.errors import MoelocalError, RequestError
from moelocal.units import size
from moelocal.whole import write_whole

if TYPE_CHECKING:
    from moelocal.engine.completion import Completion
    from moelocal.engine.load import Model
    from moelocal.engine.session import Session

HELP = """\
/help              this list
/reset             forget the conversation; the system message stays
/think on|off      whether the model thinks before it answers
/system TEXT       set the system message; without TEXT, remove it
/save FILE         write the conversation to a file
/load FILE         go on with a conversation from a file
/svg FILE          write the last SVG of an answer to a file
/stats             tokens, rates and memory so far
/quit              leave (Ctrl-D does, too)

Enter sends, Alt-Enter starts a new line, Ctrl-C stops an answer."""


@dataclass(slots=True)
class Totals:
    """What the answers of this chat took."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    peak_memory_nbytes: int = 0

    def add(self, done: Completion) -> None:
        self.answers += 1
        self.prompt_tokens += done.usage.prompt
        self.cached_tokens += done.usage.cached
        self.answer_tokens += done.usage.completion
        self.peak_memory_nbytes = max(self.peak_memory_nbytes, done.timing.peak_memory_nbytes)


@dataclass(slots=True)
class Chat:
    """One conversation with one model.

    `options` are passed on to `moelocal.stream`. `raw`: each turn is a plain text to be continued; no turn
    knows of another. `dialogue`: a person reads along, so errors are shown and Ctrl-C ends the answer alone;
    without one both end the program. `log`: a file to which every whole answer is added with its prompt.
    """

    model: Model
    screen: Screen
    options: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    dialogue: bool = True
    conversation: Conversation = field(default_factory=Conversation)
    log: Path | None = None
    totals: Totals = field(default_factory=Totals)
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self.session = self.model.session()

    def run(self, keyboard: Keyboard) -> None:
        """Takes turns until the keyboard ends. Raises what `turn` raises where nobody is there to read on."""
        while True:
            try:
                line = keyboard.read()
            except KeyboardInterrupt:
                if not self.dialogue:
                    raise
                continue  # Ctrl-C at the prompt clears the line
            if line is None:
                return
            try:
                if not self.turn(line):
                    return
            except MoelocalError as error:
                if not self.dialogue:
                    raise
                self.screen.note(f"error: {error}")

    def turn(self, line: str) -> bool:
        """Obeys a command or answers a message. False: the chat is over.

        Raises MoelocalError; the conversation is then what it was before.
        """
        if not line.strip():
            return True
        if line.startswith("/"):
            return self._command(line)
        self.answer(line)
        return True

    def answer(self, text: str) -> None:
        """Streams the answer to a message; both join the conversation. Raises MoelocalError: neither does."""
        messages = self.conversation.messages
        messages.append({"role": "user", "content": text})
        prompt = text if self.raw else self.conversation.prompt()
        answer, reasoning, tokens, done = "", "", 0, None
        begin = time.perf_counter()
        self.screen.status("reading the prompt …")
        try:
            stream = moelocal.stream(
                self.session, prompt, thinking=self.conversation.thinking, raw=self.raw, **self.options
            )
            # Closing the stream is what stops the generation.
            with contextlib.closing(stream):
                for event in stream:
                    reasoning += event.reasoning
                    answer += event.text
                    tokens += len(event.tokens)
                    done = event.completion
                    self.screen.reasoning(event.reasoning)
                    self.screen.answer(event.text)
        except KeyboardInterrupt:
            self.screen.end_answer()
            if not self.dialogue:
                raise
        except BaseException:
            self.screen.end_answer()
            del messages[-1]
            raise
        self.screen.end_answer()
        if done is None and not (answer or reasoning):
            del messages[-1]
            self.screen.note("(stopped before the first word; your message was taken back)")
            return
        messages.append(_assistant(answer, reasoning, done))
        if done is None:
            self.screen.note(
                f"(stopped after {tokens} tokens, {time.perf_counter() - begin:.1f} s; "
                "the part above stays in the conversation)"
            )
            return
        for call in done.tool_calls:
            self.screen.note(f"(calls the tool {call.name} with {call.arguments}; this chat runs no tools)")
        if done.finish_reason == "length":
            self.screen.note("(cut off: no tokens left; --max-tokens allows more, up to the model's context)")
        self.totals.add(done)
        self.screen.note(summary(done))
        if self.log is not None:
            try:
                record.append(self.log, self.model.name, prompt, done)
            except RequestError as error:  # the answer is there, and the conversation goes on
                self.screen.note(f"warning: {error}; this answer is not in it")

    def _command(self, line: str) -> bool:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/quit", "/exit"):
            return False
        commands: dict[str, Callable[[str], str]] = {
            "/help": lambda _: HELP,
            "/reset": self._reset,
            "/think": self._think,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/svg": self._svg,
            "/stats": self._stats,
        }
        if name not in commands:
            raise RequestError(
                f"{name}: no such command; /help lists them (a space first sends it as a message)"
            )
        self.screen.note(commands[name](argument))
        return True

    def _reset(self, _: str) -> str:
        self.conversation.messages.clear()
        return "The conversation starts anew."

    def _think(self, argument: str) -> str:
        if argument not in ("on", "off"):
            raise RequestError(f"/think: expected on or off, got {argument!r}")
        self.conversation.thinking = argument == "on"
        return f"Thinking is {argument}."

    def _system(self, argument: str) -> str:
        self.conversation.system = argument or None
        return "The system message is set." if argument else "There is no system message now."

    def _save(self, argument: str) -> str:
        path = _path("/save", argument)
        files.save(path, self.conversation, self.model.name)
        return f"{len(self.conversation.messages)} messages written to {path}."

    def _load(self, argument: str) -> str:
        path = _path("/load", argument)
        self.conversation, held_with = files.load(path)
        other = f"; they were exchanged with {held_with}" if held_with != self.model.name else ""
        return f"{len(self.conversation.messages)} messages read from {path}{other}."

    def _svg(self, argument: str) -> str:
        path = _path("/svg", argument)
        svg = self.conversation.last_svg()
        if svg is None:
            raise RequestError("/svg: no answer holds a complete <svg>…</svg>")
        write_whole(path, svg.encode())
        return f"SVG written to {path}."

    def _stats(self, _: str) -> str:
        totals, thinking = self.totals, self.conversation.thinking
        return (
            f"model     {self.model.name}\n"
            f"thinking  {'as the template has it' if thinking is None else 'on' if thinking else 'off'}\n"
            f"messages  {len(self.conversation.messages)}\n"
            f"answers   {totals.answers}, {totals.answer_tokens} tokens\n"
            f"prompts   {totals.prompt_tokens} tokens, {totals.cached_tokens} of them not read again\n"
            f"memory    {size(totals.peak_memory_nbytes)} at most"
        )


def summary(done: Completion) -> str:
    """One line of figures about an answer."""
    timing, usage = done.timing, done.usage
    reused = f" · {usage.cached} of {usage.prompt} prompt tokens reused" if usage.cached else ""
    if usage.miss is not None:
        reused += f" (no more: {usage.miss.cause})"
    return (
        f"[{done.usage.completion} tokens · {timing.decode_tokens_per_second:.1f} tokens/s · "
        f"first token after {timing.first_token_seconds:.2f} s{reused} · {size(timing.peak_memory_nbytes)}]"
    )


def _assistant(answer: str, reasoning: str, done: Completion | None) -> Message:
    message: Message = {"role": "assistant", "content": answer}
    if reasoning:
        message["reasoning_content"] = reasoning
    if done is not None and done.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in done.tool_calls
        ]
    return message


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise RequestError(f"{command}: expected the name of a file")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:
        raise RequestError(f"{command}: {argument}: {error}") from error
