"""The source of a conversion, from folders and repositories, through ends of the process at any point."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hub.repos import NAME, SHARDS, WANTED, connected, environment, small_repo
from hub.server import Fault, Repo, Server
from moelocal import hub
from moelocal.checkpoint.files import read_entries
from moelocal.errors import CheckpointError, ModelNotFound, RequestError
from moelocal.quantize.shards import Shards
from moelocal.survey import survey
from moelocal.units import size
from parity.checkpoints import SMALL, Recipe, write

REPO = small_repo()
SMALL_FILES = sorted(set(WANTED) - set(SHARDS))


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The repository as a folder."""
    folder = tmp_path / "local"
    folder.mkdir()
    for name in WANTED:
        (folder / name).write_bytes(REPO.files[name])  # type: ignore[arg-type]
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[Server]:
    with connected(monkeypatch, tmp_path / "cache", small_repo()) as server:
        yield server


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return tmp_path / "work"


def present(shards: Shards) -> list[str]:
    """The shards whose bytes are here, all of them right; the others are stubs with the right header."""
    here = []
    for name in SHARDS:
        data = (shards.folder / name).read_bytes()
        right = REPO.files[name]
        assert isinstance(right, bytes)
        length = 8 + int.from_bytes(right[:8], "little")
        if data == right:
            here.append(name)
        else:
            assert data == right[:length].ljust(len(right), b"\0")
    names = {path.name for path in shards.folder.iterdir()}
    assert {name for name in names if not name.endswith(".link")} == set(
        WANTED
    )  # a link that is about to replace one
    for name in SMALL_FILES:
        assert (shards.folder / name).read_bytes() == REPO.files[name]
    assert [entry.file.name for entry in read_entries(shards.folder).values()] == SHARDS
    return here


def disk(folder: Path) -> int:
    """Bytes that the files of a folder take."""
    return sum(
        path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    )


# folders


def test_a_folder(local, work):
    with Shards.open(local, work) as shards:
        assert (shards.origin, shards.files) == (str(local), tuple(SHARDS))
        assert present(shards) == SHARDS
        shards.need(SHARDS[:2], soon=SHARDS[2])
        shards.done(SHARDS[0])
        assert present(shards) == SHARDS
        assert shards.room() == (shards.folder, 0)
    assert disk(work) < 100_000


def test_a_folder_whose_shards_are_deleted_after_use(local, work):
    with Shards.open(local, work, delete=True) as shards:
        shards.need([SHARDS[0]])
        shards.done(SHARDS[0])
        shards.done(SHARDS[0])
        assert present(shards) == SHARDS[1:]
        assert not (local / SHARDS[0]).exists()
        with pytest.raises(CheckpointError) as caught:
            shards.need([SHARDS[0]])
        assert str(caught.value) == (
            f"{local}/{SHARDS[0]}: deleted after it was converted, and now it is needed again: "
            "put it back, or begin again with another source"
        )
    with Shards.open(str(local), work, delete=True) as shards:  # a restart; the folder lacks a shard
        assert present(shards) == SHARDS[1:]
        for name in SHARDS:
            shards.done(name)
        assert present(shards) == []
    assert sorted(path.name for path in local.iterdir()) == SMALL_FILES
    assert disk(work) < 100_000


def test_a_shard_that_was_put_back_is_used_again(local, work):
    with Shards.open(local, work, delete=True) as shards:
        aside = shutil.copy2(local / SHARDS[0], local.parent)
        shards.done(SHARDS[0])
    shutil.move(aside, local / SHARDS[0])
    with Shards.open(local, work, delete=True) as shards:
        shards.need(SHARDS)
        assert present(shards) == SHARDS


