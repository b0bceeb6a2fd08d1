"""What a conversion consists of: which tensors it writes, and the pieces in which it does.

A piece is a range of axis 0 of one tensor or matrix of ours, small enough that memory is bounded whatever the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.checkpoint.names import Source, interleaved, mlx_name
from moelocal.checkpoint.scope import Checkpoint
from moelocal.checkpoint.writing import Tensor
from moelocal.config import DeltaNetSpec, ModelConfig
from moelocal.errors import CheckpointError
from moelocal.formats import QuantizedArray, QuantSpec, join_rows

SOURCE_BYTES: Final = 64 << 20
"""Bytes of the source that one piece is made of, unless one row or expert is larger."""

_INTERLEAVED: Final = {
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}

Plan = Mapping[str, QuantSpec | None]


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor to be written, unpacked: `path` is its name without `.weight`.

    `matrices`: paths in the plan that it holds: none if it is no matrix, several if it is an interleaved one. `weight`,
    and where the source is quantized `scales` and `biases` in the format `spec`.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    matrices: tuple[str, ...]
    weight: Source
    scales: Source | None = None
    biases: Source | None = None
    spec: QuantSpec | None = None

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for source in (self.weight, self.scales, self.biases) if source is not None)

    def read(self, first: int, last: int) -> mx.array:
        """Indices first to last of axis 0, as the source has them or dequantized to float32. Raises `CheckpointError`,
        also for values that are not finite."""
        if self.scales is None or self.spec is None:
            array = self.weight.read(first, last)
        else:
            biases = None if self.biases is None else self.biases.read(first, last)
            packed = QuantizedArray(
                self.weight.read(first, last), self.scales.read(first, last), biases, self.spec
            )
            array = packed.dequantize(mx.float32)
        if not mx.all(mx.isfinite(array)).item():
            stored = self.weight.needs(first, last)
            bad = [not mx.all(mx.isfinite(row)).item() for row in array].index(True)
            name = stored[bad] if self.weight.stacked else stored[0]
            raise CheckpointError(
                f"{name}: holds NaN or infinite weights (index {first + bad} of {self.shape[0]}); "
                "the source is damaged: download it again, or use another"
            )
        return array


def parts_of(checkpoint: Checkpoint, packed: Mapping[str, QuantSpec]) -> list[Part]:
    """The text tensors of a checkpoint, opened without splitting any, in the order of the model; `packed`: the formats
    of its quantized matrices."""
    sources, parts = checkpoint.sources, []
    for name, source in sources.items():
        path = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")) and f"{name.rpartition('.')[0]}.weight" in sources:
            continue
        is_matrix = path != name and len(source.shape) > 1 and not name.endswith("conv1d.weight")
        stem, _, leaf = path.rpartition(".")
        matrices = (
            tuple(f"{stem}.{name}" for name in _INTERLEAVED.get(leaf, ())) or (path,) if is_matrix else ()
        )
        spec = packed.get(matrices[0]) if matrices else None
        if spec is None:
            parts.append(Part(path, name, source.shape, matrices, source))
            continue
        scales, biases = sources[f"{path}.scales"], sources.get(f"{path}.biases")
        shape = (*source.shape[:-1], scales.shape[-1] * spec.group)
        parts.append(Part(path, name, shape, matrices, source, scales, biases, spec))
    return sorted(parts, key=lambda part: _place(part.name))


def spec_of(part: Part, plan: Plan) -> QuantSpec | None:
    """The format of a part: of several matrices in one, the best that the plan has for them."""
    specs = [plan.get(path) for path in part.matrices]
    if not specs or None in specs:
        return None
    return max((spec for spec in specs if spec), key=lambda spec: (spec.bits, -spec.group))


def interleave(part: Part, made: Mapping[str, QuantizedArray], config: ModelConfig) -> QuantizedArray | None:
    """The quantized matrices of a part as one, rows in the order of the source; None if one is missing."""
    found = [made[path] for path in part.matrices if path in made]
    if not found or len(found) != len(part.matrices):
        return None
    if len(found) == 1:
        return found[0]
    mixer = config.layers[int(part.path.split(".")[1])].mixer
    assert isinstance(mixer, DeltaNetSpec)
    rows = interleaved(mixer, part.path.rpartition(".")[2])
    stored = np.argsort([row for path in part.matrices for row in rows[path.rpartition(".")[2]]])
    joined = join_rows(found)
    assert isinstance(joined, QuantizedArray)
    return joined.rows(mx.array(stored))


def _place(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, final norm, head."""
    if name.startswith("layers."):
        return 1, int(name.split(".")[1]), name
    return (0 if name.startswith("embed_tokens") else 3 if name.startswith("lm_head") else 2), 0, name


