"""`Op`: one operation in several forms, and the only place that chooses between them.

reference   plain MLX, float32 inside, written for reading; the specification
portable    stock MLX calls, the fastest formulation; every device
host        NumPy and its BLAS, for many rows in float32 on the CPU device (docs/decisions/0001-host-form.md)
metal       our kernel, where there is a Metal device, `supports` says that the kernel takes these arguments, and it
            has earned its place on this machine (`choice.py`)

`with force("reference"):` or the environment variable `MOELOCAL_OPS` overrides the choice, for tests and bug reports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Generic, ParamSpec, TypeVar

import mlx.core as mx

from moelocal import metal as device
from moelocal.errors import RequestError
from moelocal.ops import choice
from moelocal.ops.host import one_thread

P = ParamSpec("P")
R = TypeVar("R")

FORMS: Final = ("auto", "reference", "portable", "metal")


def _checked(form: str, where: str) -> str:
    if form not in FORMS:
        raise RequestError(f"{where}: expected one of {', '.join(FORMS)}, got {form!r}")
    return form


_forced: str | None = None


def forced() -> str:
    """The override in effect, one of `FORMS`. Raises `RequestError` for a bad `MOELOCAL_OPS`."""
    global _forced
    if _forced is None:
        _forced = _checked(os.environ.get("MOELOCAL_OPS", "auto"), "MOELOCAL_OPS")
    return _forced


@contextmanager
def force(form: str) -> Iterator[None]:
    """Run every op in `form`, one of `FORMS`, inside the block; "metal" wherever a kernel can run, earned or not.
    Raises `RequestError`."""
    global _forced
    before = forced()
    _forced = _checked(form, "force")
    try:
        yield
    finally:
        _forced = before


Observer = Callable[["Op[..., Any]", tuple[Any, ...]], None]

_observer: Observer | None = None


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Inside the block every call of an op first calls `observer(op, args)` with its positional arguments, whatever
    form it then takes. Calls that the observer makes itself are not observed, and of two blocks the inner one counts.

    A compiled step (`Block.step`) calls its ops when it is traced, not when it runs: observe `Block.__call__`.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def _show(op: Op[..., Any], args: tuple[Any, ...]) -> None:
    """Call the observer, with nobody observing meanwhile."""
    global _observer
    if (observer := _observer) is None:
        return
    _observer = None
    try:
        observer(op, args)
    finally:
        _observer = observer


def setting() -> Hashable:
    """What the forms of ops depend on besides their arguments: a traced function has those of one setting."""
    form = forced()
    chosen = choice.current() if form == "auto" and device.available() else None
    return form, chosen, device.executor()


def on_cpu() -> bool:
    """Whether MLX computes on the CPU device."""
    return bool(mx.default_device() == mx.cpu)


class Op(Generic[P, R]):
    """One operation. `host_when` says for which arguments the host form is the fastest, `supports` which the kernel
    can take, `key` what the choice of a form depends on besides: with one key there is one form."""

    def __init__(
        self,
        name: str,
        *,
        reference: Callable[P, R],
        portable: Callable[P, R],
        host: Callable[P, R] | None = None,
        host_when: Callable[P, bool] | None = None,
        metal: Callable[P, R] | None = None,
        supports: Callable[P, bool] | None = None,
        key: Callable[P, Hashable] = choice.shapes,
    ) -> None:
        self.name = name
        self.reference = reference
        self.portable = portable
        self.host = host
        self._host_when = host_when
        self.metal = metal
        self.supports = supports
        self.key = key

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if _observer is not None:
            _show(self, args)
        form = forced()
        if form == "reference":
            return self.reference(*args, **kwargs)
        if (
            self.metal is not None
            and form != "portable"
            and device.available()
            and (form == "metal" or self._earned(*args, **kwargs))
            and (self.supports is None or self.supports(*args, **kwargs))
        ):
            return self.metal(*args, **kwargs)
        if (
            form == "auto"
            and self.host is not None
            and self._host_when is not None
            and self._host_when(*args, **kwargs)
            and on_cpu()
        ):
            with one_thread():
                return self.host(*args, **kwargs)
        return self.portable(*args, **kwargs)

    def _earned(self, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the kernel is what this machine takes for such arguments. Called with every token: no key is made for
        an op that takes its kernel for none."""
        chosen = choice.current()
        return self.name in chosen.ops and chosen.takes_metal(self.name, self.key(*args, **kwargs))
