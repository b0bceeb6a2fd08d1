"""The tests of the simulator itself."""

from __future__ import annotations

import mlx.core as mx
import pytest

pytest_plugins = ["offmetal.pytest_plugin"]


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(7)
