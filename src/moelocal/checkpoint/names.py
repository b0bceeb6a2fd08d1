"""Names and layouts of every known checkpoint, brought to one: that of mlx-lm, without its prefix.

- `model.language_model.`, `language_model.model.` and `model.` are dropped: `embed_tokens`, `layers.L.…`, `norm`,
  `lm_head` remain.
- `mlp.experts.gate_up_proj` [E, 2I, H] becomes `mlp.switch_mlp.gate_proj.weight` and `up_proj.weight`, the first and
  the second half of its rows; `mlp.experts.E.gate_proj.…`, one by one, are stacked [E, …].
- `linear_attn.in_proj_qkvz` and `in_proj_ba` of qwen3_next, interleaved per key head, become `in_proj_qkv`,
  `in_proj_z`, `in_proj_b` and `in_proj_a`.
- `conv1d.weight` [C, 1, W] becomes [C, W, 1]. It alone marks a raw checkpoint, whose norms then get + 1.
- `model.visual.…`, `vision_tower.…` and `mtp.…` are left out, and counted by kind.

Nothing is read here: each tensor is a `Source`, with a function that makes the (lazy) array when it is asked for, or
reads a part of it by its bytes alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from moelocal.checkpoint.files import Entry
from moelocal.config import DeltaNetSpec, ModelConfig
from moelocal.errors import CheckpointError

_PREFIXES: Final = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_VISION: Final = (
    "model.visual.",
    "visual.",
    "vision_tower.",
    "model.vision_tower.",
    "language_model.visual.",
)
_NORMS: Final = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "q_norm.weight",
    "k_norm.weight",
)
_DTYPES: Final = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
_NUMPY: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}  # NumPy has no bfloat16
_EXPERT: Final = re.compile(r"(layers\.\d+\.mlp)\.experts\.(\d+)\.((?:gate|up|down)_proj\.\w+)")


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor in our layout: shape and dtype known from the headers.

    `stored` are the names in the files that it is made of; `stacked`: one for each index of axis 0.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    stored: tuple[str, ...]
    _read: Callable[[int, int | None], mx.array]
    stacked: bool = False

    def read(self, first: int = 0, last: int | None = None) -> mx.array:
        """The whole tensor as a lazy array, once; or, with `last`, indices first to last of axis 0, as often as asked:
        they are read now, and nothing but their bytes is. Raises `CheckpointError`."""
        return self._read(first, last)

    def needs(self, first: int, last: int) -> tuple[str, ...]:
        """The stored names that indices first to last of axis 0 are made of."""
        return self.stored[first:last] if self.stacked else self.stored


@dataclass(frozen=True, slots=True)
class Layout:
    """The text tensors by our names, and the names that were left out, by kind ("vision", "mtp", "other")."""

    sources: Mapping[str, Source]
    skipped: Mapping[str, tuple[str, ...]]


def bare(name: str) -> str:
    """A tensor name or module path without the prefix that its layout gives the text model."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def mlx_name(name: str, config: ModelConfig) -> str:
    """A name of ours as mlx-lm writes it for the family."""
    outer = "language_model." if config.architecture in ("qwen3_5_moe", "qwen3_5") else ""
    return outer + name if name.startswith("lm_head.") or name == "lm_head" else f"{outer}model.{name}"


def kind_of(name: str) -> str:
    """ "text", "vision" or "mtp", from a stored name."""
    if name.startswith(_VISION):
        return "vision"
    return "mtp" if bare(name).startswith("mtp.") else "text"


def layout(entries: Mapping[str, Entry], config: ModelConfig, split: bool = True) -> Layout:
    """Bring the tensors of a folder to our names and shapes; without `split`, the interleaved ones of qwen3_next stay
    as they are, which is how mlx-lm writes them. Raises `CheckpointError`."""
    reader = _Reader()
    sources: dict[str, Source] = {}
    skipped: dict[str, list[str]] = {}
    for name, entry in entries.items():
        kind = kind_of(name)
        if name.endswith("rotary_emb.inv_freq") or (config.tied and bare(name) == "lm_head.weight"):
            kind = "other"  # recomputed, or a copy of the embedding
        if kind != "text":
            skipped.setdefault(kind, []).append(name)
            continue
        ours = bare(name)
        if ours in sources:
            raise CheckpointError(f"{entry.file}: {name} and {sources[ours].stored[0]} are the same tensor")
        sources[ours] = reader.source(entry)
    sources = _stack_experts(sources)
    sources = _split_fused_experts(sources)
    if split:
        sources = _split_interleaved(sources, config)
    sources = _convert_raw(sources, config)
    return Layout(sources, {kind: tuple(names) for kind, names in skipped.items()})


