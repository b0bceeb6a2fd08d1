"""The stored reference: made once, used again, never stale, never damaged, never half."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import CheckpointError, NumericsError, RequestError
from moelocal.evaluate import reference as module
from moelocal.evaluate.reference import Reference, Stamp, obtain
from moelocal.ops.op import force
from moelocal.quantize.corpus import Corpus
from parity.checkpoints import SMALL, Recipe, tokens, write

CORPUS = Corpus(
    "random", tuple(tuple(map(int, tokens(n, 96, seed))) for seed, n in enumerate((30, 12, 7))), ("text",) * 3
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("original") / "model", Recipe("qwen3_5_moe", **SMALL), shards=2)


class Runs:
    """`obtain` with what it reported and noted."""

    def __init__(self) -> None:
        self.reported: list[tuple[int, int]] = []
        self.noted: list[str] = []

    def __call__(self, folder: Path, corpus: Corpus = CORPUS, dtype: mx.Dtype = mx.float32) -> Reference:
        self.reported.clear()
        checkpoint = Checkpoint.open(folder, ModelConfig.read(folder))
        return obtain(checkpoint, corpus, dtype, lambda *at: self.reported.append(at), self.noted.append)


@pytest.fixture
def run() -> Runs:
    return Runs()


def content(reference: Reference) -> list[dict[str, np.ndarray]]:
    found = []
    for number in range(len(CORPUS.sequences)):
        kept, experts = reference.read(number)
        arrays = {f.name: getattr(kept, f.name) for f in fields(kept)}
        found.append(arrays | {str(layer): chosen for layer, chosen in experts.items()})
    return found


def assert_same(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine.keys() == yours.keys()
        assert all(np.array_equal(mine[name], yours[name]) for name in mine)


def test_the_second_evaluation_does_not_run_the_reference_again(cache, folder, run):
    first = run(folder)
    assert not first.reused
    # 3 sequences through 4 layers and the head
    assert run.reported == [(done, 15) for done in range(1, 16)]
    before = content(first)
    second = run(folder)
    assert second.reused and run.reported == [] and run.noted == []
    assert_same(content(second), before)
    assert second.nbytes == sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    assert [path.name for path in cache.iterdir()] == [second.stamp.folder.name]


def test_what_is_kept_has_the_positions_of_the_corpus(cache, folder, run):
    reference = run(folder)
    for number, ids in enumerate(CORPUS.sequences):
        kept, experts = reference.read(number)
        assert len(kept.counts) == len(kept.tails) == len(kept.top) == len(kept.targets) == len(ids) - 1
        assert len(kept.ids) == len(kept.logprobs) == kept.counts.sum()
        assert sorted(experts) == [0, 1, 2, 3]
        assert all(chosen.shape == (len(ids), 2) and chosen.dtype == np.uint16 for chosen in experts.values())


def test_another_text_dtype_form_or_version_is_another_reference(cache, folder, run, monkeypatch):
    stamps = [run(folder).stamp]
    shorter = Corpus("random", CORPUS.sequences[:2], CORPUS.kinds[:2])
    stamps += [run(folder, shorter).stamp, run(folder, dtype=mx.bfloat16).stamp]
    with force("reference"):
        stamps.append(run(folder).stamp)
    monkeypatch.setattr("moelocal.__version__", "99.0")
    stamps.append(run(folder).stamp)
    assert len({stamp.folder for stamp in stamps}) == len(list(cache.iterdir())) == 5


def test_other_sources_are_another_reference(cache, folder, monkeypatch):
    stamps = [Stamp.of(folder, CORPUS, mx.float32)]
    for pattern in module._MODULES:
        assert list(Path(module.moelocal.__file__).parent.glob(pattern)), f"{pattern} names no file"
        with monkeypatch.context() as patch:
            patch.setattr(module, "_MODULES", tuple(p for p in module._MODULES if p != pattern))
            stamps.append(Stamp.of(folder, CORPUS, mx.float32))
    assert len({stamp.folder for stamp in stamps}) == len(module._MODULES) + 1


def changed(folder: Path, how: str) -> None:
    """Change a checkpoint in place; only for "touched" its values stay."""
    file = sorted(folder.glob("*.safetensors"))[0]
    before = file.stat()
    match how:
        case "touched":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        case "config":
            config = folder / "config.json"
            config.write_text(config.read_text().replace("1e-06", "1e-05"))
        case "content at the same time":
            data = bytearray(file.read_bytes())
            data[-4000:] = bytes(4000)
            file.write_bytes(data)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "name":
            shutil.move(file, file.with_name("model-other.safetensors"))
            index = folder / "model.safetensors.index.json"
            index.write_text(index.read_text().replace(file.name, "model-other.safetensors"))


@pytest.mark.parametrize("how", ["touched", "config", "content at the same time", "name"])
def test_changed_weights_are_another_reference(cache, folder, tmp_path, how):
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    before = Stamp.of(mine, CORPUS, mx.float32)
    assert Stamp.of(mine, CORPUS, mx.float32) == before
    changed(mine, how)
    after = Stamp.of(mine, CORPUS, mx.float32)
    assert after.weights != before.weights and after.folder != before.folder


def test_the_same_files_under_another_path_are_the_same_reference(cache, folder, tmp_path):
    copied = tmp_path / "elsewhere"
    shutil.copytree(folder, copied)  # with the times of the files
    assert Stamp.of(copied, CORPUS, mx.float32) == Stamp.of(folder, CORPUS, mx.float32)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, folder):
    """One reference for many examples of damage, and what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELOCAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        reference = Runs()(folder)
        yield reference, content(reference)


