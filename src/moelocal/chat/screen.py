"""Where the answers go: a terminal with dimmed notes, or a pipe that carries nothing but answers."""

from __future__ import annotations

import io
import os
from typing import TextIO

_DIM, _NORMAL, _CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"

# A model must not steer the terminal: what is not a line feed or a tab is shown as its picture.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


class Screen:
    """Answers go to `out`, byte for byte where it is no terminal; thinking is shown on a terminal only.

    Notes and errors go to `out` in a dialogue at a terminal, to `err` otherwise.
    """

    def __init__(self, out: TextIO, err: TextIO, *, dialogue: bool) -> None:
        self._out = out
        self._notes = out if dialogue else err
        self._is_terminal = out.isatty()
        self._in_reasoning = False
        self._at_line_start = True
        self._status_shown = False
        for stream in (out, err):
            # A locale that cannot show a character must not end the program.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

    def answer(self, text: str) -> None:
        """The next part of an answer."""
        if text:
            if self._in_reasoning:
                self._write("\n" if self._at_line_start else "\n\n")
            self._in_reasoning = False
            self._write(text)

    def reasoning(self, text: str) -> None:
        """The next part of the thinking."""
        if text and self._is_terminal:
            self._in_reasoning = True
            self._write(text, dim=True)

    def end_answer(self) -> None:
        """Ends the line that the answer stopped in."""
        self._clear_status()
        if not self._at_line_start:
            self._write("\n")
        self._in_reasoning = False

    def note(self, text: str) -> None:
        """A line about the program, dimmed on a terminal."""
        self._clear_status()
        print(_dimmed(text) if _has_colour(self._notes) else text, file=self._notes, flush=True)

    def status(self, text: str) -> None:
        """A line that the next output replaces; only on a terminal that can erase it."""
        if self._is_terminal and os.environ.get("TERM") != "dumb":
            self._clear_status()
            self._out.write(_dimmed(text) if _has_colour(self._out) else text)
            self._out.flush()
            self._status_shown = True

    def _write(self, text: str, dim: bool = False) -> None:
        self._clear_status()
        self._at_line_start = text.endswith("\n")
        if self._is_terminal:
            text = text.translate(_PICTURES)
        self._out.write(_dimmed(text) if dim and _has_colour(self._out) else text)
        self._out.flush()

    def _clear_status(self) -> None:
        if self._status_shown:
            self._out.write(_CLEAR_LINE)
            self._status_shown = False


def _dimmed(text: str) -> str:
    return f"{_DIM}{text}{_NORMAL}"


def _has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