def test_a_folder_of_links_is_emptied_with_what_it_links_to(local, work, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for name in SHARDS:
        shutil.move(local / name, store / name)
        (local / name).symlink_to(store / name)
    with Shards.open(local, work, delete=True) as shards:
        shards.done(SHARDS[1])
        assert present(shards) == [SHARDS[0], SHARDS[2]]
    assert sorted(path.name for path in store.iterdir()) == [SHARDS[0], SHARDS[2]]
    assert not (local / SHARDS[1]).is_symlink()


def test_an_end_between_the_removal_of_a_shard_and_of_its_link(local, work):
    Shards.open(local, work, delete=True).close()
    (local / SHARDS[2]).unlink()
    with Shards.open(local, work, delete=True) as shards:
        assert present(shards) == SHARDS[:2]


def test_an_end_before_the_skeleton_was_whole(local, work):
    Shards.open(local, work).close()
    (work / "source.json").unlink()
    (work / "skeleton" / SHARDS[0]).write_bytes(b"half")
    (work / "source" / f".{SHARDS[1]}.link").symlink_to("nowhere")
    with Shards.open(local, work) as shards:
        shards.need(SHARDS)
        (work / "source" / f".{SHARDS[1]}.link").unlink()
        assert present(shards) == SHARDS


def test_what_a_killed_process_left_of_another_source_is_not_part_of_this_one(local, work):
    (work / "skeleton").mkdir(parents=True)
    (work / "skeleton" / "added_tokens.json").write_text("{}")
    with Shards.open(local, work) as shards:
        assert present(shards) == SHARDS


def test_a_source_that_is_no_longer_noted_right(local, work):
    Shards.open(local, work).close()
    (work / "source.json").write_bytes(b"")  # as after a loss of power
    with pytest.raises(CheckpointError) as caught:
        Shards.open(local, work)
    assert str(caught.value) == f"{work}/source.json: damaged; delete its folder and start again"


def test_a_file_that_changes_in_the_middle(local, work):
    Shards.open(local, work).close()
    time.sleep(0.01)  # the time of change has to differ
    (local / SHARDS[0]).write_bytes(REPO.files[SHARDS[1]])
    with pytest.raises(CheckpointError) as caught:
        Shards.open(local, work)
    assert str(caught.value) == (
        f"{local}/{SHARDS[0]}: changed since its conversion began: put the old file back, or begin again"
    )


def test_the_config_is_the_one_of_the_beginning(local, work):
    Shards.open(local, work).close()
    (local / "config.json").write_text("changed")
    with Shards.open(local, work) as shards:
        assert (shards.folder / "config.json").read_bytes() == REPO.files["config.json"]


def test_another_source_in_the_same_work_folder(local, work, tmp_path, monkeypatch):
    Shards.open(local, work).close()
    other = Path(shutil.copytree(local, tmp_path / "other"))
    with pytest.raises(RequestError) as caught:
        Shards.open(other, work)
    assert str(caught.value) == (
        f"{work}: holds a conversion of {local}, and {other} was asked for: "
        "name another folder, or remove this one to begin again"
    )
    monkeypatch.chdir(tmp_path)
    Shards.open("local", work).close()  # the same by another name
    (tmp_path / "link").symlink_to(local)
    Shards.open(tmp_path / "link", work).close()


def test_bad_sources(local, work):
    with pytest.raises(ModelNotFound, match="no such folder; a model is a folder or a Hugging Face name"):
        Shards.open("nothing", work)
    (local / SHARDS[2]).write_bytes(b"cut off")
    with pytest.raises(CheckpointError) as caught:
        Shards.open(local, work)
    assert str(caught.value) == f"{local}/{SHARDS[2]}: only 7 bytes: cut off, or no safetensors file"
    assert not (work / "source.json").exists()


def test_a_survey_needs_headers_only(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL))
    with Shards.open(folder, tmp_path / "work", delete=True) as shards:
        for name in shards.files:
            shards.done(name)
        assert not list(folder.glob("*.safetensors"))
        after = survey(shards.folder)
    again = write(tmp_path / "again", Recipe("qwen3_5_moe", **SMALL))
    assert after == survey(again)


# repositories


