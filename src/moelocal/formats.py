"""Packed weights in the layouts that MLX reads: `QuantSpec` says which, `QuantizedArray` holds one matrix.

A dense weight is a plain `mx.array`. Every matrix is [..., rows, cols] with y = x @ Wᵀ; packing runs along cols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from moelocal.errors import CheckpointError, ConfigError

# mode -> bits -> groups, as `mx.quantize` accepts them
_MODES: Final[dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
# mode -> bits and group where none are given
_STARTS: Final = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Bits per weight, weights per group, and the mode of `mx.quantize`. Raises `ConfigError` if MLX has no such."""

    bits: int
    group: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        bits, groups = _MODES.get(self.mode, ((), ()))
        if self.bits not in bits or self.group not in groups:
            raise ConfigError(
                f"quantization: {self.mode!r} with {self.bits!r} bits in groups of {self.group!r} is not supported; "
                "supported: affine 2/3/4/5/6/8 bits in groups of 32/64/128, mxfp4, mxfp8, nvfp4"
            )

    @property
    def has_biases(self) -> bool:
        """Affine groups store scale and bias, the floating-point modes a scale only."""
        return self.mode == "affine"


@dataclass(frozen=True, slots=True)
class QuantizedArray:
    """A packed matrix: `weight` uint32 [..., rows, cols·bits/32], `scales` and (affine only) `biases`
    [..., rows, cols/group]."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    spec: QuantSpec

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """The arrays in MLX's argument order."""
        return (self.weight, self.scales) + (() if self.biases is None else (self.biases,))

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def astype(self, dtype: mx.Dtype) -> QuantizedArray:
        """The same codes with affine scales and biases in `dtype`, which is also the dtype of a product."""
        if self.biases is None:
            return self
        return QuantizedArray(self.weight, self.scales.astype(dtype), self.biases.astype(dtype), self.spec)

    def rows(self, index: mx.array | slice) -> QuantizedArray:
        """Rows chosen along the first axis; codes and scales of a row move together."""
        biases = None if self.biases is None else self.biases[index]
        return QuantizedArray(self.weight[index], self.scales[index], biases, self.spec)

    def product(self, x: mx.array, transpose: bool = True) -> mx.array:
        """x [..., cols] @ Wᵀ -> [..., rows], without spelling W out; x [..., rows] @ W where not to `transpose`."""
        spec = self.spec
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=transpose,
            group_size=spec.group,
            bits=spec.bits,
            mode=spec.mode,
        )

    def dequantize(self, dtype: mx.Dtype) -> mx.array:
        """The plain matrix [..., rows, cols] in `dtype`."""
        spec = self.spec
        # `mx.dequantize` rounds to the dtype of the scales before it converts
        wide = self.astype(dtype) if dtype == mx.float32 else self
        return mx.dequantize(
            wide.weight,
            wide.scales,
            wide.biases,
            group_size=spec.group,
            bits=spec.bits,
            mode=spec.mode,
            dtype=dtype,
        )


Weight = mx.array | QuantizedArray


def arrays_of(weight: Weight) -> tuple[mx.array, ...]:
    """The MLX arrays that a weight consists of."""
    return (weight,) if isinstance(weight, mx.array) else weight.arrays


def same_form(weights: Sequence[Weight]) -> bool:
    """Whether the matrices can be joined row by row into one: all dense, or all of one `QuantSpec`."""
    forms = {w.spec if isinstance(w, QuantizedArray) else None for w in weights}
    return len(forms) == 1


def join_rows(weights: Sequence[Weight]) -> Weight:
    """Matrices of one form, stacked along rows (axis -2): a product with the result is all products side by side."""
    if len(weights) == 1:
        return weights[0]
    dense = [w for w in weights if isinstance(w, mx.array)]
    if len(dense) == len(weights):
        return mx.concatenate(dense, axis=-2)
    packed = [w for w in weights if isinstance(w, QuantizedArray)]
    assert len(packed) == len(weights) and same_form(weights)
    joined = [mx.concatenate(list(parts), axis=-2) for parts in zip(*(w.arrays for w in packed), strict=True)]
    return QuantizedArray(joined[0], joined[1], joined[2] if len(joined) > 2 else None, packed[0].spec)


def infer_spec(where: str, packed: int, groups: int, scale_dtype: mx.Dtype, cols: int) -> QuantSpec:
    """The format of a packed matrix, which its shapes and dtypes leave no choice about once `cols` is known.

    `packed` uint32 words and `groups` scales per row; uint8 scales belong to the floating-point modes.
    Raises `CheckpointError` if no format has these shapes.
    """
    if not packed or not groups or cols % groups or packed * 32 % cols:
        raise CheckpointError(
            f"{where}: {packed} packed words and {groups} scales a row are no quantization of {cols} columns"
        )
    bits, group = packed * 32 // cols, cols // groups
    mode = "affine"
    if scale_dtype == mx.uint8:
        mode = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}.get((bits, group), "unknown")
    try:
        return QuantSpec(bits, group, mode)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """The `quantization` dict of a config: a default, and per path another spec or `None` (left unquantized).

    The packed shapes decide how a tensor is read (`infer_spec`); the plan is held against them, so that a config
    which describes another file is noticed.
    """

    default: QuantSpec
    paths: Mapping[str, QuantSpec | None]

    @classmethod
    def parse(cls, raw: Mapping[str, Any] | None) -> QuantPlan | None:
        """Read the dict as mlx-lm, mlx-vlm and LM Studio write it. Raises `ConfigError`."""
        if raw is None:
            return None
        method = raw.get("quant_method")
        if (
            method is not None and method not in ("mlx", "affine", "mxfp4", "mxfp8", "nvfp4")
        ) or "bits" not in raw:
            raise ConfigError(
                f"config.json: quantization: method {method!r} is not an MLX format; "
                "use the original checkpoint, or one converted for MLX"
            )
        default = _spec("quantization", raw)
        paths: dict[str, QuantSpec | None] = {}
        for path, entry in raw.items():
            if entry is False:
                paths[path] = None
            elif isinstance(entry, dict):
                paths[path] = _spec(path, entry)
            elif entry is not True and path not in ("bits", "group_size", "mode", "quant_method"):
                raise ConfigError(
                    f"config.json: quantization: {path}: expected an object or false, got {entry!r}"
                )
        return cls(default, paths)

    def check(self, path: str, found: QuantSpec | None) -> None:
        """Raise `CheckpointError` if the plan names another format for `path` than the file holds."""
        if path in self.paths and self.paths[path] != found:
            raise CheckpointError(f"{path}: config.json says {self.paths[path]}, the weights hold {found}")


def _spec(where: str, raw: Mapping[str, Any]) -> QuantSpec:
    """As MLX's `to_quantized(**raw)` reads it: without a mode affine (whatever the default of the file is), and
    without bits or group those that the mode starts from."""
    mode = raw.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _MODES:
        raise ConfigError(f"config.json: quantization: {where}: unknown mode {mode!r}")
    bits, group = (
        default if raw.get(key) is None else raw[key]
        for key, default in zip(("bits", "group_size"), _STARTS[mode], strict=True)
    )
    if not isinstance(bits, int) or not isinstance(group, int):
        raise ConfigError(
            f"config.json: quantization: {where}: expected integers, got {bits!r} bits, group {group!r}"
        )
    return QuantSpec(bits, group, mode)
