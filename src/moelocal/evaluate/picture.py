"""What every picture needs: names as they are, and a file that is whole or not there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from matplotlib.figure import Figure

from moelocal.errors import RequestError


def plain(name: str) -> str:
    """A name as matplotlib shows it: no formulas, and not hidden by a first underscore."""
    return name.replace("$", r"\$").lstrip("_") or "?"


def save(figure: Figure, file: Path, dpi: int = 150) -> None:
    """Write `figure` to `file`, whose name says the format. Raises `RequestError` if it cannot be written."""
    part = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        figure.savefig(part, dpi=dpi)
        part.replace(file)
    except OSError as error:
        raise RequestError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # where there is no folder any more
            part.unlink(missing_ok=True)
