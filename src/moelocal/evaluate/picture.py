"""What every picture needs: names as they are, and a file that is whole or not there."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from moelocal.whole import write_whole


def plain(name: str) -> str:
    """A name as matplotlib shows it: no formulas, and not hidden by a first underscore."""
    return name.replace("$", r"\$").lstrip("_") or "?"


def save(figure: Figure, file: Path, dpi: int = 150) -> None:
    """Write `figure` to `file`, whose name says the format. Raises `RequestError` if it cannot be written."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=dpi, format=file.suffix[1:])
    write_whole(file, drawn.getvalue())
