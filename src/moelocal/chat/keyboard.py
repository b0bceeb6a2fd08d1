"""Where the turns come from: a person at a terminal, or the lines of a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from moelocal.errors import RequestError

if TYPE_CHECKING:
    from prompt_toolkit.history import History


class Keyboard(Protocol):
    """`read` gives the next turn, or None at the end. At a terminal it raises KeyboardInterrupt at Ctrl-C."""

    def read(self) -> str | None: ...


class Lines:
    """One turn per line of a byte stream in UTF-8. `prompt`, if given, is called before each line."""

    def __init__(self, stream: IO[bytes], prompt: Callable[[], None] | None = None) -> None:
        self._stream = stream
        self._prompt = prompt
        self._number = 0

    def read(self) -> str | None:
        """Raises RequestError where a line is not UTF-8."""
        if self._prompt:
            self._prompt()
        line = self._stream.readline()
        if not line:
            return None
        self._number += 1
        return decode(line, f"standard input, line {self._number}").rstrip("\r\n")


class Terminal:
    """Line editing and history by prompt_toolkit. Enter sends; Alt-Enter or a paste put several lines in."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        bindings = KeyBindings()

        @bindings.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            history=open_history(state_folder() / "history"),
            key_bindings=bindings,
            prompt_continuation="  ",
        )

    def read(self) -> str | None:
        try:
            text = self._session.prompt("> ")
        except EOFError:
            return None
        # A terminal may send bytes that are not UTF-8; they arrive as halves of surrogate pairs.
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def decode(data: bytes, where: str) -> str:
    """Text of UTF-8. Raises RequestError, naming `where`, for anything else."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise RequestError(
            f"{where}: expected UTF-8, got the byte 0x{data[at]:02x} at position {at}"
        ) from error


def state_folder() -> Path:
    """Where programs keep their history on this system, with our name."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "moelocal"
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG rules: a relative path is to be ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "moelocal"


def open_history(path: Path) -> History:
    """The history in a file that only its owner can read; one in memory where there can be no such file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class Tolerant(FileHistory):
        def store_string(self, string: str) -> None:
            # A full disk must not end a chat.
            try:
                super().store_string(string)
            except OSError:
                return

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return Tolerant(str(path))
