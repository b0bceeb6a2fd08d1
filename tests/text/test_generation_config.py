"""The stop set and the recommended sampling of a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.errors import ConfigError
from moelocal.text.generation_config import GenerationDefaults


def write(folder: Path, content: object) -> Path:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(content))
    return path


def test_both_files_name_stop_tokens(tmp_path: Path) -> None:
    # The published file of Qwen3.6; its config.json names 248044 alone.
    write(
        tmp_path,
        {
            "bos_token_id": 248044,
            "do_sample": True,
            "eos_token_id": [248046, 248044],
            "pad_token_id": 248044,
            "temperature": 1.0,
            "top_k": 20,
            "top_p": 0.95,
            "transformers_version": "4.57.3",
        },
    )
    defaults = GenerationDefaults.open(tmp_path, [248044])
    assert defaults.stop_tokens == {248046, 248044}
    assert defaults.sampling == {"temperature": 1.0, "top_k": 20, "top_p": 0.95}


def test_without_the_file(tmp_path: Path) -> None:
    assert GenerationDefaults.open(tmp_path, [7, 8]) == GenerationDefaults(frozenset({7, 8}), {})


def test_one_stop_token_and_nulls(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token_id": 5, "temperature": None, "top_k": None})
    assert GenerationDefaults.open(tmp_path, []) == GenerationDefaults(frozenset({5}), {})


def test_no_sampling_means_temperature_zero(tmp_path: Path) -> None:
    write(tmp_path, {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1})
    assert GenerationDefaults.open(tmp_path, []).sampling == {"temperature": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a JSON object, found list"),
        ({"eos_token_id": "5"}, "eos_token_id must be a token id or a list of them, found '5'"),
        ({"eos_token_id": [True]}, "eos_token_id must be a token id or a list of them, found [True]"),
        ({"eos_token_id": -1}, "eos_token_id must be a token id or a list of them, found -1"),
        ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
        ({"temperature": True}, "temperature must be a number, found True"),
        ({"top_p": float("nan")}, "top_p must be a number, found nan"),
        ({"top_k": 2.5}, "top_k must be an integer, found 2.5"),
        ({"do_sample": "no"}, "do_sample must be true or false, found 'no'"),
    ],
)
def test_bad_content(tmp_path: Path, content: object, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {message}")):
        GenerationDefaults.open(tmp_path, [])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "generation_config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: not readable as JSON")):
        GenerationDefaults.open(tmp_path, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("eos_token_id", "temperature", "top_k", "top_p", "do_sample", "min_p")


@given(content=st.dictionaries(st.sampled_from(KEYS), JSON) | JSON)
def test_any_json_is_read_or_refused(tmp_path: Path, content: object) -> None:
    write(tmp_path, content)
    try:
        defaults = GenerationDefaults.open(tmp_path, [1])
    except ConfigError:
        return
    assert 1 in defaults.stop_tokens
