"""Checkpoints written piece by piece: names, shapes and places of all tensors are known before the first byte is.

The files are sparse and as large as they will be, with their headers, from the start; a piece goes to its place in any
order. They become visible under their names, and the index after them, only when everything is in them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np

from moelocal.checkpoint.files import Entry, read_header
from moelocal.errors import CheckpointError

MOST: Final = 4_000_000_000
"""Bytes of tensors in one file, unless one tensor is larger."""

_STORED: Final = {
    mx.float32: ("F32", mx.uint32),
    mx.float16: ("F16", mx.uint16),
    mx.bfloat16: ("BF16", mx.uint16),
    mx.uint32: ("U32", mx.uint32),
    mx.uint8: ("U8", mx.uint8),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


@dataclass(frozen=True, slots=True)
class File:
    """One safetensors file: its name, header with length field, size, and where each tensor starts."""

    name: str
    header: bytes
    size: int
    offsets: Mapping[str, int]


def files_of(tensors: Sequence[Tensor], most: int = MOST) -> list[File]:
    """Distribute tensors, in their order, over files of at most `most` bytes of data (or one tensor).

    Within a file those of wider dtypes come first, so that every tensor is aligned to its items.
    """
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > most:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [
        _file(name, shard)
        for name, shard in zip(names if count > 1 else ["model.safetensors"], shards, strict=True)
    ]


def _file(name: str, tensors: Iterable[Tensor]) -> File:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    starts: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda t: -t.dtype.size):
        starts[tensor.name] = end
        end += tensor.nbytes
        header[tensor.name] = {
            "dtype": _STORED[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [starts[tensor.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = {tensor: begin + start for tensor, start in starts.items()}
    return File(name, struct.pack("<Q", len(text)) + text, begin + end, places)


class Output:
    """The files of a checkpoint, unfinished in `work`, finished in `folder` (on the same disk).

    Every method raises `CheckpointError` where the system refuses, for want of space among others.
    """

    def __init__(self, folder: Path, work: Path, tensors: Sequence[Tensor], most: int = MOST) -> None:
        self.folder, self.work = folder, work
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.files = files_of(tensors, most)
        self._file_of = {name: file for file in self.files for name in file.offsets}
        self._open: dict[str, int] = {}
        self._unsynced: set[int] = set()

    @property
    def digest(self) -> str:
        """Of names, shapes, dtypes and places of all tensors."""
        return hashlib.sha256(b"".join(file.header for file in self.files)).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all files, finished."""
        return sum(file.size for file in self.files)

    @property
    def missing(self) -> int:
        """Bytes that the disk has not given to the files yet."""
        return sum(max(0, file.size - self._allocated(file)) for file in self.files)

    def _allocated(self, file: File) -> int:
        path = self._path(file)
        return path.stat().st_blocks * 512 if path.exists() else 0

    def _path(self, file: File) -> Path:
        """Where the file is now."""
        finished = self.folder / file.name
        return finished if finished.exists() else self.work / file.name

    def prepare(self) -> None:
        """Create the files that are not there; those of an interrupted run stay as they are."""
        with disk_errors(self.work):
            for file in self.files:
                path = self._path(file)
                self._open[file.name] = fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                if os.pread(fd, len(file.header), 0) != file.header or os.fstat(fd).st_size != file.size:
                    _write(fd, file.header, 0)
                    os.truncate(fd, file.size)
                    self._unsynced.add(fd)
            sync_folder(self.work)

    def write(self, name: str, first: int, array: mx.array, checksum: int = 0) -> int:
        """Put `array` at index `first` of axis 0 of a tensor. The CRC-32 of its bytes, continued from `checksum`."""
        tensor, file = self.tensors[name], self._file_of[name]
        assert array.dtype == tensor.dtype and array.shape[1:] == tensor.shape[1:], (name, array.shape)
        data = np.array(array.view(_STORED[tensor.dtype][1])).data.cast("B")
        with disk_errors(self.work / file.name):
            fd = self._open[file.name]
            _write(fd, data, file.offsets[name] + first * (tensor.nbytes // tensor.shape[0]))
            self._unsynced.add(fd)
        return zlib.crc32(data, checksum)

    def checksum(self, name: str, first: int, last: int, checksum: int = 0) -> int:
        """The CRC-32 of what is there, as `write` gave it."""
        tensor, file = self.tensors[name], self._file_of[name]
        row = tensor.nbytes // tensor.shape[0]
        with disk_errors(self._path(file)):
            data = os.pread(self._open[file.name], (last - first) * row, file.offsets[name] + first * row)
        return zlib.crc32(data, checksum)

    def sync(self) -> None:
        """Return when all that was written is on the disk."""
        with disk_errors(self.work):
            for fd in sorted(self._unsynced):
                os.fsync(fd)
        self._unsynced.clear()

    def entries(self) -> dict[str, Entry]:
        """The tensors as if they were finished, by name: for reading back what is."""
        return {entry.name: entry for file in self.files for entry in read_header(self._path(file))}

    def close(self) -> None:
        """Close the files."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def publish(self) -> None:
        """Give the finished files their place and write the index."""
        self.sync()
        self.close()
        with disk_errors(self.folder):
            for file in self.files:
                if not (self.folder / file.name).exists():
                    (self.work / file.name).rename(self.folder / file.name)
            sync_folder(self.folder)
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in self.tensors.values())},
            "weight_map": {name: self._file_of[name].name for name in sorted(self.tensors)},
        }
        write_json(self.folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is the old one or the whole new one. Raises `CheckpointError`."""
    temporary = path.with_name(f".{path.name}.part")
    with disk_errors(path):
        with temporary.open("w", encoding="utf-8") as stream:
            # all ASCII: a name of a folder may hold bytes that are no characters, a config halves of them
            json.dump(value, stream, indent=4)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(fd, rest[: 1 << 30], offset)
        rest, offset = rest[count:], offset + count


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the system refuses to write into our error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{path}: no space left on the disk. What was written is kept: free some space and run the same "
                "command again"
            ) from None
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None
