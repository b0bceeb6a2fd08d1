"""Interrupted conversions: wherever the process dies, the same command finishes it with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelocal.errors import CheckpointError, MoelocalError, RequestError
from moelocal.quantize.calibrate import Calibration
from moelocal.quantize.convert import convert
from moelocal.quantize.corpus import Corpus
from moelocal.quantize.journal import Journal
from moelocal.quantize.recipe import Recipe
from parity.checkpoints import SMALL, tokens, write
from parity.checkpoints import Recipe as Random

MOE = Random("qwen3_5_moe", dtype="BF16", text_only=True, mtp=False, **SMALL)
RECIPE = "[formats]\ndefault = { bits = 4, group = 32 }\nrouter = { bits = 8, group = 32 }\n"

# Runs a conversion and kills itself at the given operation on files: in the middle of a write, before a sync, an open,
# a rename, a deletion. With 0 it says how many there are.
CHILD = """
import os, signal, sys
import moelocal.hub
from moelocal.quantize.convert import convert
from moelocal.quantize.recipe import Recipe

source, to, recipe, delete, last = *sys.argv[1:4], "delete" in sys.argv[4], int(sys.argv[5])
calibrator = None
if "calibrated" in sys.argv[4]:
    sys.path.insert(0, sys.argv[6])
    from quantize.test_resume import calibration
    calibrator = calibration()
count = 0

def reached():
    global count
    count += 1
    return count == last

operations = "open os.rename os.remove os.rmdir os.mkdir os.truncate os.symlink shutil.copyfile".split()

def watch(event, args):
    if event in operations and reached():
        os.kill(os.getpid(), signal.SIGKILL)

write, sync = os.pwrite, os.fsync

