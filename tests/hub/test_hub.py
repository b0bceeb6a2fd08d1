"""Downloads by the real client from a server on loopback that does everything a network can do wrong."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.repos import NAME, SHARDS, WANTED, assert_whole, connected, environment, leftovers, small_repo
from hub.server import Fault, Generated, Repo, Server
from moelocal import hub
from moelocal.checkpoint.files import read_entries
from moelocal.errors import CheckpointError, ModelNotFound
from moelocal.units import size

AGAIN = "run the same command again"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch, cache):
    with connected(monkeypatch, cache, small_repo()) as server:
        yield server


def host(server: Server) -> str:
    return server.url.removeprefix("http://")


def error_of(*arguments: object, **more: object) -> str:
    with pytest.raises(ModelNotFound) as caught:
        hub.resolve(*arguments, progress=False, **more)  # type: ignore[arg-type]
    return str(caught.value)


class Waits(threading.Event):
    """An event that is never set, and notes how long it was waited for instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        return False


def fetch(name: str, stop: threading.Event | None = None, folder: Path | None = None) -> Path:
    """One file of the repository, brought here."""
    meter = hub.Meter("", 0, False)
    return hub.fetch(hub.find(NAME), name, folder, meter, stop or threading.Event())


# what is asked for


def test_only_the_files_of_a_model_are_asked_for(server, cache):
    folder = hub.resolve(NAME, progress=False)
    assert_whole(folder, server.repos[NAME])
    asked = [request.path.rpartition("/")[2] for request in server.gets()]
    assert sorted(asked) == sorted(name for name in WANTED if server.repos[NAME].size(name))
    assert not leftovers(cache)


def test_a_repository_without_an_index(server):
    files = {"config.json": b"{}", "model.safetensors": b"12345678", "other.safetensors": b"x"}
    server.repos[NAME] = Repo(files)
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME], ["config.json", "model.safetensors"])


def test_the_second_time_asks_for_the_commit_only(server):
    hub.resolve(NAME, progress=False)
    server.requests.clear()
    hub.resolve(NAME, progress=False)
    assert [request.path for request in server.requests] == [f"/api/models/{NAME}"]


def test_a_commit_that_is_here_whole_asks_for_nothing(server):
    folder = hub.resolve(NAME, progress=False)
    server.requests.clear()
    assert hub.resolve(NAME, revision=server.repos[NAME].commit, progress=False) == folder
    assert not server.requests


def test_the_commit_is_resolved_once(server):
    repository = hub.find(NAME, "main")
    old, new = server.repos[NAME], small_repo(commit="d1" * 20)
    new.revisions = ("main", old.commit)
    server.repos[NAME] = new  # the branch moves on in the middle of the download
    hub.download(repository, repository.small, progress=False)
    assert repository.commit == old.commit
    assert all(f"/resolve/{old.commit}/" in request.path for request in server.gets())


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3"])
def test_revisions_are_named_in_the_cache(server, revision):
    server.repos[NAME].revisions = (revision,)
    folder = hub.resolve(NAME, revision=revision, progress=False)
    assert folder == hub.resolve(NAME, revision=revision, offline=True)
    assert error_of(NAME, offline=True) == f"{NAME}: not in the local cache, and offline was asked for"


# the cache is the client's


def real_client(server: Server, cache: Path, **more: bool) -> Path:
    got = huggingface_hub.snapshot_download(
        NAME, allow_patterns=WANTED, cache_dir=cache, endpoint=server.url, **more
    )
    return Path(got)


def test_the_real_client_finds_what_we_downloaded(server, cache):
    ours = hub.resolve(NAME, progress=False)
    assert real_client(server, cache, local_files_only=True) == ours
    server.requests.clear()
    assert real_client(server, cache) == ours
    assert not server.gets()
    found = huggingface_hub.scan_cache_dir(cache)
    assert not found.warnings
    assert found.size_on_disk == sum(server.repos[NAME].size(name) for name in WANTED)


def test_we_find_what_the_real_client_downloaded(server, cache):
    theirs = real_client(server, cache)
    server.requests.clear()
    assert hub.resolve(NAME, progress=False) == theirs
    assert not server.gets()
    assert hub.resolve(NAME, offline=True) == theirs


