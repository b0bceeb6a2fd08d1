"""Small tokenizers, trained once per run, and the templates of real models."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelocal.text.tokenizer import Tokenizer
from text.small_tokenizers import trained_byte_level, trained_sentencepiece


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_level")
    trained_byte_level().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Llama's: no normalization, a space before the text, white space kept."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = trained_sentencepiece(normalization_rule_name="identity", remove_extra_whitespaces=False)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.open(byte_level_folder)


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_folder: Path) -> Tokenizer:
    return Tokenizer.open(sentencepiece_folder)


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each kind of tokenizer in turn."""
    chosen: Tokenizer = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture(scope="session")
def templates() -> Path:
    """The folder of real templates and their renderings, beside the checkout and not part of it."""
    folder = Path(__file__).parents[3] / "shared" / "reference" / "templates"
    if not folder.is_dir():
        pytest.skip("the reference templates (../shared/reference/templates) are not on this machine")
    return folder
