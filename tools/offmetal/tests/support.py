"""What the tests share: one call of a kernel, and how near two arrays are.

Kernels go through `emulated_kernel`, as those of a project's own tests do: these tests are about the simulator, and
`metal_kernel` is MLX's function where there is Metal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

import offmetal


def run(
    source: str,
    inputs: dict[str, mx.array] | None = None,
    *,
    threads: int | tuple[int, int, int] = 64,
    threadgroup: int | tuple[int, int, int] | None = None,
    shape: tuple[int, ...] = (64,),
    dtype: mx.Dtype = mx.float32,
    header: str = "",
    template: Sequence[tuple[str, Any]] | None = None,
    init_value: float | None = None,
    name: str = "k",
    **options: Any,
) -> mx.array:
    """The output `out` of a kernel whose body is `source`."""
    inputs = inputs or {}
    grid = threads if isinstance(threads, tuple) else (threads, 1, 1)
    group = threadgroup or (min(grid[0], 256), 1, 1)
    kernel = offmetal.emulated_kernel(name, list(inputs), ["out"], source, header, **options)
    (out,) = kernel(
        inputs=list(inputs.values()),
        grid=grid,
        threadgroup=group if isinstance(group, tuple) else (group, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
        template=template,
        init_value=init_value,
    )
    return out


def close(got: mx.array, expected: mx.array | np.ndarray[Any, Any], tolerance: float) -> None:
    """Largest difference at most `tolerance` times the largest value, or one."""
    got, expected = got.astype(mx.float32), mx.array(expected).astype(mx.float32)
    assert got.shape == expected.shape
    error, scale = mx.abs(got - expected).max().item(), max(1.0, mx.abs(expected).max().item())
    assert error <= tolerance * scale, f"largest error {error}, values up to {scale}"