def half(fd, data, offset):
    if reached():
        write(fd, data[: len(data) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(fd, data, offset)

def unsynced(fd):
    if reached():
        os.kill(os.getpid(), signal.SIGKILL)
    sync(fd)

os.pwrite, os.fsync = half, unsynced
recipe = Recipe.open(recipe)
sys.addaudithook(watch)
convert(source, to, recipe, method="minmax", delete_source=delete, calibrator=calibrator)
print(count)
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def calibration() -> Calibration:
    """On two short texts of random tokens."""
    texts = tuple(tuple(tokens(length, MOE.vocab, seed=length).tolist()) for length in (40, 25))
    return Calibration(Corpus("random tokens", texts, ("text",) * 2))


def child(source: Path, to: Path, recipe: Path, how: str, last: int) -> subprocess.CompletedProcess[str]:
    arguments = [source, to, recipe, how, str(last), Path(__file__).parents[1]]
    return subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False, env=os.environ
    )


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kill_and_resume(tmp_path: Path, recipe: Path, rounds: int, seed: int, calibrated: bool = False) -> None:
    """`rounds` conversions that die at random operations, some of them more than once."""

    def whole(to: Path, delete: bool = False) -> None:
        calibrator = calibration() if calibrated else None
        convert(source, to, Recipe.open(recipe), method="minmax", delete_source=delete, calibrator=calibrator)

    kind = "calibrated" if calibrated else "plain"
    random = np.random.RandomState(seed)
    original = write(tmp_path / "original", MOE)
    source = tmp_path / "source"
    shutil.copytree(original, source)
    whole(tmp_path / "whole")
    expected = content(tmp_path / "whole")
    full = child(source, tmp_path / "counted", recipe, kind, 0)
    assert full.returncode == 0, full.stderr
    operations = int(full.stdout)
    assert operations > 300 and content(tmp_path / "counted") == expected
    for number in range(rounds):
        to, delete = tmp_path / f"out{number}", bool(number % 2)
        how = f"{kind} delete" if delete else kind
        died = child(source, to, recipe, how, int(random.randint(1, operations)))
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (to / "config.json").exists() or content(to).items() >= expected.items(), "not whole"
        if number % 3 == 2:
            child(source, to, recipe, how, int(random.randint(1, operations)))
        whole(to, delete)
        assert content(to) == expected
        if delete:
            assert list(source.glob("*.safetensors")) == []
            shutil.copytree(original, source, dirs_exist_ok=True)
        shutil.rmtree(to)


def test_the_result_of_a_killed_conversion_is_the_same(tmp_path, recipe):
    kill_and_resume(tmp_path, recipe, rounds=3, seed=1)


@pytest.mark.slow
def test_the_result_of_fifty_killed_conversions_is_the_same(tmp_path, recipe):
    kill_and_resume(tmp_path, recipe, rounds=50, seed=2)


@pytest.mark.slow
def test_the_result_of_killed_calibrated_conversions_is_the_same(tmp_path, recipe):
    kill_and_resume(tmp_path, recipe, rounds=12, seed=3, calibrated=True)


@pytest.mark.parametrize("number", [1, 40, 90])
def test_a_full_disk_is_said_and_the_rerun_completes(tmp_path, recipe, monkeypatch, number):
    source, opened = write(tmp_path / "source", MOE), Recipe.open(recipe)
    convert(source, tmp_path / "whole", opened, method="minmax")
    writes = 0
    write_at = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_at(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", opened, method="minmax")
    work = tmp_path / "out" / ".conversion"
    named = work / "model.safetensors" if number > 1 else work
    assert str(caught.value) == (
        f"{named}: no space left on the disk. What was written is kept: free some space and run the same command again"
    )
    finished = len((work / "journal").read_bytes().splitlines()) - 1
    assert finished > 0 or number == 1
    monkeypatch.undo()
    convert(source, tmp_path / "out", opened, method="minmax")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.fixture
def interrupted(tmp_path, recipe, monkeypatch) -> tuple[Path, Path]:
    """Source and folder of a conversion that stopped after some pieces."""
    source = write(tmp_path / "source", MOE)
    add = Journal.add

    def stop(self: Journal, piece: str, checksum: int) -> None:
        add(self, piece, checksum)
        if len(self.pieces) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", Recipe.open(recipe), method="minmax")
    monkeypatch.undo()
    return source, tmp_path / "out"


def test_finished_pieces_are_not_made_again(interrupted, recipe, tmp_path, monkeypatch):
    source, to = interrupted
    made = []
    add = Journal.add
    monkeypatch.setattr(Journal, "add", lambda self, *args: (made.append(args[0]), add(self, *args)))
    journal = (to / ".conversion" / "journal").read_text().splitlines()
    convert(source, to, Recipe.open(recipe), method="minmax")
    assert len(journal) == 21
    assert not {json.loads(line)[0] for line in journal[1:]} & set(made)


def test_pieces_whose_bytes_have_changed_are_made_again(interrupted, recipe, tmp_path):
    source, to = interrupted
    convert(source, tmp_path / "whole", Recipe.open(recipe), method="minmax")
    file = to / ".conversion" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 3 :] = bytes(len(data) - len(data) // 3)  # as after a loss of power
    file.write_bytes(data)
    convert(source, to, Recipe.open(recipe), method="minmax")
    assert content(to) == content(tmp_path / "whole")


def test_a_torn_line_of_the_journal_is_dropped(interrupted, recipe, tmp_path):
    source, to = interrupted
    convert(source, tmp_path / "whole", Recipe.open(recipe), method="minmax")
    with (to / ".conversion" / "journal").open("ab") as stream:
        stream.write(b'["layers.3.mlp.ga')
    convert(source, to, Recipe.open(recipe), method="minmax")
    assert content(to) == content(tmp_path / "whole")


def test_a_line_of_the_journal_that_the_disk_takes_half_of_is_no_finished_piece(tmp_path):
    folder = tmp_path / "out" / ".conversion"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal", {})
    journal.add("first", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the system writes up to the limit, says how much that was, and refuses only what comes after
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(CheckpointError):
            journal.add("second", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(journal.pieces) == ["first"] == list(Journal(folder / "journal", {}).pieces)


def refused(kind: type[MoelocalError], message: str, *args: Any, **more: Any) -> None:
    with pytest.raises(MoelocalError) as caught:
        convert(*args, **more)
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_another_conversion_does_not_go_on_with_this_one(interrupted, recipe, tmp_path):
    source, to = interrupted
    before = content(to)
    rest = "finish it with the command that began it, delete the folder, or choose another one with --to"
    opened = Recipe.open(recipe)
    refused(
        RequestError, f"{to}: holds an unfinished conversion with another method; {rest}",
        source, to, opened, method="search",
    )  # fmt: skip
    recipe.write_text(RECIPE.replace("8", "6"))
    refused(
        RequestError, f"{to}: holds an unfinished conversion with another recipe; {rest}",
        source, to, Recipe.open(recipe), method="minmax",
    )  # fmt: skip
    refused(
        RequestError, f"{to}: holds an unfinished conversion with another target size; {rest}",
        source, to, opened, method="minmax", target=100_000,
    )  # fmt: skip
    assert content(to) == before


def test_a_damaged_journal_is_said(interrupted, recipe):
    source, to = interrupted
    journal = to / ".conversion" / "journal"
    journal.write_bytes(journal.read_bytes().replace(b'["', b"[", 1))
    refused(
        CheckpointError, f"{journal}: damaged; delete its folder and start again",
        source, to, Recipe.open(recipe), method="minmax",
    )  # fmt: skip
