"""The name of what a state depends on: another one for every change of the weights, without reading them every time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moelocal
from moelocal import machine, metal
from moelocal.engine import fingerprint as module
from moelocal.engine.fingerprint import Stamp, fingerprint, stamps
from moelocal.errors import CheckpointError

EMBEDDED = Path(moelocal.__file__).parent / "embedded"
CONFIG = moelocal.load().config
SMALL = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint whose two weight files are short: a fingerprint does not look into them."""
    made = tmp_path / "model"
    made.mkdir()
    shutil.copy(EMBEDDED / "config.json", made)
    for index in (1, 2):
        (made / f"model-{index}.safetensors").write_bytes(bytes([index]) * SMALL)
    return made


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that were read."""
    names, original = list[str](), module._sha256

    def noted(stamp, *rest):
        names.append(stamp.path.name)
        return original(stamp, *rest)

    monkeypatch.setattr(module, "_sha256", noted)
    return names


def named(folder: Path, **loaded) -> str:
    return fingerprint(folder, mx.float32, CONFIG, None, **loaded)


def memos() -> list[Path]:
    return sorted((machine.cache_folder() / "hashes").iterdir())


@given(position=st.integers(0, SMALL - 1), flip=st.integers(1, 255))
@settings(max_examples=20, deadline=None)
def test_every_byte_counts_even_with_the_old_times(tmp_path_factory, position, flip):
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(EMBEDDED / "config.json", folder)
    file = folder / "model.safetensors"
    file.write_bytes(bytes(SMALL))
    before, times = named(folder), file.stat()
    with file.open("r+b") as stream:
        stream.seek(position)
        stream.write(bytes([flip]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert named(folder) != before


def test_the_second_time_nothing_is_read(folder, read):
    first = named(folder)
    assert sorted(read) == ["model-1.safetensors", "model-2.safetensors"]
    assert named(folder) == first and len(read) == 2


def test_a_touched_file_is_read_again_and_is_the_same(folder, read):
    first = named(folder)
    os.utime(folder / "model-1.safetensors", ns=(0, 0))
    assert named(folder) == first
    assert read[2:] == ["model-1.safetensors"]


@pytest.mark.parametrize("same", [False, True])
def test_a_file_that_took_the_place_of_one_as_long_and_as_old(folder, read, same):
    first, file = named(folder), folder / "model-1.safetensors"
    times, content = file.stat(), file.read_bytes()
    other = folder / "other"
    other.write_bytes(content if same else content[::-1][1:] + b"x")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(file)
    assert (named(folder) == first) is same
    assert read[2:] == ["model-1.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda memo: b"",
        lambda memo: b"{",
        lambda memo: b"\xff\xfe",
        lambda memo: b"[" * 100_000,
        lambda memo: b"[]",
        lambda memo: json.dumps(memo | {"sha256": "../x"}).encode(),
        lambda memo: json.dumps(memo | {"sha256": None}).encode(),
        lambda memo: json.dumps(memo | {"more": 1}).encode(),
        lambda memo: json.dumps(memo | {"path": "00"}).encode(),
    ],
)
def test_a_damaged_or_foreign_memo_is_not_believed_and_made_anew(folder, read, damage):
    first = named(folder)
    whole = {path: path.read_bytes() for path in memos()}
    for path, content in whole.items():
        path.write_bytes(damage(json.loads(content)))
    assert named(folder) == first and len(read) == 4
    assert {path: path.read_bytes() for path in memos()} == whole


def test_a_cache_that_cannot_be_written_costs_only_the_reading(folder, read):
    first = named(folder)
    shutil.rmtree(machine.cache_folder())
    machine.cache_folder().write_text("not a folder")
    assert named(folder) == first and named(folder) == first
    assert len(read) == 6


def test_a_file_of_the_hugging_face_cache_is_not_read(tmp_path, folder, read):
    plain = named(folder)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    for file in folder.glob("*.safetensors"):
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(blob)
    read.clear()
    assert named(folder) == plain and read == []


def test_a_file_that_is_only_called_like_a_hash_is_read(tmp_path, folder, read):
    file, named_so = folder / "model-1.safetensors", tmp_path / "blobs" / ("0" * 64)
    named_so.parent.mkdir()
    file.rename(named_so)
    file.symlink_to(named_so)
    named(folder)
    assert sorted(read) == ["0" * 64, "model-2.safetensors"]


def test_two_processes_at_once_agree_and_leave_whole_memos(folder, read):
    code = (
        "import sys, pathlib, mlx.core as mx\n"
        "from moelocal.engine.fingerprint import _contents, stamps\n"
        "for _ in range(20):\n"
        "    found = _contents(stamps(pathlib.Path(sys.argv[1]))[1:])\n"
        "print(*found)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    files = sorted(folder.glob("*.safetensors"))
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert [process.communicate()[0].split() for process in running] == [expected, expected]
    assert [path.suffix for path in memos()] == [".json", ".json"]
    named(folder)
    assert read == []


def test_weights_that_changed_since_they_were_loaded_are_refused(folder):
    loaded = stamps(folder)
    named(folder, loaded=loaded)
    (folder / "model-2.safetensors").write_bytes(b"other")
    message = f"{folder}: its files changed since the model was loaded, so its states cannot be named; load it again"
    with pytest.raises(CheckpointError) as caught:
        named(folder, loaded=loaded)
    assert str(caught.value) == message


def test_a_file_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    of, file = Stamp.of, folder.resolve() / "model-1.safetensors"

    def later(path):
        stamp = of(path)
        if path == file:
            os.utime(file, ns=(1, stamp.modified + 1))
        return stamp

    found = stamps(folder)
    monkeypatch.setattr(Stamp, "of", later)
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError) as caught:
        module._contents(found[1:])
    assert str(caught.value) == f"{file}: changed while it was read; load the model again"


def test_a_missing_file_is_an_error(folder):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        named(folder)
    assert str(caught.value) == f"{folder / 'config.json'}: cannot be read: No such file or directory"


def test_settings_and_versions_count(folder, tmp_path, monkeypatch):
    found = {
        named(folder),
        fingerprint(folder, mx.float16, CONFIG, None),
        fingerprint(folder, mx.float32, CONFIG, 8),
    }
    with monkeypatch.context() as patch:
        patch.setattr(np, "__version__", "0")
        found.add(named(folder))
    kernels = tmp_path / "kernels"
    shutil.copytree(metal.FOLDER, kernels)
    with monkeypatch.context() as patch:
        patch.setattr(metal, "FOLDER", kernels)
        first = named(folder)
        assert first in found  # no kernel runs here
        with metal.executing(lambda **_: None):
            found.add(named(folder))
            file = sorted(kernels.glob("*.metal"))[0]
            file.write_bytes(file.read_bytes() + b"\n")
            found.add(named(folder))
    assert len(found) == 6