def test_equal_files_of_two_commits_are_kept_once(server, cache):
    hub.resolve(NAME, progress=False)
    changed = small_repo(commit="d1" * 20)
    changed.files = dict(changed.files) | {"config.json": b"{ }"}
    server.repos[NAME] = changed
    server.requests.clear()
    assert_whole(hub.resolve(NAME, progress=False), changed)
    assert [request.path.rpartition("/")[2] for request in server.gets()] == ["config.json"]


def test_a_disk_without_links(server, monkeypatch):
    def refuse(self: Path, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    folder = hub.resolve(NAME, progress=False)
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert_whole(folder, server.repos[NAME])
    server.requests.clear()
    assert hub.resolve(NAME, progress=False) == folder
    assert not server.gets()


# connections

CUTS = st.lists(st.tuples(st.sampled_from(WANTED), st.integers(0, 310_000)), max_size=8)


@given(cuts=CUTS)
@settings(max_examples=15)
def test_connections_cut_at_any_byte(tmp_path_factory, cuts):
    folder = tmp_path_factory.mktemp("cuts")
    with pytest.MonkeyPatch.context() as patch, connected(patch, folder, small_repo()) as server:
        # one more attempt than faults: cuts before the first byte are in a row
        patch.setattr(hub.transfer, "_WAITS", [0.0] * 9)
        server.faults = [Fault(f"/{name}", cut=at) for name, at in cuts]
        repo = server.repos[NAME]
        assert_whole(hub.resolve(NAME, progress=False), repo)
        assert not leftovers(folder)
        # every byte was sent once: each attempt went on where the last one ended
        assert server.sent == sum(repo.size(name) for name in WANTED)


def test_connections_that_are_reset(server):
    server.faults = [Fault(SHARDS[0], cut=at, reset=True) for at in (0, 1, 100_000, 0, 100_000)]
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    assert not server.faults[-1].times


@pytest.mark.parametrize("change", [-5, -100_000])
def test_a_body_that_ends_early_without_a_length(server, change):
    server.faults = [Fault(SHARDS[0], resize=change, unsized=True)]
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    first = server.repos[NAME].size(SHARDS[0]) + change
    assert [request.range for request in server.gets(SHARDS[0])] == [
        None,
        f"bytes={first}-{first - change - 1}",
    ]


def test_a_range_that_was_not_asked_for(server):
    server.faults = [Fault(SHARDS[0], cut=1000), Fault(SHARDS[0], shift=10)]
    size = server.repos[NAME].size(SHARDS[0])
    assert error_of(NAME) == (
        f"{NAME}: {SHARDS[0]}: {host(server)} was asked for the bytes from 1000 and sent "
        f"bytes 1010-{size - 1}/{size}: something on the way there changes requests; try another network"
    )
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


def test_a_server_that_ignores_range(server):
    server.faults = [Fault(SHARDS[0], cut=100_000), Fault(SHARDS[0], plain=True)]
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


def test_a_connection_that_always_fails_ends_and_the_next_call_goes_on(server, cache):
    server.faults = [Fault(SHARDS[1], cut=200_000), Fault(SHARDS[1], times=1000, cut=0)]
    message = error_of(NAME)
    assert message.startswith(f"{NAME}: {SHARDS[1]}: the connection to {host(server)} failed (")
    assert message.endswith(f"): {AGAIN}; what was downloaded is kept")
    assert len(server.gets(SHARDS[1])) == 1 + 5
    [part] = [path for path in leftovers(cache) if path.name.startswith(server.repos[NAME].etag(SHARDS[1]))]
    assert part.stat().st_size == 200_000
    server.faults.clear()
    server.requests.clear()
    size = server.repos[NAME].size(SHARDS[1])
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    assert [request.range for request in server.gets(SHARDS[1])] == [f"bytes=200000-{size - 1}"]


def test_a_silent_server_is_asked_again(server, monkeypatch):
    repository = hub.find(NAME)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    server.faults = [Fault(SHARDS[0], hang=2.0)]
    path = hub.fetch(repository, SHARDS[0], None, hub.Meter("", 0, False), threading.Event())
    assert path.read_bytes() == server.repos[NAME].files[SHARDS[0]]
    assert len(server.gets(SHARDS[0])) >= 2


def test_nobody_answers(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused = f"[Errno {errno.ECONNREFUSED}] Connection refused"
    assert error_of(NAME) == f"{NAME}: not in the local cache, and 127.0.0.1:9 cannot be reached ({refused})"


def test_nobody_answers_and_the_cache_is_whole(server, monkeypatch):
    folder = hub.resolve(NAME, progress=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.resolve(NAME, progress=False) == folder


@pytest.mark.parametrize("address", ["localhost:9", "", "ftp://127.0.0.1", "http://", "nonsense"])
def test_an_endpoint_that_is_no_address(server, monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    expected = "HF_ENDPOINT: expected an address like https://huggingface.co, got"
    assert error_of(NAME) == f"{NAME}: {expected} {address!r}"


@pytest.mark.parametrize(
    "revision", ["", "..", "../../up", "a//b", "/etc", "a b", "ü", "-x", "a" * 9000 + "!"]
)
def test_revisions_that_cannot_be(server, revision):
    assert error_of(NAME, revision=revision).endswith(": the repository has no such revision")
    assert not server.requests


def test_a_server_that_is_no_hub(server):
    server.repos[NAME].commit = "<html>"
    assert error_of(NAME) == (
        f"{NAME}: {host(server)} does not answer like a Hugging Face server; if HF_ENDPOINT is set, check it"
    )


# statuses


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server, status):
    server.faults = [
        Fault("/api/models", status=status, times=3),
        Fault("config.json", status=status, times=3),
        Fault(SHARDS[2], status=status, times=3),
        Fault(SHARDS[2], cut=1000),
        Fault(SHARDS[2], status=status, times=4),
    ]
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    assert len(server.gets(SHARDS[2])) == 3 + 1 + 4 + 1


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_stays_broken(server, status):
    server.faults = [Fault("/api/models", status=status, times=1000)]
    trouble = f"{host(server)} has trouble of its own ({status}): {AGAIN} later; what was downloaded is kept"
    assert error_of(NAME) == f"{NAME}: {trouble}"
    assert len(server.requests) == 6
    server.faults = [Fault(SHARDS[0], status=status, times=1000)]
    assert error_of(NAME) == f"{NAME}: {SHARDS[0]}: {trouble}"
    server.faults.clear()
    folder = hub.resolve(NAME, progress=False)
    server.faults = [Fault("/api/models", status=status, times=1000)]
    assert hub.resolve(NAME, progress=False) == folder


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "17"}, 17.0),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=99;t=55'}, 1.0),
        ({"Retry-After": "soon"}, 1.0),
        ({}, 1.0),
    ],
)
def test_a_wait_that_the_server_asks_for(server, monkeypatch, headers, seconds):
    monkeypatch.setattr(hub.transfer, "_WAITS", [1.0] * 5)
    server.faults = [Fault(SHARDS[0], status=429, headers=headers)]
    waits = Waits()
    assert fetch(SHARDS[0], waits).read_bytes() == server.repos[NAME].files[SHARDS[0]]
    assert waits.seconds == [seconds]


