"""What a conversion has finished, line by line, so that the next run goes on from there.

First line: the job, one JSON object. Then [piece, checksum] per finished piece. A line is written when its piece is on
the disk; what a killed process left of a line is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moelocal.checkpoint.writing import disk_errors, sync_folder
from moelocal.errors import CheckpointError, RequestError

Job = Mapping[str, Any]
"""Everything that the bytes of the result depend on."""


class Journal:
    """The journal of a work folder. `pieces`: checksum by name of those finished."""

    def __init__(self, path: Path, job: Job) -> None:
        """Continue the journal at `path`, or begin it. Raises `RequestError` if it is of another job, `CheckpointError`
        if it is damaged or the system refuses."""
        self.path = path
        self.pieces: dict[str, int] = {}
        with disk_errors(path):
            text = path.read_bytes() if path.exists() else b""
            *lines, torn = text.split(b"\n")
            if torn:
                os.truncate(path, len(text) - len(torn))
        if not lines:
            self._append(job)
            with disk_errors(path):  # its name, and those of the folders that it is in
                for folder in path.parents[:3]:
                    sync_folder(folder)
            return
        try:
            found, *finished = [json.loads(line) for line in lines]
            self.pieces = {str(name): int(checksum) for name, checksum in finished}
            other = next((key for key in job if found.get(key) != job[key]), None)
        except (ValueError, TypeError, AttributeError):
            raise CheckpointError(f"{path}: damaged; delete its folder and start again") from None
        if other is not None:
            raise RequestError(
                f"{path.parent.parent}: holds an unfinished conversion with another {other}; finish it with the "
                "command that began it, delete the folder, or choose another one with --to"
            )

    def add(self, piece: str, checksum: int) -> None:
        """A piece is finished and on the disk. Raises `CheckpointError` if this cannot be noted."""
        self._append([piece, checksum])
        self.pieces[piece] = checksum

    def _append(self, value: object) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        with disk_errors(self.path), self.path.open("ab") as stream:
            stream.write(line)
            stream.flush()  # all of it, or it raises: a bare write may stop in the middle of a line
            os.fsync(stream.fileno())


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Hold the work folder against other processes. Raises `RequestError` if one holds it."""
    held = False
    while not held:
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
            fd = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestError(f"{work.parent}: another process is converting into this folder") from None
            except OSError:
                pass  # a disk without locks
            with suppress(FileNotFoundError):  # whoever had it may have removed it with its folder
                held = os.path.samestat((work / "lock").stat(), os.fstat(fd))
            if held:
                yield
        finally:
            os.close(fd)