def stored_dtype(part: Part, dtype: mx.Dtype) -> mx.Dtype:
    """What an unquantized tensor is written in: the compute dtype, but A_log stays as it is, as mlx-lm does."""
    return part.weight.dtype if part.name.endswith("A_log") else dtype


def tensors_of(part: Part, spec: QuantSpec | None, checkpoint: Checkpoint, dtype: mx.Dtype) -> list[Tensor]:
    """The tensors that a part becomes, as mlx-lm names them. Raises `CheckpointError` if the group does not divide."""
    name = mlx_name(part.name, checkpoint.config)
    if spec is None:
        return [Tensor(name, stored_dtype(part, dtype), part.shape)]
    *lead, cols = part.shape
    if cols % spec.group:
        raise CheckpointError(
            f"{part.weight.stored[0]} {list(part.shape)}: groups of {spec.group} do not divide its {cols} columns; "
            "choose a smaller group for it, or keep it unquantized"
        )
    path = name.removesuffix(".weight")
    per_row = (*lead, cols // spec.group)
    return [
        Tensor(name, mx.uint32, (*lead, cols * spec.bits // 32)),
        Tensor(f"{path}.scales", dtype, per_row),
        Tensor(f"{path}.biases", dtype, per_row),
    ]


@dataclass(frozen=True, slots=True)
class Piece:
    """Indices `first` to `last` of a part; `files` are the shards that they are read from, `nbytes` how much."""

    part: Part
    first: int
    last: int
    files: tuple[str, ...]
    nbytes: int

    @property
    def name(self) -> str:
        return f"{self.part.name}[{self.first}:{self.last}]"


def pieces_of(parts: Sequence[Part], checkpoint: Checkpoint, most: int = SOURCE_BYTES) -> list[Piece]:
    """Every part in pieces of one shard each (as far as one index is), in the order of the bytes in the shards: a
    shard is read once from its beginning to its end, and then no more."""
    pieces = [piece for part in parts for piece in _cut(part, checkpoint, most)]

    def place(piece: Piece) -> tuple[str, str, int, str]:
        entry = checkpoint.entries[piece.part.weight.needs(piece.first, piece.last)[0]]
        start = 0 if piece.part.weight.stacked else entry.nbytes // entry.shape[0] * piece.first
        return piece.files[-1], piece.files[0], entry.offset + start, piece.name

    return sorted(pieces, key=place)


def _cut(part: Part, checkpoint: Checkpoint, most: int) -> Iterator[Piece]:
    entries, count = checkpoint.entries, part.shape[0]

    def files_of(index: int) -> tuple[str, ...]:
        names = {
            entries[name].file.name for source in part.sources for name in source.needs(index, index + 1)
        }
        return tuple(sorted(names))

    # what is read for one index; of a tensor that is cut from a larger one, all of that one's row or expert
    stored = sum(entries[name].nbytes for source in part.sources for name in source.needs(0, 1))
    read = stored if part.weight.stacked else stored // entries[part.weight.stored[0]].shape[0]
    if part.spec is not None:
        read = max(read, math.prod(part.shape[1:]) * 4)  # dequantized
    step, first = max(1, most // max(1, read)), 0
    while first < count:
        files = files_of(first)
        last = first + 1
        while last < count and last - first < step and (not part.weight.stacked or files_of(last) == files):
            last += 1
        row = sum(math.prod(source.shape[1:]) * source.dtype.size for source in part.sources)
        yield Piece(part, first, last, files, (last - first) * row)
        first = last