def test_a_wait_until_a_date(server):
    # an HTTP date is in whole seconds, and up to one has passed since
    server.faults = [
        Fault(SHARDS[0], status=503, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)})
    ]
    waits = Waits()
    fetch(SHARDS[0], waits)
    assert len(waits.seconds) == 1
    assert 25 < waits.seconds[0] <= 30


def test_waits_before_anything_is_known(server, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr(hub.transfer.time, "sleep", slept.append)
    monkeypatch.setattr(hub.transfer, "_WAITS", [1.0, 2.0, 4.0])
    server.faults = [
        Fault("/api/models", status=429, headers={"Retry-After": "17"}),
        Fault("/api/models", status=503, times=2),
    ]
    assert hub.find(NAME).commit == server.repos[NAME].commit
    assert slept == [17.0, 2.0, 4.0]


def test_a_wait_that_is_too_long_is_said(server):
    server.faults = [Fault(SHARDS[0], status=429, headers={"Retry-After": "3600"}, times=1000)]
    assert error_of(NAME) == (
        f"{NAME}: {SHARDS[0]}: {host(server)} asks for fewer requests (429): {AGAIN} in 3600 seconds; "
        "what was downloaded is kept"
    )
    assert len(server.gets(SHARDS[0])) == 1


def test_too_many_requests(server):
    server.faults = [Fault("/api/models", status=429, times=1000)]
    assert error_of(NAME) == (
        f"{NAME}: {host(server)} asks for fewer requests (429): {AGAIN} in some minutes; "
        "what was downloaded is kept"
    )
    assert len(server.requests) == 6


GATED = (
    f"access must be granted first: accept the terms at https://huggingface.co/{NAME}, "
    "then log in with `hf auth login`"
)
MISSING = "no such folder and no such public repository on Hugging Face; for a private one, log in with `hf auth login`"


@pytest.mark.parametrize("token", ["", "hf_other"])
def test_refusals(server, monkeypatch, token):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.repos[NAME].gated = True
    assert error_of(NAME) == f"{NAME}: {GATED}"
    assert len(server.requests) == 2  # none of these is asked twice
    server.repos[NAME] = small_repo(token="hf_right")
    assert error_of(NAME) == f"{NAME}: {MISSING}"
    assert error_of("owner/nothing") == f"owner/nothing: {MISSING}"
    assert error_of("owner/nothing", revision="v2") == f"owner/nothing at revision v2: {MISSING}"
    assert len(server.requests) == 5


def test_a_token_that_nobody_knows(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert error_of(NAME) == (
        f"{NAME}: {host(server)} does not know the token in use (401): log in again with `hf auth login`, "
        "or go without one: `hf auth logout`, and unset HF_TOKEN"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_é")
    assert error_of(NAME) == (
        f"{NAME}: the Hugging Face token holds characters that no token has; see HF_TOKEN"
    )


@pytest.mark.parametrize("status", [401, 404])
def test_refusals_without_an_explanation(server, status):
    server.faults = [Fault("/api/models", status=status, times=1000)]
    assert error_of(NAME) == f"{NAME}: {MISSING}"


def test_a_revision_that_does_not_exist(server):
    assert error_of(NAME, revision="v9") == f"{NAME} at revision v9: the repository has no such revision"
    commit = "ab" * 20
    assert (
        error_of(NAME, revision=commit) == f"{NAME} at revision {commit}: the repository has no such revision"
    )


def test_forbidden(server):
    forbidden = (
        f"{host(server)} refuses access (403): the account or token in use may not read it; "
        "`hf auth login` changes the token"
    )
    server.faults = [Fault("/api/models", status=403, times=1000)]
    assert error_of(NAME) == f"{NAME}: {forbidden}"
    server.faults = [Fault(SHARDS[0], status=403, times=1000)]
    assert error_of(NAME) == f"{NAME}: {SHARDS[0]}: {forbidden}"


def test_a_file_that_is_listed_and_missing(server):
    server.faults = [Fault(SHARDS[0], status=404, headers={"X-Error-Code": "EntryNotFound"}, times=1000)]
    assert error_of(NAME) == (
        f"{NAME}: {SHARDS[0]}: {host(server)} lists this file but does not have it (404): "
        "tell the owner of the repository"
    )


def test_a_status_that_nobody_expects(server):
    server.faults = [Fault("/api/models", status=451, times=1000)]
    assert error_of(NAME) == (
        f"{NAME}: {host(server)} answers with status 451: {AGAIN} later; what was downloaded is kept"
    )


def test_the_token_is_sent_and_stays_with_its_host(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with Server({NAME: server.repos[NAME]}) as store:
        server.repos[NAME].token = "hf_right"
        server.repos[NAME].store = store.url
        assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
        assert {request.token for request in server.requests} == {"Bearer hf_right"}
        assert {request.token for request in store.requests} == {None}
        assert len(store.requests) == len(SHARDS)


def test_nothing_but_the_token_is_told(server):
    hub.resolve(NAME, progress=False)
    assert {request.agent for request in server.requests} == {"moelocal"}


# what a repository lacks


def test_no_config(server):
    server.repos[NAME] = Repo({"model.safetensors": b"x"})
    assert error_of(NAME) == f"{NAME}: the repository holds no config.json: no model that can be loaded"


def test_no_weights(server):
    server.repos[NAME] = Repo({"config.json": b"{}", "model.gguf": b"x", "pytorch_model.bin": b"x"})
    assert error_of(NAME) == f"{NAME}: the repository holds no model*.safetensors: nothing to load"


@pytest.mark.parametrize("name", ["model-9.safetensors", "../../../../etc/passwd", "pytorch_model.bin", 7])
def test_an_index_that_names_what_is_not_there(server, name):
    server.repos[NAME] = Repo(
        {
            "config.json": b"{}",
            hub.INDEX: b'{"weight_map": {"a": %s}}' % repr(name).replace("'", '"').encode(),
        }
    )
    assert error_of(NAME) == (
        f"{NAME}: {hub.INDEX} names {str(name)!r}, which the repository does not hold: "
        "its upload was incomplete; ask its owner, or name another revision"
    )


def test_an_index_that_is_none(server):
    server.repos[NAME] = Repo({"config.json": b"{}", hub.INDEX: b"[]"})
    assert error_of(NAME).startswith(f"{NAME}: ")
    server.repos[NAME] = Repo({"config.json": b"{}", hub.INDEX: b'{"weight_map": []}'}, commit="d1" * 20)
    assert error_of(NAME) == f"{NAME}: {hub.INDEX}: weight_map: expected an object of file names"


# sizes and checksums


@pytest.mark.parametrize("change", [-7, 7])
def test_a_file_of_another_size(server, change):
    size = server.repos[NAME].size(SHARDS[1])
    server.faults = [Fault(SHARDS[1], resize=change)]
    assert error_of(NAME) == (
        f"{NAME}: {SHARDS[1]}: the repository lists {size} bytes, {host(server)} sends {size + change}: "
        f"{AGAIN}; if it stays so, tell the owner of the repository"
    )
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


def test_a_file_that_is_longer_than_nobody_said(server):
    size = server.repos[NAME].size(SHARDS[1])
    server.faults = [Fault(SHARDS[1], resize=7, unsized=True)]
    assert error_of(NAME) == (
        f"{NAME}: {SHARDS[1]}: the repository lists {size} bytes, {host(server)} sends more: "
        f"{AGAIN}; if it stays so, tell the owner of the repository"
    )
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


def test_a_file_that_became_shorter_in_the_middle(server):
    size = server.repos[NAME].size(SHARDS[1])
    server.faults = [Fault(SHARDS[1], cut=200_000), Fault(SHARDS[1], resize=-150_000)]
    assert error_of(NAME) == (
        f"{NAME}: {SHARDS[1]}: the repository lists {size} bytes, {host(server)} sends fewer: "
        f"{AGAIN}; if it stays so, tell the owner of the repository"
    )
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


@pytest.mark.parametrize("name", [SHARDS[0], "tokenizer.json"])
def test_a_byte_that_changed_on_the_way(server, cache, name):
    server.faults = [Fault(name, flip=9)]
    assert error_of(NAME) == (
        f"{NAME}: {name}: the bytes that {host(server)} sent do not have the checksum that it states "
        f"({server.repos[NAME].etag(name)}); they were thrown away. {AGAIN.capitalize()}; "
        "if it stays so, tell the owner of the repository"
    )
    assert not (cache / "models--owner--name" / "snapshots" / server.repos[NAME].commit / name).exists()
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


@pytest.mark.parametrize("nbytes", [17, 300_000, 400_000])
def test_a_partial_file_with_other_bytes_is_begun_again(server, cache, nbytes):
    etag = server.repos[NAME].etag(SHARDS[0])
    part = cache / "models--owner--name" / "blobs" / f"{etag}.moelocal.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\1" * nbytes)
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    assert not leftovers(cache)


def test_git_and_lfs_checksums_are_those_of_git(tmp_path):
    # the server of these tests computes them as we do: here against git itself
    (tmp_path / "file").write_bytes(b"some text\n")
    known = "7b57bd29ea8afbdef71b5ba80b6a8f1cd3d0bbb1"
    if shutil.which("git"):
        known = subprocess.check_output(["git", "hash-object", "file"], cwd=tmp_path, text=True).strip()
    assert Repo({"a.json": b"some text\n"}).etag("a.json") == known


# the disk


def test_space_is_checked_before_the_first_byte(server, monkeypatch, cache):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500_000))
    total = sum(server.repos[NAME].size(name) for name in WANTED if name != hub.INDEX)
    assert error_of(NAME) == (
        f"{NAME}: {size(total)} must still be downloaded, but the disk of {cache / 'models--owner--name'} has "
        f"500.0 kB free: free {size(total - 500_000)} more, or set HF_HOME to a folder on a larger disk"
    )
    assert [request.path.rpartition("/")[2] for request in server.gets()] == [hub.INDEX]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=total))
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


