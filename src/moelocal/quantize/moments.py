"""Second moments of what goes into matrices: summed text by text, or expert by expert and then shrunk.

With n tokens, a routed expert's moments for gate and up shrink toward those of all tokens, rescaled to its trace,
(n H + τ s H_all) / (n + τ), those for down toward τ times the mean of their diagonal: n may be below the number of
columns, and then H alone is worse than none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

from moelocal.errors import NumericsError
from moelocal.quantize.gptq import Moments, product

SHRINKAGE: Final = 512
"""τ, in tokens."""


class Sums:
    """Adds up moments, text by text; `where` they belong, for errors."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.inputs: mx.array | None = None
        self.other: mx.array | None = None

    def add(self, other: mx.array, inputs: mx.array) -> None:
        """`inputs` [..., cols] of the quantized model with the original's [..., cols], or with the outputs wanted
        [..., rows]. Raises `NumericsError`."""
        x, y = float_rows(inputs), float_rows(other)
        parts = [product(mx.contiguous(a.T), x) for a in (x, y)]
        if self.inputs is not None and self.other is not None:
            parts = [parts[0] + self.inputs, parts[1] + self.other]
        if not all(mx.all(mx.isfinite(part)).item() for part in parts):
            name = str(inputs.dtype).removeprefix("mlx.core.")
            raise NumericsError(
                f"{self.where}: NaN or infinite activations while calibrating in {name}: "
                "its weights are damaged, or too large for that"
            )
        self.inputs, self.other = parts

    def moments(self, outputs: bool = False) -> Moments:
        assert self.inputs is not None and self.other is not None
        return Moments(self.inputs[None], **{"outputs" if outputs else "crossed": self.other[None]})


def float_rows(x: mx.array) -> mx.array:
    """[..., features] of any floating dtype -> float32 [N, features]."""
    return x.reshape(-1, x.shape[-1]).astype(mx.float32)


def moments_of(theirs: mx.array, ours: mx.array) -> Moments:
    """Float32 [n, cols] of one matrix; n may be 0."""
    return Moments(product(mx.contiguous(ours.T), ours)[None], product(mx.contiguous(theirs.T), ours)[None])


def shrunk(moments: Moments, tokens: int, prior: Moments | None) -> Moments:
    """The moments of one matrix, shrunk toward those of all, or (None) toward white inputs that the quantization does
    not change."""
    cols = moments.inputs.shape[-1]
    assert moments.crossed is not None
    size = mx.trace(moments.inputs[0])
    if prior is None:
        white = mx.eye(cols)[None] * (size / cols)
        prior = Moments(white, white)
    elif tokens:
        total = mx.trace(prior.inputs[0])
        scale = mx.where(total > 0, size / total, 0.0)
        assert prior.crossed is not None
        prior = Moments(prior.inputs * scale, prior.crossed * scale)
    assert prior.crossed is not None
    part = tokens / (tokens + SHRINKAGE)
    mixed = [
        own * part + other * (1 - part)
        for own, other in ((moments.inputs, prior.inputs), (moments.crossed, prior.crossed))
    ]
    mx.eval(mixed)
    return Moments(*mixed)


def stack(parts: Sequence[Moments]) -> Moments:
    crossed = [m.crossed for m in parts if m.crossed is not None]
    return Moments(mx.concatenate([m.inputs for m in parts]), mx.concatenate(crossed))
