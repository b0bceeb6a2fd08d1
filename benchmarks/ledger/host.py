"""Host time of a decode step: building the graph of ours and of mlx-lm's, in turns, in one process.

Nothing is evaluated, so the shapes are the model's own. What is timed is what Python and MLX do on the host before the
graph is handed over: our step through its compiled blocks, mlx-lm's as it is. Where there is no Metal, the calls of
`mx.fast.metal_kernel` are real (MLX allows them while a function is exported) and the operations of `mx.fast`, which
would unfold into their fallbacks, are single primitives of the same shapes. Encoding the launches is not included: on a
Mac it adds a cost per launch.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from ledger.steps import MlxLm, Ours, with_kernels
from ledger.trace import forget

WARM_UP = 3


@contextmanager
def _as_on_metal() -> Iterator[None]:
    """MLX says that it has a Metal device, and its fast operations are one primitive each."""

    def norm(x: mx.array, weight: mx.array | None, eps: float, **_: Any) -> mx.array:
        dtype = x.dtype if weight is None else mx.result_type(x, weight)
        return mx.abs(x.astype(dtype))

    def delta(q: Any, k: Any, v: mx.array, g: Any, beta: Any, state: mx.array, **_: Any) -> Any:
        return mx.abs(v), mx.abs(state)

    def dequantize(w: mx.array, scales: mx.array, *_: Any, **rest: Any) -> mx.array:
        width = w.shape[-1] * 32 // (rest.get("bits") or 4)
        return mx.broadcast_to(scales[..., :1], (*w.shape[:-1], width))

    with ExitStack() as stack:
        if not mx.metal.is_available():
            for owner, name, new in (
                (mx, "default_device", lambda: mx.Device(mx.gpu)),
                (mx, "dequantize", dequantize),
                (mx.metal, "is_available", lambda: True),
                (mx.fast, "rms_norm", norm),
                (mx.fast, "rope", lambda x, *_, **__: mx.abs(x)),
                (mx.fast, "scaled_dot_product_attention", lambda q, *_, **__: mx.abs(q)),
                (mx.fast, "gated_delta_update", delta),
            ):
                stack.enter_context(patch.object(owner, name, new))
        yield


def _fork(cache: Any) -> Any:
    """A cache of its own objects with the same arrays."""
    if isinstance(cache, list):
        return [_fork(each) for each in cache]
    result = copy.copy(cache)
    for name in ("layers", "cache"):
        if isinstance(getattr(result, name, None), list):
            setattr(result, name, [_fork(x) if name == "layers" else x for x in getattr(result, name)])
    return result


def seconds(raw: Mapping[str, Any], context: int, rounds: int) -> tuple[float, float]:
    """Median seconds to build a step behind `context` tokens: ours and mlx-lm's."""
    times: dict[str, list[float]] = {Ours.name: [], MlxLm.name: []}

    def measure() -> list[mx.array]:
        token = mx.array(0)
        sides: list[tuple[Ours | MlxLm, Any]] = []
        for kind in (Ours, MlxLm):
            side = kind(raw)
            cache = side.new_cache(context)
            forget(side.held(cache))
            sides.append((side, cache))
        for turn in range(WARM_UP + rounds):
            for side, cache in sides if turn % 2 else reversed(sides):
                own = _fork(cache)
                begin = time.perf_counter()
                built = side.step(token, own)
                took = time.perf_counter() - begin
                del built, own
                if turn >= WARM_UP:
                    times[side.name].append(took)
        return [mx.array(0)]

    with _as_on_metal(), with_kernels():
        gc.collect()
        gc.disable()
        try:
            mx.export_function(lambda record: None, measure)
        finally:
            gc.enable()
    return statistics.median(times[Ours.name]), statistics.median(times[MlxLm.name])