class _Reader:
    """Opens each file once; arrays stay lazy until evaluated."""

    def __init__(self) -> None:
        self._files: dict[Path, dict[str, mx.array]] = {}

    def source(self, entry: Entry) -> Source:
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{entry.file}: {entry.name}: dtype {entry.dtype} is not supported; use the original checkpoint"
            )
        return Source(entry.shape, _DTYPES[entry.dtype], (entry.name,), partial(self._array, entry))

    def _array(self, entry: Entry, first: int, last: int | None) -> mx.array:
        if last is not None:
            return _read_part(entry, first, last)
        if entry.file not in self._files:
            try:
                loaded = mx.load(str(entry.file))
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"{entry.file}: {error}") from None
            assert isinstance(loaded, dict)
            self._files[entry.file] = loaded
        # popped, so that the array is freed as soon as its user has made something else of it
        return self._files[entry.file].pop(entry.name)


def _read_part(entry: Entry, first: int, last: int) -> mx.array:
    """Indices first to last of axis 0. The file is opened for each part: one that is deleted meanwhile is gone."""
    row = entry.nbytes // entry.shape[0]
    data: npt.NDArray[Any] = np.empty((last - first) * row, np.uint8)
    rest = data.data
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset + first * row)
            while rest and (count := stream.readinto(rest)):
                rest = rest[count:]
    except OSError as error:
        raise CheckpointError(f"{entry.file}: {entry.name}: cannot be read: {error.strerror}") from None
    if rest:
        raise CheckpointError(f"{entry.file}: {entry.name}: the file has become shorter since it was opened")
    array = mx.array(data.view(_NUMPY[entry.dtype])).reshape(last - first, *entry.shape[1:])
    return array.view(_DTYPES[entry.dtype])


class _Once:
    """Several tensors are cut from one stored tensor: read it for the first, forget it after the last."""

    def __init__(self, source: Source, uses: int) -> None:
        self.source, self._uses, self._array = source, uses, None

    def __call__(self) -> mx.array:
        array = self.source.read() if self._array is None else self._array
        self._uses -= 1
        self._array = array if self._uses else None
        return array

    _array: mx.array | None


def _stack_experts(sources: dict[str, Source]) -> dict[str, Source]:
    """`experts.0.gate_proj.weight`, `experts.1.…` -> one `switch_mlp.gate_proj.weight` [E, …]."""
    stacks: dict[str, dict[int, Source]] = {}
    result: dict[str, Source] = {}
    for name, source in sources.items():
        if match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = source
        else:
            result[name] = source
    for name, parts in stacks.items():
        missing = sorted(set(range(len(parts))) - set(parts))
        if missing:
            raise CheckpointError(f"{name}: expert {missing[0]} is missing")
        ordered = [parts[e] for e in range(len(parts))]
        first = ordered[0]
        for expert, part in enumerate(ordered):
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise CheckpointError(
                    f"{part.stored[0]} (expert {expert}): expected {list(first.shape)} as expert 0, "
                    f"got {list(part.shape)}"
                )
        shape, stored = (len(ordered), *first.shape), tuple(p.stored[0] for p in ordered)
        result[name] = Source(shape, first.dtype, stored, partial(_stack, ordered), stacked=True)
    return result


def _stack(parts: Sequence[Source], first: int, last: int | None) -> mx.array:
    if last is None:
        return mx.stack([part.read() for part in parts])
    return mx.stack([part.read(0, part.shape[0]) for part in parts[first:last]])


def _split_fused_experts(sources: dict[str, Source]) -> dict[str, Source]:
    """`experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` -> the three matrices of `switch_mlp`."""
    result = dict(sources)
    for name, source in sources.items():
        stem, _, leaf = name.rpartition(".experts.")
        leaf = leaf.removesuffix(".weight")
        if not stem or leaf not in ("gate_up_proj", "down_proj"):
            continue
        del result[name]
        if leaf == "down_proj":
            result[f"{stem}.switch_mlp.down_proj.weight"] = source
            continue
        if len(source.shape) != 3 or source.shape[1] % 2:
            raise CheckpointError(
                f"{source.stored[0]}: expected [experts, 2 x width, hidden], got {list(source.shape)}"
            )
        experts, rows, cols = source.shape
        once, half = _Once(source, 2), rows // 2
        for target, start in (("gate_proj", 0), ("up_proj", half)):
            cut = partial(_rows_of_experts, once, slice(start, start + half))
            result[f"{stem}.switch_mlp.{target}.weight"] = replace(
                source, shape=(experts, half, cols), _read=cut
            )
    return result


