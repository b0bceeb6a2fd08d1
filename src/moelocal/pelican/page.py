"""The page: all pictures with what is known of them, in one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from moelocal.pelican.gallery import Section
from moelocal.pelican.vote import Standing

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE: Final = Path(__file__).with_name("page.html.jinja")


def page(
    title: str,
    sections: Sequence[Section],
    standings: Sequence[Standing],
    remarks: Sequence[str],
    footer: str,
) -> str:
    """The page as HTML. What comes from models, prompts and files is escaped; pictures are data URIs of <img>, where a
    browser runs no script and loads nothing."""
    return _template().render(
        title=title, sections=sections, standings=standings, remarks=remarks, footer=footer
    )


@cache
def _template() -> Template:
    # imported here: only a page needs it
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_TEMPLATE.read_text("utf-8"))
