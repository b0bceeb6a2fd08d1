"""Writes safetensors files by hand, so that tests can write bfloat16 without torch, and files that are
wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Tensor = tuple[str, list[int], bytes]
"""dtype name, shape, data"""


def encode(array: np.ndarray, dtype: str = "F32") -> Tensor:
    """A float array as a safetensors tensor of `dtype` F32, F16 or BF16 (rounded to nearest even)."""
    values = np.ascontiguousarray(array, np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32).astype(np.uint64)
        data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    return dtype, list(array.shape), data


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header for tensors stored in this order, without a gap."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + len(data)],
        }
        position += len(data)
    return header


def write_file(path: Path, header: Any, data: bytes) -> None:
    """A file with this header (any JSON value, or bytes as they are) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A well-formed safetensors file."""
    write_file(path, header_of(tensors), b"".join(data for _, _, data in tensors.values()))


def write_shards(folder: Path, tensors: Mapping[str, Tensor], count: int) -> None:
    """`count` shards of about the same number of tensors, and the index that names them."""
    names = list(tensors)
    total = sum(len(data) for _, _, data in tensors.values())
    weight_map: dict[str, str] = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        mine = names[shard * len(names) // count : (shard + 1) * len(names) // count]
        write_tensors(folder / file, {name: tensors[name] for name in mine})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def read_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of well-formed files, in the order of their data."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        content = file.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            tensors[name] = (entry["dtype"], entry["shape"], content[start + begin : start + end])
    return tensors
