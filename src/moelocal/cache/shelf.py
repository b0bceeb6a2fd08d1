"""The files of a `Disk` as they are listed: what can be restored, what is needed, what has to go.

FOLDER/FINGERPRINT/ABOVE-POSITION-KEY.snapshot.safetensors   states, tail and all tokens of one snapshot
FOLDER/FINGERPRINT/ABOVE-LINK.segment.safetensors            keys and values of one segment, and its tokens
FOLDER/lock                                                  held by whoever writes or removes

The names are digests of `keys.py`, ABOVE the link of the segment before (FINGERPRINT where there is none), so that
nothing has to be opened to know what it needs. Files with other names are not ours and are left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from moelocal.cache.keys import GRID, Chain

_SNAPSHOT: Final = re.compile(r"([0-9a-f]{32})-(\d{1,18})-([0-9a-f]{32})\.snapshot\.safetensors", re.ASCII)
_SEGMENT: Final = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})\.segment\.safetensors")
_PART: Final = re.compile(r"\..+\.(snapshot|segment)\.safetensors\.\d+\.part")


def snapshot_name(above: str, position: int, key: str) -> str:
    return f"{above}-{position}-{key}.snapshot.safetensors"


def segment_name(above: str, link: str) -> str:
    return f"{above}-{link}.segment.safetensors"


@dataclass(frozen=True, slots=True)
class File:
    """A listed file; `above` as in its name."""

    path: Path
    above: str
    position: int = 0


@dataclass(slots=True)
class Shelf:
    """The files of one fingerprint: snapshots by key, segments by link, and what was left of interrupted writes."""

    snapshots: dict[str, File] = field(default_factory=dict)
    segments: dict[str, File] = field(default_factory=dict)
    parts: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Shelf:
        """Raises OSError if the folder is there but cannot be read."""
        shelf = cls()
        try:
            names = os.listdir(folder)  # noqa: PTH208  # a Path for each name would cost more than the listing
        except FileNotFoundError:
            return shelf
        for name in names:
            if found := _SNAPSHOT.fullmatch(name):
                shelf.snapshots[found[3]] = File(folder / name, found[1], int(found[2]))
            elif found := _SEGMENT.fullmatch(name):
                shelf.segments[found[2]] = File(folder / name, found[1])
            elif _PART.fullmatch(name):
                shelf.parts.append(folder / name)
        return shelf

    def fitting(self, chain: Chain) -> Iterator[File]:
        """The snapshots of prefixes that are here with all their segments, the longest first."""
        for key, file in sorted(self.snapshots.items(), key=lambda each: each[1].position, reverse=True):
            fits = 0 < file.position <= chain.length and key == chain.key(file.position)
            if fits and self.needs(file) is not None:
                yield file

    def needs(self, snapshot: File) -> list[str] | None:
        """The links of the segments that a snapshot needs; None if one is missing."""
        links: list[str] = []
        link = snapshot.above
        while len(links) < snapshot.position // GRID:
            if link not in self.segments:
                return None
            links.append(link)
            link = self.segments[link].above
        return links[::-1]


def shelves_in(folder: Path) -> list[Path]:
    """The folders of all fingerprints. Raises OSError."""
    return [f for f in folder.iterdir() if re.fullmatch("[0-9a-f]{32}", f.name) and f.is_dir()]


class Shelves:
    """All files of a folder, with their sizes. For the holder of its lock."""

    def __init__(self, folder: Path) -> None:
        self.shelves = {each: Shelf.of(each) for each in shelves_in(folder)}
        self.evicted = 0
        self.removed: set[str] = set()  # links of segments
        self._sizes, self._times = dict[Path, int](), dict[Path, int]()
        for shelf in self.shelves.values():
            for part in shelf.parts:  # whoever wrote it held the lock, and is no more
                part.unlink(missing_ok=True)
            for file in (*shelf.snapshots.values(), *shelf.segments.values()):
                with contextlib.suppress(FileNotFoundError):  # readers remove what is damaged
                    stat = file.path.stat()
                    self._sizes[file.path], self._times[file.path] = stat.st_size, stat.st_mtime_ns
        self.nbytes = sum(self._sizes.values())

    def room(self, nbytes: int, budget: int, folder: Path, links: Sequence[str]) -> bool:
        """Remove what is least recently used until `nbytes` more fit, but not the segments `links` of `folder`;
        False if that cannot be."""
        own = self.shelves[folder].segments
        if sum(self._sizes.get(own[link].path, 0) for link in links if link in own) + nbytes > budget:
            return False
        if self.nbytes + nbytes > budget:
            self.shrink(budget - nbytes, folder, links)
        return True

    def shrink(self, budget: int, folder: Path, links: Sequence[str] = ()) -> None:
        """Remove what is used by nothing, then snapshots until no more than `budget` bytes are left."""
        users: Counter[Path] = Counter(
            own[link].path for own in [self.shelves[folder].segments] for link in links if link in own
        )
        snapshots: list[tuple[Path, dict[str, Path]]] = []
        for shelf in self.shelves.values():
            for file in shelf.snapshots.values():
                needs = shelf.needs(file)
                if needs is None:
                    self._remove(file.path)
                else:
                    snapshots.append((file.path, {link: shelf.segments[link].path for link in needs}))
                    users.update(snapshots[-1][1].values())
        for shelf in self.shelves.values():
            for link, file in shelf.segments.items():
                if not users[file.path]:
                    self._remove(file.path)
                    self.removed.add(link)
        for path, segments in sorted(snapshots, key=lambda each: self._times.get(each[0], 0)):
            if self.nbytes <= budget:
                break
            self._remove(path)
            self.evicted += 1
            users.subtract(segments.values())
            for link, segment in segments.items():
                if not users[segment]:
                    self._remove(segment)
                    self.removed.add(link)

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.nbytes -= self._sizes.pop(path, 0)
