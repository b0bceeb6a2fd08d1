"""The attention layers of the embedded model with both kernels against the portable forms: real projections, gates that
lie beside the queries, a cache that grows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import mlx.core as mx
import pytest

import moelocal
import offmetal
from close import relative_error
from moelocal.cache import AttentionCache
from moelocal.layers.attention import Attention
from moelocal.ops.op import force


@pytest.mark.parametrize("batch", [1, 2])
def test_a_layer_gives_what_the_portable_forms_give(batch: int, launched: Callable[[], Counter[str]]):
    decoder = moelocal.load().decoder
    layers = [block.mixer for block in decoder.blocks if isinstance(block.mixer, Attention)]
    for layer in (layers[0], layers[-1]):
        caches, position = {form: AttentionCache() for form in ("metal", "portable")}, 0
        for time in (250, 1, 1, 3, 8, 1):  # past the first 256 positions, and two to eight of them at once
            x = mx.random.normal((batch, time, decoder.config.hidden))
            outputs = []
            for form, cache in caches.items():
                with force(form), offmetal.options(allow_unwritten=False):
                    outputs.append(layer(x, cache, position, None))
            # float32, sums in another order
            assert relative_error(*outputs) < 1e-5
            position += time
        assert caches["metal"].length == position
    # 250 positions at once are too many for `attend`
    assert launched() == {"prologue": 2 * 6, "attend_block": 2 * 5, "attend_combine": 2 * 5}
