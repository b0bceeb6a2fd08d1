"""The page: all pictures with what is known of them, in one HTML file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moelocal.pelican.gallery import Section
from moelocal.pelican.vote import Standing


def page(
    title: str,
    sections: Sequence[Section],
    standings: Sequence[Standing],
    remarks: Sequence[str],
    footer: str,
) -> str:
    """The page as HTML. What comes from models, prompts and files is escaped; pictures are data URIs of <img>, where a
    browser runs no script and loads nothing."""
    # imported here: only a page needs it
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("page.html.jinja").render(
        title=title, sections=sections, standings=standings, remarks=remarks, footer=footer
    )
    return text.replace("\0", "\ufffd")  # HTML has no NUL
