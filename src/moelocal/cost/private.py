"""Files for their owner alone, which hold prompts: whole or not there, and never in place of somebody else's file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from moelocal.errors import RequestError
from moelocal.whole import whole

_HEAD: Final = 1024
"""Bytes of a file of ours that hold its mark."""


def require_own(file: Path, mark: bytes, what: str) -> None:
    """Raises `RequestError` for a file that is there and has no `mark` near its beginning: it would be lost. An empty
    one may go. `what`: what it should have been and what to do, in words."""
    try:
        if not file.exists():
            return
        if file.is_file():
            with file.open("rb") as stream:
                head = stream.read(_HEAD)
            if not head or mark in head:
                return
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
    raise RequestError(f"{file}: is there already, and is no {what}, or move it away")


@contextmanager
def writing(file: Path) -> Iterator[Callable[[str], None]]:
    """What is called with texts to write them. The file is there when all are written, or is what it was. Raises
    `RequestError`, also when called."""
    with _errors_of(file), whole(file, private=True) as stream:

        def write(text: str) -> None:
            with _errors_of(file):
                stream.write(text.encode())

        yield write


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{file}: cannot be written: {error.strerror}") from None
