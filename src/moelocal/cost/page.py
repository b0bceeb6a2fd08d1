"""The page on which recorded and local answers stand side by side: one file, nothing in it is loaded from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moelocal.cost.sample import Pair
from moelocal.errors import RequestError

_TITLE: Final = b"<title>moelocal: recorded and local answers</title>"
_HEAD: Final = 1024
"""Bytes of a page that hold its title."""


def render(pairs: Sequence[Pair], *, model: str, seed: int, offered: int, report: str, made: str) -> str:
    """The page. Everything that came from a log or a model is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("page.html.jinja")
    text = page.render(pairs=pairs, model=model, seed=seed, offered=offered, report=report, made=made)
    # half a surrogate pair, which JSON may hold, is no character
    return text.encode("utf-8", "replace").decode()


def require_own(file: Path) -> None:
    """Raises `RequestError` for a file that is there and is no page of ours: it would be lost."""
    try:
        if not file.exists():
            return
        if file.is_file():
            with file.open("rb") as stream:
                if _TITLE in stream.read(_HEAD):
                    return
    except OSError as error:
        raise RequestError(f"{file}: cannot be read: {error.strerror}") from None
    raise RequestError(
        f"{file}: is there already, and is no page of moelocal cost; name another file with --page, or move it away"
    )


def write(file: Path, text: str) -> None:
    """Write it whole or not at all, readable by its owner alone: it holds prompts. Raises `RequestError`, also for a
    file of somebody else's."""
    require_own(file)
    part = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        with os.fdopen(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as stream:
            stream.write(text)
        part.replace(file)
    except OSError as error:
        raise RequestError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
