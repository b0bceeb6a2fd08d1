"""Files that are whole: what was there before, or all that was written, whenever the program or the machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moelocal.errors import RequestError


@contextmanager
def whole(file: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A stream whose bytes are in `file` when the block has ended; if it raises, `file` is as it was. Of a link what it
    names is replaced. `private`: for the user alone. Raises OSError."""
    file = file.resolve()
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(descriptor)
        part.replace(file)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file that a user named. Raises `RequestError` if that fails."""
    try:
        with whole(file, private=private) as stream:
            stream.write(content)
    except OSError as error:
        raise RequestError(f"{file}: cannot be written: {error.strerror}") from None
