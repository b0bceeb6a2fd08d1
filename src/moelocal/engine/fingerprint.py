"""What a state depends on besides the tokens: snapshots of anything else are never used."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import mlx.core as mx

from moelocal import metal
from moelocal.cache.keys import GRID
from moelocal.checkpoint.files import weight_files
from moelocal.config import ModelConfig
from moelocal.engine.chunks import STRIDE
from moelocal.ops import choice
from moelocal.ops.op import forced

FORMAT: Final = 2
"""Counts changes of what is stored, and of the arithmetic that leads there."""

SAMPLES: Final = 64
"""Places of a weight file that are read, evenly spread, with its header and its end: 4 MB a file."""

_PIECE: Final = 1 << 16


def fingerprint(folder: Path, dtype: mx.Dtype, config: ModelConfig, kv_bits: int | None) -> str:
    """Names the weights in `folder`, config.json (the quantization in it), the layers of `config` (which YaRN may have
    changed), the dtypes of activations, keys and values, the device, the forms of operations, and the versions of MLX
    and of what is stored.

    Of the weights it reads names, lengths, headers and samples: weights that were trained or quantized anew differ in
    all of them. A change of a few bytes between the samples would not be seen.
    """
    digest = hashlib.blake2b(digest_size=16)
    version: str = mx.__version__  # type: ignore[attr-defined]
    device = mx.default_device().type.name
    for text in (
        f"{FORMAT} {STRIDE} {GRID}",
        version,
        device,
        str(dtype),
        _forms(),
        f"{kv_bits} {config.layers}",
    ):
        digest.update(text.encode() + b"\0")
    digest.update((folder / "config.json").read_bytes() + b"\0")
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode() + b"\0")
        with file.open("rb") as stream:
            for piece in range(SAMPLES + 1):
                stream.seek(max(0, size - _PIECE) * piece // SAMPLES)
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()


def _forms() -> str:
    chosen = choice.current() if metal.available() else None
    entries = [] if chosen is None else sorted(map(repr, chosen.entries))
    return f"{forced()} {metal.executor() is not None} {entries}"
