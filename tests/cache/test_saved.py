"""A timeline in a file of its own."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.timelines import extend, made, same
from moelocal.cache.file import Packed, read
from moelocal.cache.saved import load, save
from moelocal.errors import RequestError

TOKENS = np.random.default_rng(8).integers(0, 500, 1000).tolist()
LOGITS = mx.random.normal((7,))


def test_what_was_saved_goes_on(tmp_path: Path):
    path = tmp_path / "session"
    for position in (1, 256, 700):
        cache = made(TOKENS[:position])
        save(path, "f", TOKENS[:position], cache, LOGITS)
        tokens, loaded, logits = load(path, "f")
        assert mx.array_equal(logits, LOGITS)
        assert tokens == TOKENS[:position] and same(loaded, cache) and loaded.chunks == cache.chunks
        for each in (cache, loaded):
            extend(each, TOKENS[:position], TOKENS[position : position + 300])
        assert same(loaded, cache)
    assert os.listdir(tmp_path) == ["session"]  # noqa: PTH208
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_saved_or_loaded_is_an_error(tmp_path: Path):
    path = tmp_path / "session"
    cache = made(TOKENS[:300])
    for action, message in (
        (lambda: load(path, "f"), f"{path}: cannot be read: No such file or directory"),
        (lambda: load(tmp_path, "f"), f"{tmp_path}: cannot be read: Is a directory"),
        (
            lambda: save(path / "x", "f", TOKENS[:300], cache, LOGITS),
            f"{path / 'x'}: cannot be written: No such file or directory",
        ),
        (
            lambda: save(Path(), "f", TOKENS[:300], cache, LOGITS),
            "save: expected the name of a file, got '.'",
        ),
        (
            lambda: save(path, "f", TOKENS[:299], cache, LOGITS),
            "snapshot: expected the 300 tokens of the timeline, got 299",
        ),
    ):
        with pytest.raises(RequestError) as caught:
            action()
        assert str(caught.value) == message
    save(path, "f", TOKENS[:300], cache, LOGITS)
    with pytest.raises(RequestError) as caught:
        load(path, "g")
    assert str(caught.value) == (
        f"{path}: saved with other weights, settings or another version of moelocal or MLX: expected g, got f; "
        "read its messages again in a new session"
    )
    metadata, content = read(path)
    Packed.of(content, {**metadata, "version": "0"}).write(path)
    with pytest.raises(RequestError) as caught:
        load(path, "f")
    assert str(caught.value) == f"{path}: expected a saved session of version 2, got version 0"


@given(st.integers(0, 1 << 20), st.integers(1, 255), st.booleans())
def test_a_damaged_file_is_an_error_and_nothing_else(place: int, bits: int, cut: bool):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session"
        save(path, "f", TOKENS[:30], made(TOKENS[:30]), LOGITS)
        content = bytearray(path.read_bytes())
        place %= len(content)
        if cut:
            del content[place:]
        else:
            content[place] ^= bits
        path.write_bytes(content)
        try:
            tokens, cache, logits = load(path, "f")
        except RequestError as error:
            assert str(error).startswith(f"{path}: damaged, or no saved session: ")
        else:  # a space of the header that became another
            assert bits < 0x30 and not cut and same(cache, made(TOKENS[:30])) and tokens == TOKENS[:30]
            assert mx.array_equal(logits, LOGITS)
