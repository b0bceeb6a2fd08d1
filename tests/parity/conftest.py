"""Fixtures of the parity tests: a checkpoint folder per recipe, the original implementations on it, each
made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from parity.checkpoints import Recipe, write

if TYPE_CHECKING:
    from parity.originals import Transformers


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The folder of a recipe in its raw form, written at first use."""
    folders: dict[str, Path] = {}

    def folder_of(recipe: Recipe) -> Path:
        key = repr(recipe)
        if key not in folders:
            folders[key] = write(tmp_path_factory.mktemp("raw") / "model", recipe)
        return folders[key]

    return folder_of


@pytest.fixture(scope="session")
def originals() -> Callable[[Path], Transformers]:
    """transformers on a folder, loaded once."""
    from parity.originals import Transformers

    loaded: dict[Path, Transformers] = {}

    def on(folder: Path) -> Transformers:
        if folder not in loaded:
            loaded[folder] = Transformers(folder)
        return loaded[folder]

    return on
