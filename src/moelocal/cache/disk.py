"""`Disk`: snapshots that survive the process, as files in a folder of their own.

A file appears whole under its name (see `shelf.py`), a snapshot after its segments; a process that is killed leaves at
most a part file, which the next writer removes. One process writes or removes at a time; readers need no lock, as files
are replaced and never changed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from weakref import finalize

import mlx.core as mx

from moelocal.cache.cache import Chunks
from moelocal.cache.file import Damaged, Packed, Tensor, read, read_metadata, tensors
from moelocal.cache.keys import GRID, Chain
from moelocal.cache.shelf import Shelf, Shelves, segment_name, shelves_in, snapshot_name
from moelocal.cache.snapshot import Segment, Snapshot
from moelocal.cache.writer import Writer

VERSION: Final = "1"
"""Of what is in the files."""

WAITING: Final = 1 << 30
"""Bytes of arrays that may wait to be written."""

PATIENCE: Final = 30.0
"""Seconds to wait for another process that writes; at the end of this one, for all that is left to write together."""

Accept = Callable[[Chunks], bool]
"""Whether a snapshot that was evaluated in these chunks may be used."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A snapshot on its way to the disk. `segments` has those that were not known there."""

    key: str
    position: int
    links: Sequence[str]
    metadata: Mapping[str, str]
    content: Mapping[str, Tensor]
    segments: Mapping[str, Mapping[str, Tensor]]

    @property
    def nbytes(self) -> int:
        groups = (self.content, *self.segments.values())
        return sum(tensor.nbytes for group in groups for tensor in group.values())


def _tensors(tokens: bytes, **groups: Sequence[mx.array]) -> dict[str, Tensor]:
    """The content of a file: tokens, and the arrays of each group as "GROUP.INDEX"."""
    arrays = {f"{name}.{index}": a for name, group in groups.items() for index, a in enumerate(group)}
    return {"tokens": Tensor.of_bytes(tokens), **tensors(arrays)}


def _arrays(content: Mapping[str, Tensor], group: str) -> tuple[mx.array, ...]:
    """The arrays of a group, in their order."""
    count = sum(name.startswith(f"{group}.") for name in content)
    return tuple(content[f"{group}.{index}"].array() for index in range(count))


def _parsed(chunks: str) -> tuple[tuple[int, int], ...]:
    return tuple((number, size) for number, size in json.loads(chunks))


def _chunks(path: Path) -> tuple[tuple[int, int], ...] | None:
    """In which chunks a stored snapshot was evaluated; None if its header cannot be read."""
    try:
        return _parsed(read_metadata(path)["chunks"])
    except (OSError, Damaged, KeyError):
        return None


