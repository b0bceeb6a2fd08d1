"""What is in a checkpoint, from its headers alone: bytes by tensor, formats of matrices, what is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from moelocal.checkpoint.files import Entry
from moelocal.checkpoint.names import Source, kind_of
from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.formats import QuantSpec
from moelocal.model import Decoder


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one kind: how many, how many bytes."""

    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint that fits its config.

    `stored`: bytes in the files by our tensor name (those of a fused tensor divided among what it becomes); `dtype`: of
    most floating-point weights; `packed`: formats of the quantized matrices by path; `left_out` by kind: "vision",
    "mtp" and others that generation does not read; `formats` counts text matrices by storage format ("bfloat16",
    "affine 4 bits in groups of 64", …).
    """

    config: ModelConfig
    files: int
    stored: Mapping[str, int]
    dtype: mx.Dtype
    packed: Mapping[str, QuantSpec]
    left_out: tuple[Part, ...]
    formats: tuple[tuple[str, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the text tensors."""
        return sum(self.stored.values())


def survey(folder: Path) -> Survey:
    """Describe the checkpoint in `folder` without reading a weight. Raises `ConfigError`, `CheckpointError`."""
    config = ModelConfig.read(folder)
    checkpoint = Checkpoint.open(folder, config)
    entries = checkpoint.entries
    # names, shapes and formats fit, or it raises
    Decoder(checkpoint, checkpoint.compute_dtype, evaluate=False)
    skipped = {name for names in checkpoint.skipped.values() for name in names}
    return Survey(
        config=config,
        files=len({entry.file for entry in entries.values()}),
        stored=_stored(checkpoint.sources, entries),
        dtype=checkpoint.compute_dtype,
        packed=checkpoint.packed,
        left_out=_parts(
            (kind_of(name) if kind_of(name) != "text" else "other", entries[name]) for name in skipped
        ),
        formats=tuple(Counter(checkpoint.formats.values()).most_common()),
    )


def _stored(sources: Mapping[str, Source], entries: Mapping[str, Entry]) -> dict[str, int]:
    users: Counter[str] = Counter()
    for source in sources.values():
        for name in source.stored:
            users[name] += math.prod(source.shape)
    return {
        ours: sum(
            entries[name].nbytes * math.prod(source.shape) // users[name] if users[name] else 0
            for name in source.stored
        )
        for ours, source in sources.items()
    }


def _parts(pairs: Iterable[tuple[str, Entry]]) -> tuple[Part, ...]:
    groups: dict[str, list[Entry]] = {}
    for name, entry in pairs:
        groups.setdefault(name, []).append(entry)
    parts = [Part(name, len(members), sum(e.nbytes for e in members)) for name, members in groups.items()]
    return tuple(sorted(parts, key=lambda part: -part.nbytes))