def test_a_repository(server, work, tmp_path):
    with Shards.open(NAME, work) as shards:
        assert (shards.origin, shards.files) == (f"{NAME}@{REPO.commit}", tuple(SHARDS))
        assert present(shards) == []
        total = sum(REPO.size(name) for name in SHARDS)
        assert shards.room() == (tmp_path / "cache" / "models--owner--name", total)
        assert disk(work) < 100_000
        shards.need([SHARDS[1]])
        assert present(shards) == [SHARDS[1]]
        shards.need(SHARDS)
        for name in SHARDS:
            shards.done(name)
        assert present(shards) == SHARDS
        assert shards.room()[1] == 0
    assert disk(work) < 100_000
    server.requests.clear()
    hub.resolve(NAME, progress=False)  # kept for next time
    assert not server.gets()
    assert hub.resolve(NAME, offline=True)


def test_what_the_cache_has_is_not_downloaded(server, work, tmp_path):
    folder = hub.resolve(NAME, progress=False)
    server.requests.clear()
    with Shards.open(NAME, work, offline=True, delete=True) as shards:
        assert present(shards) == SHARDS
        shards.need(SHARDS)
        for name in SHARDS:
            shards.done(name)
    assert not server.requests
    assert all((folder / name).is_file() for name in SHARDS)


def test_soon_comes_meanwhile(server, work):
    with Shards.open(NAME, work) as shards:
        shards.need([SHARDS[0]], soon=SHARDS[1])
        deadline = time.monotonic() + 30
        while present(shards) != SHARDS[:2]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(server.gets(SHARDS[1])) == 2  # its header, and all of it
        shards.need([SHARDS[1]], soon=SHARDS[1])
        assert len(server.gets(SHARDS[1])) == 2


def test_a_shard_is_waited_for_that_is_on_its_way(server, work):
    with Shards.open(NAME, work) as shards:
        server.pace = 1_000_000.0
        shards.need([SHARDS[0]], soon=SHARDS[1])
        shards.need([SHARDS[1]], soon=SHARDS[2])
        assert present(shards)[:2] == SHARDS[:2]
        shards.need(SHARDS)
    assert [len(server.gets(name)) for name in SHARDS] == [2, 2, 2]


def test_deleting_holds_at_most_two_shards(server, work, tmp_path):
    most = 0
    with Shards.open(NAME, work, delete=True) as shards:
        assert shards.room() == (work / "downloads", sum(sorted(map(REPO.size, SHARDS))[-2:]))
        for name, soon in zip(SHARDS, [*SHARDS[1:], None], strict=True):
            shards.need([name], soon)
            assert (shards.folder / name).read_bytes() == REPO.files[name]
            most = max(most, disk(work))
            shards.done(name)
            shards.done(name)
        assert present(shards) == []
    assert most < 2 * REPO.size(SHARDS[0]) + 100_000
    assert disk(work) < 100_000
    assert disk(tmp_path / "cache") < 50_000
    with Shards.open(NAME, work, delete=True) as shards:  # nothing is asked for but what is needed once more
        server.requests.clear()
        for name in SHARDS:
            shards.done(name)
        assert not server.requests
        shards.need([SHARDS[1]])
        assert present(shards) == [SHARDS[1]]
        assert {request.path.rpartition("/")[2] for request in server.requests} == {SHARDS[1]}


def test_the_commit_stays_that_of_the_beginning(server, work):
    Shards.open(NAME, work).close()
    moved = small_repo(nbytes=1000, commit="d1" * 20)
    server.repos[NAME] = Repo(moved.files, "d1" * 20, ("main", "old"))
    with pytest.raises(RequestError) as caught:
        Shards.open(NAME, work, revision="d1" * 20)
    assert str(caught.value) == (
        f"{work}: holds a conversion of {NAME}@{REPO.commit}, and {NAME}@{'d1' * 20} was asked for: "
        "name another folder, or remove this one to begin again"
    )
    server.repos[NAME] = Repo(REPO.files, "d1" * 20, ("main", REPO.commit))
    server.requests.clear()
    with Shards.open(NAME, work) as shards:
        shards.need(SHARDS)
        assert present(shards) == SHARDS
    assert {request.path.split("/")[4] for request in server.gets()} == {REPO.commit}


def test_the_same_commit_by_another_name(server, work):
    Shards.open(NAME, work).close()
    server.repos[NAME].revisions = ("main", "v1")
    Shards.open(NAME, work, revision="v1").close()
    Shards.open(NAME, work, revision=REPO.commit).close()


