"""The tests of the simulator itself."""

from __future__ import annotations

import platform

import mlx.core as mx
import pytest

pytest_plugins = ["offmetal.pytest_plugin"]


@pytest.fixture(autouse=True)
def on_linux() -> None:
    """Elsewhere all are skipped, which the plugin says in one line at the end of the run."""
    if platform.system() != "Linux":
        pytest.skip("no simulator: it runs on Linux only")


@pytest.fixture(autouse=True)
def seed(on_linux: None) -> None:
    mx.random.seed(7)
