"""One safetensors file that can tell whether it is whole: a CRC-32 of each tensor, and one of the header.

Written and read here and not by a library because both happen without MLX, whose streams belong to a thread, because
what was checked has to be what is used, and because errors of the disk have to come back as errors. Every safetensors
library reads the files.
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np

from moelocal.whole import whole

DTYPES: Final = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I32": mx.int32, "U32": mx.uint32,
                 "U16": mx.uint16, "U8": mx.uint8}  # fmt: skip
_MOST_HEADER: Final = 100_000_000
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


class Damaged(Exception):
    """A file is not as it was written. Caught by whoever reads it."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Bytes of an array, row after row, with its safetensors dtype name and shape. Usable on every thread."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of_bytes(cls, data: bytes) -> Tensor:
        """Of int32 numbers, the lowest byte first."""
        return cls("I32", (len(data) // 4,), memoryview(data))

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def array(self) -> mx.array:
        raw = mx.array(np.frombuffer(self.data, np.uint8))
        return raw.view(DTYPES[self.dtype]).reshape(self.shape)


def tensors(arrays: Mapping[str, mx.array]) -> dict[str, Tensor]:
    """Views of arrays whose rows follow each other; for the thread that evaluates them."""
    raw = {name: array.view(mx.uint8) for name, array in arrays.items()}
    mx.eval(raw)
    return {
        name: Tensor(_NAMES[array.dtype], tuple(array.shape), memoryview(raw[name]))  # type: ignore[arg-type]
        for name, array in arrays.items()
    }


@dataclass(frozen=True, slots=True)
class Packed:
    """A whole file, ready to be written."""

    head: bytes
    data: tuple[memoryview, ...]

    @classmethod
    def of(cls, content: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Packed:
        header: dict[str, Any] = {"__metadata__": {**metadata, "format": "moelocal"}}
        offset = 0
        for name, tensor in content.items():
            header[name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            header["__metadata__"][f"crc32:{name}"] = str(zlib.crc32(tensor.data))
            offset += tensor.nbytes
        header["__metadata__"]["crc32"] = str(_checksum(header))
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return cls(struct.pack("<Q", len(text)) + text, tuple(tensor.data for tensor in content.values()))

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(data.nbytes for data in self.data)

    def write(self, path: Path) -> None:
        """Atomically, for the user alone. The folder is not synchronized. Raises OSError."""
        with whole(path, private=True) as stream:
            for data in (memoryview(self.head), *self.data):
                stream.write(data.cast("B") if data.ndim == 1 else data.cast("B", (data.nbytes,)))


def _checksum(header: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file, every byte of it checked. Raises `Damaged` and OSError."""
    raw = memoryview(path.read_bytes())
    with _damage():
        (length,) = struct.unpack("<Q", raw[:8])
        metadata, entries = _header(bytes(raw[8 : 8 + length]))
        data, end, found = raw[8 + length :], 0, dict[str, Tensor]()
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            part = data[start:end]
            if str(zlib.crc32(part)) != metadata.pop(f"crc32:{name}"):
                raise Damaged(f"{name} is not as it was written")
            found[name] = Tensor(entry["dtype"], tuple(entry["shape"]), part)
        if len(data) != end:
            raise Damaged(f"{len(data)} bytes of data, expected {end}")
    return metadata, found


def read_metadata(path: Path) -> dict[str, str]:
    """What the header says besides the tensors; of those nothing is checked. Raises `Damaged` and OSError."""
    with path.open("rb") as stream, _damage():
        (length,) = struct.unpack("<Q", stream.read(8))
        return _header(stream.read(min(length, _MOST_HEADER)))[0]


def _header(text: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata and entries of a header that is as it was written."""
    entries = json.loads(text)
    expected = entries["__metadata__"].pop("crc32")
    if expected != str(_checksum(entries)):
        raise Damaged("the header is not as it was written")
    return entries.pop("__metadata__"), entries


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Until its checksum was compared, a header may hold anything."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError, OverflowError):
        raise Damaged("the header is not as it was written") from None
