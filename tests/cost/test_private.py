"""Files for their owner alone: whole or as they were, and never over somebody else's."""

from __future__ import annotations

import resource
import stat

import pytest

from moelocal.cost import private
from moelocal.errors import RequestError


def test_the_file_is_there_when_all_is_written_and_for_its_owner_alone(tmp_path):
    file = tmp_path / "list.jsonl"
    file.write_text("old")
    with private.writing(file) as write:
        write("new ")
        write("text")
        assert file.read_text() == "old"
    assert file.read_text() == "new text"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_stopped_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "list.jsonl"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), private.writing(file) as write:
        write("new")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("count", [1, 1_000])  # seen when it is closed, and while it is written
def test_a_full_disk_says_so_and_leaves_the_file_as_it_was(tmp_path, count):
    file = tmp_path / "list.jsonl"
    file.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(RequestError) as caught, private.writing(file) as write:
            for _ in range(count):
                write("x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == f"{file}: cannot be written: File too large"
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_empty_file_may_go_and_one_with_the_mark(tmp_path):
    file = tmp_path / "file"
    private.require_own(file, b"mark", "x")
    for content in ("", "a mark at its head"):
        file.write_text(content)
        private.require_own(file, b"mark", "x")
    file.write_text("mine")
    with pytest.raises(RequestError) as caught:
        private.require_own(file, b"mark", "list; name another one")
    assert str(caught.value) == f"{file}: is there already, and is no list; name another one, or move it away"