@given(data=st.data())
def test_any_damage_is_noticed(stored, data):
    reference, before = stored
    file = reference.stamp.folder / "sequence-00001.safetensors"
    honest = file.read_bytes()
    if data.draw(st.booleans(), "cut off"):
        file.write_bytes(honest[: data.draw(st.integers(0, len(honest) - 1))])
    else:
        at, mask = data.draw(st.integers(0, len(honest) - 1)), data.draw(st.integers(1, 255))
        file.write_bytes(honest[:at] + bytes([honest[at] ^ mask]) + honest[at + 1 :])
    try:
        assert_same(content(reference), before)  # such as a space of the header that became a tab
    except CheckpointError as error:
        assert str(file) in str(error)
    finally:
        file.write_bytes(honest)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "foreign", "empty folder"])
def test_a_damaged_reference_is_computed_again_and_that_is_said(cache, folder, run, damage):
    first = run(folder)
    before = content(first)
    place = first.stamp.folder
    file = place / "sequence-00002.safetensors"
    data = file.read_bytes()
    match damage:
        case "cut":
            file.write_bytes(data[:-10])
            reason = " is cut off or malformed"
        case "flipped":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            reason = ": its checksum does not fit its content"
        case "missing":
            file.unlink()
            reason = " is missing"
        case "foreign":
            shutil.copy(place / "sequence-00001.safetensors", file)
            reason = ": its checksum does not fit its content"
        case "empty folder":
            shutil.rmtree(place)
            place.mkdir()
            file, reason = place / "sequence-00000.safetensors", " is missing"
    again = run(folder)
    assert not again.reused and len(run.reported) == 15
    (line,) = run.noted
    assert line == f"the stored reference is damaged and is computed again: {file}{reason}"
    assert_same(content(again), before)
    assert run(folder).reused


def test_a_reference_of_another_stamp_in_its_place_is_refused(cache, folder, run):
    first, second = run(folder), run(folder, dtype=mx.bfloat16)
    shutil.rmtree(second.stamp.folder)
    shutil.copytree(first.stamp.folder, second.stamp.folder)
    again = run(folder, dtype=mx.bfloat16)
    assert not again.reused and len(run.noted) == 1


def test_an_error_in_the_middle_leaves_nothing(cache, folder, run, monkeypatch):
    honest, written = module._write, []

    def fails(*args):
        honest(*args)
        written.append(args)
        if len(written) == 2:
            raise NumericsError("in the middle")

    monkeypatch.setattr(module, "_write", fails)
    with pytest.raises(NumericsError):
        run(folder)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(module, "_write", honest)
    assert not run(folder).reused


PROGRAM = """
import json, os, resource, signal, sys
from pathlib import Path
import mlx.core as mx
from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import RequestError
from moelocal.evaluate import reference
from moelocal.quantize.corpus import Corpus

honest = reference._write
def dies(*args):
    honest(*args)
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "killed":
    reference._write = dies
else:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
folder, corpus = Path(sys.argv[2]), Corpus("random", json.loads(sys.argv[3]), ["text"] * 3)
try:
    reference.obtain(Checkpoint.open(folder, ModelConfig.read(folder)), corpus, mx.float32)
except RequestError as error:
    print(error)
"""


def in_a_process_of_its_own(how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, how, str(folder), json.dumps(CORPUS.sequences)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_killed_run_leaves_no_reference_and_the_next_one_clears_up(cache, folder, run):
    assert in_a_process_of_its_own("killed", folder).returncode == -9
    (left,) = cache.iterdir()
    assert left.name.endswith(".part")
    (cache / "notes.part").touch()  # not ours
    assert not run(folder).reused
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        [run(folder).stamp.folder.name, "notes.part"]
    )


def test_what_another_process_is_writing_is_left_alone(cache, folder, run):
    other = cache / f"{'0' * 32}.{os.getppid()}.part"
    other.mkdir(parents=True)
    run(folder)
    assert other.is_dir()


def test_where_another_process_was_faster_its_result_stays(cache, folder, run, monkeypatch):
    honest = module._write

    def slow(part, stamp, *args):
        honest(part, stamp, *args)
        stamp.folder.mkdir(exist_ok=True)
        (stamp.folder / "by the other").touch()

    monkeypatch.setattr(module, "_write", slow)
    stamp = run(folder).stamp
    assert [path.name for path in stamp.folder.iterdir()] == ["by the other"]
    assert [path.name for path in cache.iterdir()] == [stamp.folder.name]


def test_a_full_disk_is_said_with_what_to_do(cache, folder):
    done = in_a_process_of_its_own("no room", folder)
    assert done.returncode == 0, done.stderr
    place, _, rest = done.stdout.partition(": the reference cannot be written: ")
    assert Path(place).parent == cache and place.endswith(".part")
    assert rest.endswith("; free some space, or name another folder for the cache with MOELOCAL_CACHE\n")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_said(tmp_path, folder, run, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOELOCAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError) as caught:
        run(folder)
    place, _, rest = str(caught.value).partition(": ")
    assert Path(place).parent == tmp_path / "file" / "references"
    assert rest == (
        "the reference cannot be written: Not a directory; free some space, or name another folder for the cache "
        "with MOELOCAL_CACHE"
    )


def test_equal_stamps_are_equal_references(cache, folder):
    stamp = Stamp.of(folder, CORPUS, mx.float32)
    assert stamp.folder.parent == cache
    for field in fields(stamp):
        value = getattr(stamp, field.name)
        other = replace(stamp, **{field.name: value + "x" if isinstance(value, str) else value * 2})
        assert other.folder != stamp.folder
