"""The fixture `mode`, which runs a test in each way that the simulator can execute a kernel; one clear line where the
simulator cannot run; and the number of launches at the end of a run.

`pytest_plugins = ["offmetal.pytest_plugin"]` in a top conftest.py loads all of it; importing `mode` gives the fixture
alone. (PYTEST_DONT_REWRITE: there are no assertions here, and pytest warns of a plugin that was imported before.)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any, Final

import pytest

import offmetal

MODES: Final[dict[str, dict[str, Any]]] = {
    "checked": {"checked": True, "allow_unwritten": False},
    "fast": {"checked": False},
    "random": {"checked": True, "allow_unwritten": False, "order": "random", "seed": 3},
    "fused": {"checked": True, "allow_unwritten": False, "fma": True},
}

_before: Counter[str] = Counter()
"""Launches of this process before the run."""
_from_workers: Counter[str] = Counter()
_told = False
_SKIPPED: Final = "Skipped: no simulator: "


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    with offmetal.options(**MODES[request.param]):
        yield request.param


def pytest_sessionstart() -> None:
    global _before
    _before = offmetal.launches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Without clang the tests that need it are skipped, and the end of the run says so in one line. Where a clang is
    asked for by name (OFFMETAL_CLANG, as in CI) the first such test fails with that line."""
    global _told
    report = yield
    if call.excinfo and isinstance(call.excinfo.value, offmetal.ToolMissing):
        line = str(call.excinfo.value)
        if _told or "OFFMETAL_CLANG" not in os.environ:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"{_SKIPPED}{line}")
        else:
            report.longrepr = line
        _told = True
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["offmetal"] = dict(offmetal.launches())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended."""
    _from_workers.update(getattr(node, "workeroutput", {}).get("offmetal", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = [str(report.longrepr[2]) for report in terminalreporter.getreports("skipped")]
    missing = [reason.removeprefix(_SKIPPED) for reason in reasons if reason.startswith(_SKIPPED)]
    if missing:
        terminalreporter.write_line(f"offmetal: {len(missing)} tests of kernels skipped: {missing[0]}")
    counts = offmetal.launches() - _before + _from_workers
    if counts:
        terminalreporter.write_line(f"offmetal: {counts.total()} launches of {len(counts)} kernels")
