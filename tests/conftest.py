"""What every test shares: repeatable property tests, and no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# assertions in these modules are explained as those in tests are
pytest.register_assert_rewrite("damage", "parity.ours")

pytest_plugins = ["offmetal.pytest_plugin"]

# The light run is the same on every machine; `--hypothesis-profile=explore` searches on from a new seed.
settings.register_profile(
    "light",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("explore", settings.get_profile("light"), derandomize=False, max_examples=2000)
settings.load_profile("light")

# Several test processes share the cores: BLAS threads that wait for each other make them ten times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A test that would download a model fails at once instead of hanging behind a firewall.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the checkout."""
    return Path(__file__).parent.parent
