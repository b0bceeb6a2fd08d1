"""Our own log: a line for every answer, written on request only, and read again by `moelocal cost`."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from moelocal.engine.completion import Completion
from moelocal.errors import RequestError

VERSION: Final = 1


def append(
    file: Path,
    model: str,
    messages: str | Sequence[Mapping[str, Any]],
    completion: Completion,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Add a line: the time, the model, what was asked, and what `moelocal generate --json` prints. A new file is
    readable by its owner alone. Raises `RequestError` if it cannot be written."""
    asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    line = {
        "log": "moelocal",
        "version": VERSION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "messages": asked,
        **({"tools": list(tools)} if tools else {}),
        "completion": dataclasses.asdict(completion),
    }
    data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    with _open(file) as log:
        # in one write at the end of the file, so that lines of several programs do not mix
        written = os.write(log, data)
        if written < len(data):  # the disk is full; half a line would spoil the next one as well
            os.ftruncate(log, os.fstat(log).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def require_writable(file: Path) -> None:
    """Before an answer is generated: can it be added? Begins the file. Raises `RequestError`."""
    with _open(file):
        pass


@contextmanager
def _open(file: Path) -> Iterator[int]:
    """Its descriptor. Raises `RequestError`, also for an `OSError` inside."""
    try:
        log = os.open(file.expanduser(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            yield log
        finally:
            os.close(log)
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"{file}: the log cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None