def test_what_is_here_already_needs_no_space(server, monkeypatch):
    server.faults = [Fault(SHARDS[1], cut=200_000), Fault(SHARDS[1], status=400)]
    with pytest.raises(ModelNotFound) as caught:
        fetch(SHARDS[1])
    assert str(caught.value).startswith(f"{NAME}: {SHARDS[1]}: {host(server)} answers with status 400")
    fetch(SHARDS[0])
    repository = hub.find(NAME)
    left = hub.remaining(repository, [repository.files[name] for name in WANTED])
    rest = set(WANTED) - {SHARDS[0]}
    assert left == sum(server.repos[NAME].size(name) for name in rest) - 200_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=left))
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


def run(program: str, server: Server, cache: Path, **more: object) -> subprocess.Popen[bytes]:
    """A process that runs `program` with the server as its hub."""
    variables = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))
    }
    # a shell's background job ignores Ctrl-C, and so would this process if the tests run in one
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heard}\nfrom moelocal import hub\nfrom moelocal.errors import ModelNotFound\n{program}"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=variables | environment(server, cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,  # type: ignore[call-overload]
    )


def test_a_disk_that_is_full_in_the_middle(server, cache):
    # a limit on the size of files stands for the disk: the system refuses the byte after it
    process = run(
        f"try: hub.resolve({NAME!r})\nexcept ModelNotFound as error: print(error)",
        server,
        cache,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    out, err = process.communicate(timeout=60)
    place = cache / "models--owner--name"
    expected = [
        f"{NAME}: {name}: no space left on the disk of {place}: free some and {AGAIN}; what was downloaded is kept"
        for name in SHARDS
    ]
    assert out.decode().strip() in expected, err
    assert max(path.stat().st_size for path in leftovers(cache)) == 100_000
    repository = hub.find(NAME)
    left = hub.remaining(repository, [repository.files[name] for name in WANTED])
    server.sent = 0
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    assert server.sent == left < sum(server.repos[NAME].size(name) for name in SHARDS)


def test_a_disk_that_is_full_in_the_middle_of_a_real_one(server, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", small], capture_output=True
    ).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(small))
        # others may fill it after the check
        monkeypatch.setattr(hub.repository, "check_space", lambda *_: None)
        place = small / "models--owner--name"
        assert error_of(NAME) in [
            f"{NAME}: {name}: no space left on the disk of {place}: free some and {AGAIN}; what was downloaded is kept"
            for name in WANTED
        ]
        subprocess.run(["mount", "-o", "remount,size=2m", small], check=True)
        assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_folder_that_may_not_be_written(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    assert (
        error_of(NAME)
        == f"{NAME}: {hub.INDEX}: {tmp_path / 'file'}/models--owner--name/blobs: Not a directory"
    )


# several processes, and processes that end


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kill_at_any_moment(server, cache, kills):
    """kill -9 in the middle, again and again; then the rerun completes, and what had come was not sent again."""
    moments = np.random.default_rng(5).uniform(0.02, 0.4, kills)
    server.repos[NAME] = small_repo(3_000_000)
    total = sum(server.repos[NAME].size(name) for name in WANTED)
    server.pace = total / kills  # bytes per second of each of three connections
    for moment in moments:
        before = server.sent
        process = run(f"hub.resolve({NAME!r})", server, cache)
        while server.sent == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        snapshot = cache / "models--owner--name" / "snapshots" / server.repos[NAME].commit
        for path in snapshot.iterdir():  # what has its name has its bytes
            assert path.read_bytes() == server.repos[NAME].files[path.name]
    server.pace = None
    server.requests.clear()
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])
    assert not leftovers(cache)
    assert [request for request in server.gets("-of-") if request.range]
    # lost with each process: what the system had received for it, and what it had not yet written
    assert server.sent < 2 * total


