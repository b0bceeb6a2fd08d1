"""What is in a checkpoint, from its headers alone: sizes by kind and class of tensor, formats, what is left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moelocal.checkpoint.files import Entry, read_entries
from moelocal.checkpoint.names import bare, kind_of
from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.model import Decoder


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one kind or class: how many, how many bytes."""

    name: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Survey:
    """`text` by class of tensor; `left_out` by kind: "vision", "mtp" and others that generation does not read;
    `formats` counts text matrices by storage format ("bfloat16", "affine 4 bits, group 64", …)."""

    config: ModelConfig
    files: int
    text: tuple[Part, ...]
    left_out: tuple[Part, ...]
    formats: tuple[tuple[str, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the text tensors."""
        return sum(part.nbytes for part in self.text)


def survey(folder: Path) -> Survey:
    """Describe the checkpoint in `folder` without reading a weight. Raises `ConfigError`, `CheckpointError`."""
    config = ModelConfig.read(folder)
    entries = read_entries(folder)
    checkpoint = Checkpoint.open(folder, config)
    Decoder(
        checkpoint, checkpoint.compute_dtype, evaluate=False
    )  # names, shapes and formats fit, or it raises
    skipped = {name for names in checkpoint.skipped.values() for name in names}
    text = [entry for name, entry in entries.items() if name not in skipped]
    return Survey(
        config=config,
        files=len({entry.file for entry in entries.values()}),
        text=_parts((_class_of(entry), entry) for entry in text),
        left_out=_parts(
            (kind_of(name) if kind_of(name) != "text" else "other", entries[name]) for name in skipped
        ),
        formats=tuple(Counter(checkpoint.formats.values()).most_common()),
    )


def _parts(pairs: Iterable[tuple[str, Entry]]) -> tuple[Part, ...]:
    groups: dict[str, list[Entry]] = {}
    for name, entry in pairs:
        groups.setdefault(name, []).append(entry)
    parts = [Part(name, len(members), sum(e.nbytes for e in members)) for name, members in groups.items()]
    return tuple(sorted(parts, key=lambda part: -part.nbytes))


def _class_of(entry: Entry) -> str:
    """The class of a text tensor, by what reads it."""
    name = bare(entry.name)
    for pattern, kind in (
        (r"embed_tokens", "embedding"),
        (r"lm_head", "output head"),
        (r"\.(switch_mlp|experts)\.", "routed experts"),
        (r"shared_expert\.", "shared experts"),
        (r"mlp\.(gate|shared_expert_gate)\.", "routers"),
        (r"\.self_attn\.\w_proj", "attention"),
        (r"\.linear_attn\.(in_proj|out_proj)", "delta net"),
        (r"\.mlp\.", "feed-forward"),
    ):
        if re.search(pattern, name):
            return kind
    return "norms and gates"
