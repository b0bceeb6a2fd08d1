"""Kernels run in the simulator here, in the place of the device; with `-m metal` on the device itself."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator

import mlx.core as mx
import pytest

import offmetal
from moelocal import metal
from moelocal.ops.op import force
from offmetal.pytest_plugin import mode

__all__ = ["mode"]


class Absent:
    """Stands for what only the simulator has: a test that asks for it ends."""

    def __getattr__(self, name: str) -> None:
        pytest.skip("counts what only the simulator counts")

    def __call__(self, *args: object, **kwargs: object) -> None:
        pytest.skip("looks at launches in the simulator")


@pytest.fixture(autouse=True, params=["simulator", pytest.param("device", marks=pytest.mark.metal)])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops take their Metal form, executed by the simulator, which cannot run inside a traced function, or by the
    device."""
    mx.random.seed(7)
    if request.param == "device":
        if not mx.metal.is_available():
            pytest.skip("there is no Metal device here")
        parameters = getattr(getattr(request.node, "callspec", None), "params", {})
        if parameters.get("mode", "checked") != "checked":
            pytest.skip("a mode of the simulator")
        monkeypatch.setattr(offmetal, "last_result", Absent())
        monkeypatch.setattr(offmetal, "emulated_kernel", Absent())
        monkeypatch.setattr(offmetal, "launches", Absent())
        with force("metal"):
            yield
        return
    if sys.platform == "darwin":
        pytest.skip("the simulator has run on Linux only; -m metal takes the device")
    mx.disable_compile()
    try:
        with metal.executing(offmetal.emulated_kernel), force("metal"):
            yield
    finally:
        mx.enable_compile()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Function) -> Generator[None, None, None]:
    """A test that passed in the simulator without a kernel, as an op falls back silently, fails after all; one that is
    about falling back fails with a kernel."""
    if item.callspec.params["runner"] == "device":
        yield  # nobody counts there; what a kernel takes is the same
        return
    before = offmetal.launches().total()
    yield
    launches = offmetal.launches().total() - before
    if item.get_closest_marker("falls_back"):
        assert launches == 0, f"{launches} launches, though no kernel takes these arguments"
    else:
        assert launches > 0, "no kernel was launched: another form answered in its place"


@pytest.fixture
def launched(runner: None) -> Callable[[], Counter[str]]:
    """Tells how often each kernel was launched since the test began, by the name of its `Kernel`."""
    before = offmetal.launches()

    def since() -> Counter[str]:
        now = offmetal.launches() - before
        return Counter({name.removeprefix("moelocal_"): count for name, count in now.items()})

    return since
