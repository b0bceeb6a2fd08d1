"""MLX gives the memory of a dead array to a smaller one and counts all of it: without that, bytes can be compared."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def exact_memory() -> Iterator[None]:
    limit = mx.set_cache_limit(0)
    gc.collect()  # what other tests left in cycles
    mx.clear_cache()
    yield
    mx.set_cache_limit(limit)