def test_two_processes_at_once(server, cache):
    server.repos[NAME] = small_repo(3_000_000)
    total = sum(server.repos[NAME].size(name) for name in WANTED)
    server.pace = 6_000_000.0
    processes = [run(f"print(hub.resolve({NAME!r}))", server, cache) for _ in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err.decode()
        assert_whole(Path(out.decode().strip()), server.repos[NAME])
    assert len(server.gets("-of-")) == len(SHARDS)
    assert server.sent < total + 10_000  # small files may have come more than once
    assert not leftovers(cache)


def test_interrupted_from_the_keyboard(server, cache):
    server.pace = 100_000.0
    process = run(f"hub.resolve({NAME!r})", server, cache)
    while not server.gets("-of-"):
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert err.decode().rstrip().endswith("KeyboardInterrupt")
    server.pace = None
    assert_whole(hub.resolve(NAME, progress=False), server.repos[NAME])


def test_interrupted_while_headers_are_waited_for(server, cache, tmp_path):
    server.faults = [Fault("-of-", status=429, times=100, headers={"Retry-After": "200"})]
    process = run(
        f"from pathlib import Path; hub.skeleton(hub.find({NAME!r}), Path({str(tmp_path / 's')!r}))",
        server,
        cache,
    )
    while len(server.gets("-of-")) < len(SHARDS):
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert err.decode().rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("name", ["~nosuchuser/model", "a" * 300, "a/" + "b" * 300, "a\0b"])
def test_names_that_can_be_no_folder(name):
    expected = f"{name}: no such folder; a model is a folder or a Hugging Face name like owner/name"
    if name.startswith("a/"):
        assert hub.locate(name) == name
        name, expected = f"./{name}", f"./{expected}"
    with pytest.raises(ModelNotFound) as caught:
        hub.locate(name)
    assert str(caught.value) == expected


# offline


def test_offline_and_not_here(server):
    assert error_of(NAME, offline=True) == f"{NAME}: not in the local cache, and offline was asked for"
    assert error_of(NAME, revision="v2", offline=True) == (
        f"{NAME} at revision v2: not in the local cache, and offline was asked for"
    )
    assert not server.requests


def test_offline_by_the_environment(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert error_of(NAME) == f"{NAME}: not in the local cache, and offline was asked for"
    assert not server.requests


def test_offline_and_only_a_part_is_here(server, cache):
    folder = hub.resolve(NAME, progress=False)
    (folder / SHARDS[1]).unlink()
    part = (
        f"{NAME}: only a part is in the local cache, and offline was asked for; "
        "the same command with a connection completes it"
    )
    assert error_of(NAME, offline=True) == part
    server.requests.clear()
    hub.resolve(NAME, progress=False)
    assert not server.gets()  # its content is still there
    assert hub.resolve(NAME, offline=True) == folder


def test_an_interrupted_download_is_not_what_offline_finds(server):
    first = hub.resolve(NAME, progress=False)
    server.repos[NAME] = small_repo(commit="d1" * 20, nbytes=200_000)
    server.faults = [Fault(SHARDS[2], times=1000, status=400)]
    error_of(NAME)
    assert hub.resolve(NAME, offline=True) == first


def test_offline_opens_no_socket(server, cache):
    hub.resolve(NAME, progress=False)
    guard = (
        "import os, sys\n"
        "sys.addaudithook(lambda event, _: event.startswith('socket.') and os._exit(99))\n"
        f"print(hub.resolve({NAME!r}, offline=True))"
    )
    process = run(guard, server, cache)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    assert_whole(Path(out.decode().strip()), server.repos[NAME])


# before a download


def test_a_skeleton_reads_like_the_model(server, tmp_path, monkeypatch):
    repository = hub.find(NAME)
    assert hub.skeleton(repository, tmp_path / "skeleton", progress=False) == SHARDS
    stubs = read_entries(tmp_path / "skeleton")
    whole = read_entries(hub.resolve(NAME, progress=False))
    assert [(e.name, e.file.name, e.dtype, e.shape, e.nbytes) for e in stubs.values()] == [
        (e.name, e.file.name, e.dtype, e.shape, e.nbytes) for e in whole.values()
    ]
    for name in SHARDS:
        stat = (tmp_path / "skeleton" / name).stat()
        assert stat.st_size == server.repos[NAME].size(name)
        assert stat.st_blocks * 512 <= 8192


def test_an_outline_is_the_best_that_is_here(server, tmp_path):
    with hub.outline(None) as folder:
        assert folder == hub.EMBEDDED
    with hub.outline(tmp_path) as folder:
        assert folder == tmp_path
    with hub.outline(NAME, progress=False) as folder:
        described = [(e.name, e.shape) for e in read_entries(folder).values()]
        assert (folder / "config.json").read_bytes() == server.repos[NAME].files["config.json"]
    assert not folder.exists()
    whole = hub.resolve(NAME, progress=False)
    for offline in (False, True):
        with hub.outline(NAME, offline=offline, progress=False) as folder:
            assert folder == whole
            assert described == [(e.name, e.shape) for e in read_entries(folder).values()]


@pytest.mark.parametrize("first_read", [8, 9, 60, 1 << 18])
def test_headers_of_any_length_through_cut_connections(server, tmp_path, monkeypatch, first_read):
    monkeypatch.setattr(hub.repository, "_FIRST_READ", first_read)
    server.faults = [Fault(SHARDS[0], cut=5), Fault(SHARDS[1], plain=True), Fault(SHARDS[2], status=503)]
    hub.skeleton(hub.find(NAME), tmp_path / "skeleton", progress=False)
    for name in SHARDS:
        data = server.repos[NAME].files[name]
        length = 8 + int.from_bytes(data[:8], "little")
        assert (tmp_path / "skeleton" / name).read_bytes() == data[:length].ljust(len(data), b"\0")


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, b"\xff" * 100])
def test_a_skeleton_of_files_that_are_none(server, tmp_path, data):
    server.repos[NAME] = Repo({"config.json": b"{}", "model.safetensors": data})
    hub.skeleton(hub.find(NAME), tmp_path, progress=False)
    assert (tmp_path / "model.safetensors").read_bytes() == data
    with pytest.raises(CheckpointError, match="cut off, or no safetensors file"):
        read_entries(tmp_path)