class Disk:
    """Snapshots of one fingerprint in `folder`, which holds at most `budget` bytes of all fingerprints together; the
    least recently used goes first. `put` only queues: `flush` and `close` wait, and so does the end of the process.

    Whatever goes wrong costs a snapshot, never an answer: nothing here raises. `counts` has "written", "read",
    "evicted"; `refused` has why something was not written or not used: "damaged", "foreign" (of another fingerprint or
    version), "wrong tokens", "unreadable", "gone" (evicted by another process), "too large", "busy" (too much waits
    to be written), "full" (the disk is), "failed". What is new among those is logged, each file and cause once.
    """

    def __init__(self, folder: Path, fingerprint: str, budget: int, waiting: int = WAITING) -> None:
        self.folder, self.fingerprint, self.budget = folder, fingerprint, budget
        self.counts: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._shelf = folder / Chain(fingerprint, ()).root
        self._seen: set[str] = set()
        self._unusable: set[Path] = set()
        self._reported: set[str] = set()
        self._counting = threading.Lock()
        self._writer = Writer(waiting)
        finalize(self, self._writer.close)  # also runs when the process ends

    # reading

    def find(self, chain: Chain, accept: Accept) -> int:
        """The position of the longest stored prefix whose chunks `accept` finds good, 0 for none."""
        for file in self._listed().fitting(chain):
            chunks = _chunks(file.path)
            if chunks is None or accept(chunks):  # damaged ones are refused when they are read
                return file.position
        return 0

    def _listed(self) -> Shelf:
        """The files that there are, without those that were found bad but could not be removed."""
        try:
            shelf = Shelf.of(self._shelf)
        except OSError as error:
            self._refuse("unreadable", self._shelf, error.strerror or str(error))
            return Shelf()
        for files in (shelf.snapshots, shelf.segments):
            for name in [name for name, file in files.items() if file.path in self._unusable]:
                del files[name]
        return shelf

    def elsewhere(self, tokens: Sequence[int]) -> int:
        """The longest prefix of `tokens` that is stored under another fingerprint, 0 for none."""
        longest = 0
        with contextlib.suppress(OSError):
            for folder in shelves_in(self.folder):
                if folder == self._shelf:
                    continue
                chain = Chain("", tokens, root=folder.name)
                longest = max([longest, *(file.position for file in Shelf.of(folder).fitting(chain))])
        return longest

    def has(self, chain: Chain, position: int) -> bool:
        """Whether there is a snapshot at exactly `position`; whether it is whole shows when it is read."""
        return chain.key(position) in self._listed().snapshots

    def get(
        self, chain: Chain, position: int, have: Mapping[str, Segment]
    ) -> tuple[Snapshot, list[Segment]] | None:
        """The snapshot at `position` with its segments, those in `have` from there; None if it has gone, or was
        refused."""
        key, shelf = chain.key(position), self._listed()
        file = shelf.snapshots.get(key)
        links = shelf.needs(file) if file else None
        if file is None or links is None:
            self._gone()
            return None
        content = self._read(file.path, key, chain.tokens(0, position))
        if content is None:
            return None
        segments = []
        for cell, link in enumerate(links):
            if link in have:
                segments.append(have[link])
                continue
            tokens = chain.tokens(cell * GRID, (cell + 1) * GRID)
            part = self._read(shelf.segments[link].path, link, tokens)
            if part is None:
                return None
            segments.append(Segment(_arrays(part[1], "part")))
        metadata, arrays = content
        chunks = _parsed(metadata["chunks"])
        if chain.links(chunks) != tuple(links):
            self._remove_bad("wrong tokens", file.path, "its segments are not those of its chunks")
            return None
        states, tail = _arrays(arrays, "state"), _arrays(arrays, "tail")
        snapshot = Snapshot(key, position, tuple(links), chunks, metadata["layers"], states, tail)
        mx.eval(snapshot.arrays, [segment.arrays for segment in segments])
        with contextlib.suppress(OSError):
            os.utime(file.path)
        self._count("read")
        return snapshot, segments

    def _read(self, path: Path, key: str, tokens: bytes) -> tuple[dict[str, str], dict[str, Tensor]] | None:
        """Metadata and tensors of a file, if it is whole, of this fingerprint, and of these tokens."""
        try:
            metadata, content = read(path)
        except FileNotFoundError:
            self._gone()
            return None
        except OSError as error:
            self._refuse("unreadable", path, error.strerror or str(error))
            self._unusable.add(path)
            return None
        except Damaged as error:
            self._remove_bad("damaged", path, str(error))
            return None
        if metadata.get("version") != VERSION or metadata.get("fingerprint") != self.fingerprint:
            self._remove_bad("foreign", path, "of another model, setting or version")
            return None
        if metadata.get("key") != key or bytes(content["tokens"].data) != tokens:
            self._remove_bad("wrong tokens", path, "not what its name says")
            return None
        return metadata, content

    def _gone(self) -> None:
        self._refuse("gone", self.folder, None)
        self._seen.clear()

    def _remove_bad(self, cause: str, path: Path, detail: str) -> None:
        self._refuse(cause, path, detail)
        self._unusable.add(path)
        self._seen.clear()
        with contextlib.suppress(OSError):
            path.unlink()
            self._unusable.discard(path)

    # writing

    @property
    def known(self) -> Container[str]:
        """Links of segments that are on disk, or on their way: `put` needs the others."""
        return self._seen

    def put(self, chain: Chain, snapshot: Snapshot, segments: Mapping[str, Segment]) -> bool:
        """Queue a snapshot with its segments, by link; False if it is there already, or was refused."""
        path = self._path(snapshot.links, snapshot.position, snapshot.key)
        if self._seen.issuperset(snapshot.links) and _chunks(path) == snapshot.chunks:
            with contextlib.suppress(OSError):
                os.utime(path)
                return False
        position, states, tail = snapshot.position, snapshot.states, snapshot.tail
        content = _tensors(chain.tokens(0, position), state=states, tail=tail)
        parts = {
            link: _tensors(chain.tokens(cell * GRID, (cell + 1) * GRID), part=segments[link].arrays)
            for cell, link in enumerate(snapshot.links)
            if link not in self._seen and link in segments
        }
        about = {"layers": snapshot.layers, "chunks": json.dumps(snapshot.chunks)}
        job = _Job(snapshot.key, position, snapshot.links, about, content, parts)
        if self._writer.add(job.nbytes, lambda: self._write(job)):
            self._seen.update(snapshot.links)  # jobs are done in order: later ones need not carry them
            return True
        self._refuse("busy", self.folder, "writing is slower than what there is to write")
        return False

    def flush(self) -> None:
        """Wait until all that was put is on disk, or refused."""
        self._writer.flush()

    def close(self) -> None:
        """`flush`, and take no more."""
        self._writer.close()

    def drop(self, chain: Chain, position: int) -> None:
        """Remove a snapshot, and segments that nothing else needs."""
        self.flush()
        try:
            with self._locked():
                self._shelf.mkdir(mode=0o700, exist_ok=True)
                if file := self._listed().snapshots.get(chain.key(position)):
                    file.path.unlink(missing_ok=True)
                Shelves(self.folder).shrink(self.budget, self._shelf)
                self._seen.clear()
        except OSError as error:
            self._refuse("failed", self.folder, error.strerror or str(error))

    def _write(self, job: _Job) -> None:
        try:
            with self._locked():
                if self._store(job):
                    return
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            self._refuse("full" if full else "failed", self.folder, error.strerror or str(error))
        except Exception as error:  # the thread has to go on, whatever this was
            self._refuse("failed", self.folder, repr(error))
        self._seen.clear()  # the next one brings its segments

    def _store(self, job: _Job) -> bool:
        """Write what of a job is not there; False if it was refused. With the lock held."""
        self._shelf.mkdir(mode=0o700, parents=True, exist_ok=True)
        shelf = Shelf.of(self._shelf)
        missing = [link for link in job.links if link not in shelf.segments]
        target, old = self._path(job.links, job.position, job.key), shelf.snapshots.get(job.key)
        if old and not missing and old.path == target and _chunks(target) == _parsed(job.metadata["chunks"]):
            return True
        if not all(link in job.segments for link in missing):
            self._gone()
            return False
        marks = {"version": VERSION, "fingerprint": self.fingerprint}
        files = {}
        for above, link in zip([self._shelf.name, *job.links], job.links, strict=False):
            if link in missing:
                path = self._shelf / segment_name(above, link)
                files[path] = Packed.of(job.segments[link], {**marks, "key": link})
        about = {**marks, **job.metadata, "key": job.key}
        files[target] = Packed.of(job.content, about)
        shelves = Shelves(self.folder)
        fits = shelves.room(sum(file.nbytes for file in files.values()), self.budget, self._shelf, job.links)
        self._seen -= shelves.removed
        if shelves.evicted:
            self._count("evicted", shelves.evicted)
        if not fits:
            self._refuse("too large", self.folder, None)
            return False
        for path, file in files.items():
            file.write(path)
        if old and old.path != target:  # evaluated in other chunks
            old.path.unlink(missing_ok=True)
        descriptor = os.open(self._shelf, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._count("written")
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, over all processes; the end of a process ends its lock. Raises OSError, also if another
        keeps it too long."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > min(deadline, self._writer.closed_at + PATIENCE):
                        raise
                    time.sleep(0.005)
            yield
        finally:
            os.close(descriptor)

    def _path(self, links: Sequence[str], position: int, key: str) -> Path:
        above = links[-1] if links else self._shelf.name
        return self._shelf / snapshot_name(above, position, key)

    def _count(self, what: str, count: int = 1) -> None:
        with self._counting:
            self.counts[what] += count

    def _refuse(self, cause: str, path: Path, detail: str | None) -> None:
        """Count, and log once per file and cause; without `detail` it is no fault."""
        with self._counting:
            self.refused[cause] += 1
            known = f"{cause} {path}" in self._reported
            self._reported.add(f"{cause} {path}")
        if detail is not None and not known:
            import logging  # here: every import of moelocal would pay for it

            logging.getLogger("moelocal").warning("snapshots: %s: %s: %s", path, cause, detail)
