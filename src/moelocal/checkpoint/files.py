"""The safetensors files of a folder: every header checked before MLX is asked to read a byte.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length N, N bytes of JSON
{name: {dtype, shape, data_offsets: [begin, end]}}, then the data. Headers are read here and not by a library because
each way in which a file can be cut off or wrong has to name the file, the tensor, what was expected and what is there.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from moelocal.config import read_json
from moelocal.errors import CheckpointError, ConfigError

_ITEM_SIZE: Final = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
                     "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip
_MOST_HEADER: Final = 100_000_000
_SHARD: Final = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: its file, safetensors dtype name, shape, size in bytes, and where in the file it starts."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in name order; with an index, just the files that it names.

    Raises `CheckpointError` if the folder or a file is missing, or the index is malformed.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: no model*.safetensors in this folder; is it a model folder?")
        return files
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map: expected an object of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not _SHARD.fullmatch(name):
            raise CheckpointError(f"{index}: weight_map: {name!r} is not the name of a safetensors file")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing; the index names it. Download the model again")
    return [folder / name for name in names]


def read_entries(folder: Path) -> dict[str, Entry]:
    """All tensors of a model folder by name. Raises `CheckpointError` (also when two files hold one name)."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        for entry in read_header(file):
            if entry.name in entries:
                raise CheckpointError(f"{file}: {entry.name} is also in {entries[entry.name].file.name}")
            entries[entry.name] = entry
    return entries


def read_header(file: Path) -> list[Entry]:
    """The tensors of one file, checked against its length. Raises `CheckpointError`."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            if size < 8:
                raise CheckpointError(f"{file}: only {size} bytes: cut off, or no safetensors file")
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > size - 8 or length > _MOST_HEADER:
                raise CheckpointError(
                    f"{file}: header of {length} bytes in a file of {size} bytes: cut off, or no safetensors file"
                )
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not valid JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header: expected a JSON object, got {type(header).__name__}")
    header.pop("__metadata__", None)
    spans = sorted(
        (_parse(file, name, value, 8 + length, size) for name, value in header.items()), key=lambda s: s[:2]
    )
    position = 0
    for begin, end, entry in spans:
        if begin != position:
            raise CheckpointError(
                f"{file}: {entry.name}: data starts at {begin}, expected {position}: overlap or gap"
            )
        position = end
    if position != size - 8 - length:
        raise CheckpointError(f"{file}: {size - 8 - length} bytes of data, the header describes {position}")
    return [entry for _, _, entry in spans]


def _parse(file: Path, name: str, value: Any, start: int, size: int) -> tuple[int, int, Entry]:
    """One header entry as (begin, end, Entry); the data begins at byte `start` of `size`."""
    where = f"{file}: {name}"
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object, got {value!r}")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_SIZE:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: malformed shape {shape!r} or data_offsets {offsets!r}")
    begin, end = offsets
    nbytes = math.prod(shape) * _ITEM_SIZE[dtype]
    if end > size - start:
        raise CheckpointError(
            f"{where}: data ends at byte {end} of only {size - start}: the file is cut off; download it again"
        )
    if end - begin != nbytes:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {nbytes} bytes, the header gives it {end - begin}"
        )
    return begin, end, Entry(name, file, dtype, tuple(shape), nbytes, start + begin)


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62 for v in value
    )