def test_an_error_is_raised_where_the_shard_is_needed(server, work):
    with Shards.open(NAME, work) as shards:
        server.faults = [Fault(SHARDS[1], status=403, times=1000)]
        shards.need([SHARDS[0]], soon=SHARDS[1])
        with pytest.raises(ModelNotFound) as caught:
            shards.need([SHARDS[1]])
        assert str(caught.value).startswith(f"{NAME}: {SHARDS[1]}: 127.0.0.1:")
        server.faults.clear()
        shards.need([SHARDS[1]])
        assert present(shards) == SHARDS[:2]


def test_an_error_does_not_wait_for_the_others(server, work):
    with Shards.open(NAME, work) as shards:
        server.pace = 30_000.0  # ten seconds for a shard
        server.faults = [Fault(SHARDS[1], status=403)]
        started = time.monotonic()
        with pytest.raises(ModelNotFound, match="403"):
            shards.need(SHARDS[:2])
    assert time.monotonic() - started < 5


def test_soon_is_no_reason_to_fail(local, work):
    with Shards.open(local, work, delete=True) as shards:
        shards.done(SHARDS[1])
        shards.need([SHARDS[0]], soon=SHARDS[1])
        assert present(shards) == [SHARDS[0], SHARDS[2]]


def test_offline_after_the_beginning(server, work):
    with Shards.open(NAME, work) as shards:
        shards.need([SHARDS[0]])
    server.requests.clear()
    with Shards.open(NAME, work, offline=True) as shards:
        assert present(shards) == [SHARDS[0]]
        with pytest.raises(ModelNotFound) as caught:
            shards.need([SHARDS[1]])
    assert str(caught.value) == (
        f"{NAME}@{REPO.commit}: {SHARDS[1]} is not in the local cache, and offline was asked for"
    )
    assert not server.requests


@pytest.mark.parametrize("delete", [False, True])
def test_no_room_for_a_shard(server, work, tmp_path, monkeypatch, delete):
    with Shards.open(NAME, work, delete=delete) as shards:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        server.requests.clear()
        with pytest.raises(ModelNotFound) as caught:
            shards.need([SHARDS[0]])
        where = work / "downloads" if delete else tmp_path / "cache" / "models--owner--name"
        nbytes = REPO.size(SHARDS[0])
        assert str(caught.value).startswith(
            f"{NAME}: {size(nbytes)} must still be downloaded, but the disk of {where} has 1.0 kB free: "
            f"free {size(nbytes - 1000)} more"
        )
        assert not server.requests


def test_a_cache_that_was_emptied(server, work, tmp_path):
    with Shards.open(NAME, work) as shards:
        shards.need(SHARDS)
    shutil.rmtree(tmp_path / "cache")
    with Shards.open(NAME, work) as shards:
        assert present(shards) == []
        shards.need(SHARDS)
        assert present(shards) == SHARDS


def test_a_download_that_was_whole_before_its_link(server, work):
    with Shards.open(NAME, work, delete=True) as shards:
        shards.need([SHARDS[0]])
        shards._link(SHARDS[0], Path("..", "skeleton", SHARDS[0]))
        server.requests.clear()
        shards.need([SHARDS[0]])
        assert present(shards) == [SHARDS[0]]
        assert not server.requests


def test_closing_stops_a_download_that_is_continued_later(server, work):
    shards = Shards.open(NAME, work, delete=True)
    server.pace = 100_000.0
    shards.need([], soon=SHARDS[0])
    while not sum(path.stat().st_size for path in work.glob("downloads/*")):
        time.sleep(0.01)
    started = time.monotonic()
    shards.close()
    assert time.monotonic() - started < 1
    server.pace = None
    with Shards.open(NAME, work, delete=True) as shards:
        shards.need([SHARDS[0]])
        assert present(shards) == [SHARDS[0]]
    assert server.gets(SHARDS[0])[-1].range not in (None, "bytes=0-")


