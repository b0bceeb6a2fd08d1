"""Kernels run in the simulator here, in the place of the device."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

import offmetal
from moelocal import metal
from moelocal.ops.op import force
from offmetal.pytest_plugin import mode

__all__ = ["mode"]


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    """Ops take their Metal form, executed by the simulator, which cannot run inside a traced function."""
    mx.random.seed(7)
    mx.disable_compile()
    try:
        with metal.executing(offmetal.emulated_kernel), force("metal"):
            yield
    finally:
        mx.enable_compile()
