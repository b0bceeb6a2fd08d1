"""A progress bar of what is over at once or takes minutes: on standard error, on a terminal alone, from the second
second on."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def late_bar(what: str, total: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """Takes how much of `total` was done since the last call, from any thread."""
    started, lock, done, bar = time.monotonic(), threading.Lock(), 0, None

    def advance(count: int) -> None:
        nonlocal bar, done
        with lock:
            done += count
            if bar is None and wanted and sys.stderr.isatty() and time.monotonic() - started > 1:
                # imported here: most are over before it would be shown
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True), transient=True)
                bar.add_task(what, total=total)
                bar.start()
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