PROGRAM = """
import sys
from pathlib import Path
from moelocal.quantize.shards import Shards
shards = Shards.open(sys.argv[1], Path(sys.argv[2]), delete=True)
names = list(shards.files)
for name, soon in zip(names, [*names[1:], None]):
    shards.need([name], soon)
    data = (shards.folder / name).read_bytes()
    (Path(sys.argv[2]) / (name + ".writing")).write_bytes(data)
    (Path(sys.argv[2]) / (name + ".writing")).replace(Path(sys.argv[2]) / (name + ".converted"))
    shards.done(name)
shards.close()
"""


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_at_any_moment(server, work, kills):
    """kill -9 while shards come, are used and deleted; each reopening finds every shard whole or a stub."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    variables |= environment(server, work.parent / "cache")
    server.pace = 3 * REPO.size(SHARDS[0]) / kills
    arguments = [sys.executable, "-c", PROGRAM, NAME, work]

    def moments() -> Iterator[float]:
        for k in range(kills):
            yield 0.05 + 0.37 * (k * 0.618 % 1)

    for moment in moments():
        before = server.sent
        process = subprocess.Popen(arguments, env=variables, stderr=subprocess.PIPE)
        while server.sent == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        if (work / "source.json").exists():
            with Shards.open(NAME, work, delete=True) as shards:
                present(shards)
    server.pace = None
    done = subprocess.run(arguments, env=variables, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    for name in SHARDS:
        assert (work / f"{name}.converted").read_bytes() == REPO.files[name]
    assert not list((work / "downloads").iterdir())
    with Shards.open(NAME, work, delete=True) as shards:
        assert present(shards) == []


# Converts a source (copies each shard), in a child that ends at the k-th change of a file or folder; then again in one
# that does not end. For every k. Prints how many there were.
EVERY_CHANGE = """
import os, shutil, sys
from pathlib import Path
from moelocal.quantize.shards import Shards
import huggingface_hub.errors, huggingface_hub.utils, rich.progress  # once, not in every child
source, room = sys.argv[1:]

def convert(source, work, last):
    left = last
    def count(event, arguments):
        nonlocal left
        if event in ("os.rename", "os.remove", "os.symlink", "os.mkdir", "os.truncate") or (
            event == "open" and arguments[2] & os.O_ACCMODE
        ):
            left -= 1
            if left == 0:
                os._exit(9)
    sys.addaudithook(count)
    with Shards.open(source, work, delete=True) as shards:
        for name in shards.files:
            if not (work / name).exists():
                shards.need([name])
                (work / "copy").write_bytes((shards.folder / name).read_bytes())
                (work / "copy").replace(work / name)
            shards.done(name)

def child(*arguments):
    pid = os.fork()
    if pid == 0:
        try:
            convert(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

k, status = 0, 9
while status == 9:
    k += 1
    base = Path(room) / str(k)
    (base / "work").mkdir(parents=True)
    place = source
    if os.path.isdir(source):
        place = shutil.copytree(source, base / "local")
    status = child(place, base / "work", k)
    assert status in (0, 9), (k, status)
    if status == 9:
        assert child(place, base / "work", 0) == 0, k
print(k)
"""


@pytest.mark.parametrize("kind", ["folder", pytest.param("repository", marks=pytest.mark.slow)])
def test_an_end_at_every_change_of_the_disk(server, local, tmp_path, kind):
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    variables |= environment(server, tmp_path / "cache")
    source = str(local) if kind == "folder" else NAME
    done = subprocess.run(
        [sys.executable, "-c", EVERY_CHANGE, source, tmp_path / "room"],
        env=variables,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    changes = int(done.stdout)
    assert changes > 25
    for k in range(1, changes + 1):
        base = tmp_path / "room" / str(k)
        for name in SHARDS:
            assert (base / "work" / name).read_bytes() == REPO.files[name]
            data = (base / "work" / "source" / name).read_bytes()
            assert data != REPO.files[name]  # a stub again
        if kind == "folder":
            assert sorted(path.name for path in (base / "local").iterdir()) == SMALL_FILES
        else:
            assert not list((base / "work" / "downloads").iterdir())