def test_a_skeleton_of_a_large_model_costs_little(server, tmp_path):
    head = (b'{"a": {"dtype": "U8", "shape": [%d], "data_offsets": [0, %d]}}' % ((40 * 10**9,) * 2)).ljust(
        100
    )
    data = len(head).to_bytes(8, "little") + head
    big = Generated(
        108 + 40 * 10**9, lambda offset, length: data[offset : offset + length].ljust(length, b"\0")
    )
    server.repos[NAME] = Repo({"config.json": b"{}", "model.safetensors": big})
    assert hub.skeleton(hub.find(NAME), tmp_path, progress=False) == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_size == big.nbytes
    assert server.sent < 1_000_000


# the bar


def test_no_terminal_no_bar(server, cache):
    process = run(f"hub.resolve({NAME!r})", server, cache)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 0


@pytest.mark.parametrize("shown", [True, False])
def test_one_bar_on_a_terminal(server, cache, shown):
    server.repos[NAME] = small_repo(1_000_000)
    server.pace = 1_000_000.0
    server.faults = [Fault(SHARDS[0], status=503)]
    ours, theirs = os.openpty()
    variables = os.environ | environment(server, cache) | {"TERM": "xterm", "COLUMNS": "100"}
    program = (
        f"from moelocal import hub; hub.transfer._WAITS[0] = 0.3; hub.resolve({NAME!r}, progress={shown})"
    )
    process = subprocess.Popen([sys.executable, "-c", program], env=variables, stderr=theirs)
    os.close(theirs)
    text = b""
    try:
        while data := os.read(ours, 65536):
            text += data
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    if shown:
        assert NAME.encode() in text
        assert b"MB/s" in text
        assert b"3.0 MB" in text
        assert b"0:00:0" in text
        assert b"waiting" in text
        assert b"Fetching" not in text
    else:
        assert text == b""


def test_a_meter_counts_what_was_here_apart():
    meter = hub.Meter("x", 100, False)
    meter.have(40)
    meter.advance(30)
    meter.say("(waiting)")
    [task] = meter._bar.tasks
    assert (task.completed, task.total, task.description) == (30, 60, "x (waiting)")
