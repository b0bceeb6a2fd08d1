"""The progress bar of a conversion."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from moelocal.quantize.convert import WAITING, Report

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[Report]:
    """A bar with rate and time left on a terminal, nothing elsewhere."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda what, done, total: None
        return
    # imported here: other commands need not pay for it
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    bar: Progress | None = None
    current = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal bar, current
        if bar is not None and what != current:
            bar.stop()  # a download draws its own
            bar = None
        current = what
        if what == WAITING:
            return
        if bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            bar.add_task(what, total=total, completed=done)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()
