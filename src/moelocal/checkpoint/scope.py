"""Typed access to the weights of a checkpoint: layers ask a `Scope` for a tensor by name, shape and kind.

Each tensor is handed out once, with the shape and dtype that its layer states; what nobody asked for is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from moelocal.checkpoint.files import Entry, read_entries
from moelocal.checkpoint.names import Layout, Source, bare, layout
from moelocal.config import ModelConfig
from moelocal.errors import CheckpointError
from moelocal.formats import QuantizedArray, QuantPlan, QuantSpec, Weight, infer_spec

_FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class AnyScope(Protocol):
    """What a layer takes its weights from: a `Scope`, or something that gives its own answers."""

    def at(self, name: str) -> AnyScope: ...

    def array(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype | None = mx.float32) -> mx.array: ...

    def matrix(
        self, name: str, rows: int, cols: int, dtype: mx.Dtype | None, experts: int | None = None
    ) -> Weight: ...


class AnyCheckpoint(Protocol):
    """What a network is built from: a `Checkpoint`, or something that gives its own answers."""

    @property
    def config(self) -> ModelConfig: ...

    def root(self) -> AnyScope: ...

    def require_all_used(self) -> None: ...


@dataclass(slots=True)
class Checkpoint:
    """The weights of a folder, opened: headers checked, nothing read yet.

    `entries`: what the files hold, by stored name; `used`: tensors handed out so far; `formats`: how the matrices
    among them are stored, in words; `packed`: those of them that are quantized.
    """

    folder: Path
    config: ModelConfig
    plan: QuantPlan | None
    sources: Mapping[str, Source]
    skipped: Mapping[str, tuple[str, ...]]
    entries: Mapping[str, Entry]
    used: set[str] = field(default_factory=set)
    formats: dict[str, str] = field(default_factory=dict)
    packed: dict[str, QuantSpec] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, config: ModelConfig) -> Checkpoint:
        """Read the headers of `folder`. Raises `CheckpointError`, `ConfigError`."""
        return cls.of(folder, config, read_entries(folder))

    @classmethod
    def of(
        cls, folder: Path, config: ModelConfig, entries: Mapping[str, Entry], split: bool = True
    ) -> Checkpoint:
        """The same for headers that were read already, wherever their files are; `split` as for `layout`."""
        tensors: Layout = layout(entries, config, split)
        plan = QuantPlan.parse(config.quantization)
        if plan is not None:
            plan = QuantPlan(plan.default, {bare(path): spec for path, spec in plan.paths.items()})
        return cls(folder, config, plan, tensors.sources, tensors.skipped, entries)

    def root(self) -> Scope:
        """The scope of the whole text model."""
        return Scope(self, "")

    def require_all_used(self) -> None:
        """Raise `CheckpointError` if a text tensor was never asked for."""
        unread = sorted(set(self.sources) - self.used)
        if unread:
            names = ", ".join(self.sources[n].stored[0] for n in unread[:4]) + (
                ", …" if len(unread) > 4 else ""
            )
            raise CheckpointError(
                f"{self.folder}: {len(unread)} tensors that this model has no place for: {names}; "
                "config.json and the weights do not belong together"
            )

    @property
    def compute_dtype(self) -> mx.Dtype:
        """The dtype that most of the floating-point text weights are stored in."""
        sizes: dict[mx.Dtype, int] = {}
        for name, source in self.sources.items():
            if source.dtype in _FLOATS and name.endswith((".weight", ".scales")):
                count = 1
                for side in source.shape:
                    count *= side
                sizes[source.dtype] = sizes.get(source.dtype, 0) + count
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else mx.float32


@dataclass(frozen=True, slots=True)
class Scope:
    """A place in a checkpoint. `at` goes deeper; the rest take a tensor out, checked."""

    checkpoint: Checkpoint
    prefix: str

    def at(self, name: str) -> Scope:
        """The scope `name` below this one."""
        return Scope(self.checkpoint, f"{self.prefix}{name}.")

    def has(self, name: str) -> bool:
        """Whether a tensor `name` exists."""
        return self.prefix + name in self.checkpoint.sources

    def array(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype | None = mx.float32) -> mx.array:
        """The floating-point tensor `name` of exactly `shape`, as float32 (norms, gates and biases are small and
        sensitive); `dtype` None: as stored. Raises `CheckpointError`."""
        source = self._take(name)
        self._require(source, shape, _FLOATS)
        return source.read() if dtype is None else source.read().astype(dtype)

    def matrix(
        self, name: str, rows: int, cols: int, dtype: mx.Dtype | None, experts: int | None = None
    ) -> Weight:
        """The matrix `name`.weight [rows, cols], or [experts, rows, cols]; packed if the file holds it packed.

        Floating-point values (dense weights, affine scales and biases) are given in `dtype`; None: as stored.
        Raises `CheckpointError` if it is missing, of another shape, or described differently by config.json.
        """
        lead = () if experts is None else (experts,)
        path = self.prefix + name
        plan = self.checkpoint.plan
        if not self.has(f"{name}.scales"):
            source = self._take(f"{name}.weight")
            self._require(source, (*lead, rows, cols), _FLOATS)
            if plan is not None and plan.paths.get(path) is not None:
                plan.check(path, None)
            self.checkpoint.formats[path] = str(source.dtype).removeprefix("mlx.core.")
            plain = source.read()
            return plain if dtype is None else plain.astype(dtype)
        weight, scales = self._take(f"{name}.weight"), self._take(f"{name}.scales")
        if plan is None:
            raise CheckpointError(f"{scales.stored[0]}: packed weights, but config.json has no quantization")
        self._require(scales, (*lead, rows, *scales.shape[-1:]), (*_FLOATS, mx.uint8))
        self._require(weight, (*lead, rows, *weight.shape[-1:]), (mx.uint32,))
        spec = infer_spec(path, weight.shape[-1], scales.shape[-1], scales.dtype, cols)
        plan.check(path, spec)
        self.checkpoint.packed[path] = spec
        self.checkpoint.formats[path] = f"{spec.mode} {spec.bits} bits in groups of {spec.group}"
        biases = None
        if spec.has_biases:
            stored = self._take(f"{name}.biases")
            self._require(stored, scales.shape, (scales.dtype,))
            biases = stored.read()
        packed = QuantizedArray(weight.read(), scales.read(), biases, spec)
        return packed if dtype is None else packed.astype(dtype)

    def _take(self, name: str) -> Source:
        full = self.prefix + name
        if full not in self.checkpoint.sources:
            raise CheckpointError(f"{self.checkpoint.folder}: tensor {full} is missing")
        assert full not in self.checkpoint.used, f"{full} was taken twice"
        self.checkpoint.used.add(full)
        return self.checkpoint.sources[full]

    def _require(self, source: Source, shape: tuple[int, ...], dtypes: tuple[mx.Dtype, ...]) -> None:
        if source.shape != shape or source.dtype not in dtypes:
            expected = " or ".join(str(d).removeprefix("mlx.core.") for d in dtypes)
            got = str(source.dtype).removeprefix("mlx.core.")
            raise CheckpointError(
                f"{self.checkpoint.folder}: {source.stored[0]}: expected {expected} {list(shape)}, "
                f"got {got} {list(source.shape)}"
            )
