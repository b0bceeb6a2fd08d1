"""The page on which recorded and local answers stand side by side: one file, nothing in it is loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moelocal.cost import private
from moelocal.cost.sample import Pair

_TITLE: Final = b"<title>moelocal: recorded and local answers</title>"


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
    """Raises `RequestError` for a file that is there and is no page of ours."""
    private.require_own(file, _TITLE, "page of moelocal cost; name another file with --page")


def write(file: Path, text: str) -> None:
    """Write it whole or not at all, readable by its owner alone: it holds prompts. Raises `RequestError`, also for a
    file of somebody else's."""
    require_own(file)
    with private.writing(file) as write_to:
        write_to(text)