def _rows_of_experts(whole: _Once, rows: slice, first: int, last: int | None) -> mx.array:
    return (whole() if last is None else whole.source.read(first, last))[:, rows]


def _split_interleaved(sources: dict[str, Source], config: ModelConfig) -> dict[str, Source]:
    """qwen3_next: per key head, rows of `in_proj_qkvz` are [q Dk | k Dk | v r·Dv | z r·Dv], of `in_proj_ba` [b r|a r].

    Packed codes and scales are permuted alike, since packing runs along columns.
    """
    result = dict(sources)
    for name, source in sources.items():
        match = re.fullmatch(r"layers\.(\d+)\.linear_attn\.(in_proj_qkvz|in_proj_ba)\.(\w+)", name)
        if not match or int(match[1]) >= len(config.layers):
            continue
        spec = config.layers[int(match[1])].mixer
        if not isinstance(spec, DeltaNetSpec):
            continue
        del result[name]
        rows = interleaved(spec, match[2])
        count = sum(len(index) for index in rows.values())
        if len(source.shape) != 2 or source.shape[0] != count:
            raise CheckpointError(f"{source.stored[0]}: expected {count} rows, got {list(source.shape)}")
        once = _Once(source, len(rows))
        for target, index in rows.items():
            result[f"layers.{match[1]}.linear_attn.{target}.{match[3]}"] = replace(
                source, shape=(len(index), source.shape[1]), _read=partial(_rows, once, index)
            )
    return result


def interleaved(spec: DeltaNetSpec, name: str) -> dict[str, list[int]]:
    """The rows of `in_proj_qkvz` or `in_proj_ba` that each of our matrices consists of, by its name."""
    ratio = spec.value_heads // spec.key_heads
    values = ratio * spec.value_dim
    widths = [("qkv", spec.key_dim), ("qkv", spec.key_dim), ("qkv", values), ("z", values)]
    if name == "in_proj_ba":
        widths = [("b", ratio), ("a", ratio)]
    period = sum(width for _, width in widths)
    rows: dict[str, list[int]] = {}
    start = 0
    for target, width in widths:
        # all key heads of one part, then all of the next: q of every head, then k of every head, ...
        heads = [h * period + start + i for h in range(spec.key_heads) for i in range(width)]
        rows.setdefault(f"in_proj_{target}", []).extend(heads)
        start += width
    return rows


def _rows(whole: _Once, index: list[int], first: int, last: int | None) -> mx.array:
    """Rows `index`[first:last] of a tensor; for a part, one read for each run of neighbours."""
    if last is None:
        return whole()[mx.array(index)]
    index = index[first:last]
    starts = [i for i, row in enumerate(index) if i == 0 or row != index[i - 1] + 1]
    runs = zip(starts, [*starts[1:], len(index)], strict=True)
    return mx.concatenate([whole.source.read(index[start], index[end - 1] + 1) for start, end in runs])


def _channels_last(source: Source, first: int, last: int | None) -> mx.array:
    return mx.swapaxes(source.read(first, last), 1, 2)


def _plus_one(source: Source, first: int, last: int | None) -> mx.array:
    return source.read(first, last).astype(mx.float32) + 1.0


def _convert_raw(sources: dict[str, Source], config: ModelConfig) -> dict[str, Source]:
    """Raw convolutions [C, 1, W] -> [C, W, 1]; where one is raw, stored norm weights w mean 1 + w (float32)."""
    result = dict(sources)
    raw = False
    for name, source in sources.items():
        if name.endswith("linear_attn.conv1d.weight") and len(source.shape) == 3 and source.shape[1] == 1:
            channels, _, width = source.shape
            raw = raw or width != 1
            result[name] = replace(source, shape=(channels, width, 1), _read=partial(_channels_last, source))
    for name, source in sources.items():
        if raw and config.raw_norm_offset and (name.endswith(_NORMS) or name == "norm.weight"):
            result[name] = replace(source, dtype=mx.float32, _read=partial(_plus_one, source))
    return result
