"""From the name of a model to a folder on this machine: repositories, and their places in the Hugging Face cache."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import IO, Any, Final

from moelocal.config import read_json
from moelocal.errors import ConfigError, ModelNotFound
from moelocal.hub import transfer
from moelocal.hub.transfer import Meter, check_space, writing
from moelocal.whole import whole

EMBEDDED: Final = Path(__file__).parent.parent / "embedded"
"""The small demonstration model that ships with the package."""

INDEX: Final = "model.safetensors.index.json"

_REPOSITORY: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REVISION: Final = re.compile(r"(?!.*(\.\.|//))\w[\w./+-]*", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SMALL: Final = re.compile(r"\w[\w.+-]*\.(json|jinja)|tokenizer\.model", re.ASCII)
_SHARD: Final = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_ETAG: Final = re.compile(r"[\w-]{1,200}", re.ASCII)
_AT_ONCE: Final = 4
_MOST_HEADER: Final = 100_000_000
_FIRST_READ: Final = 1 << 18
"""Bytes of a shard asked for first: its header, for all but the largest."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: size in bytes and the name that the cache gives its content, which is also the
    checksum: 64 hex digits are a SHA-256 (large files), 40 a git blob id (SHA-1); other etags are not checked."""

    name: str
    nbytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Repository:
    """A Hugging Face repository at one commit, and the files at its root that we may read."""

    name: str
    revision: str
    commit: str
    files: dict[str, RemoteFile]

    @property
    def small(self) -> list[str]:
        """All that is not weights: configs, tokenizer, templates, the index."""
        return [name for name in self.files if _SMALL.fullmatch(name)]

    @property
    def snapshot(self) -> Path:
        """Its folder in the Hugging Face cache, where `download` puts files."""
        return storage(self) / "snapshots" / self.commit

    def weights(self, folder: Path) -> list[str]:
        """Names of the safetensors files, in order; `folder` holds the index if the repository has one.

        Raises `ModelNotFound` if there are none, or one that the index names is missing.
        """
        if INDEX not in self.files:
            names = sorted(n for n in self.files if n.startswith("model") and n.endswith(".safetensors"))
            if not names:
                raise ModelNotFound(
                    f"{self.name}: the repository holds no model*.safetensors: nothing to load"
                )
            return names
        try:
            weight_map = read_json(folder / INDEX).get("weight_map")
        except ConfigError as error:
            raise ModelNotFound(f"{self.name}: {error}") from None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelNotFound(f"{self.name}: {INDEX}: weight_map: expected an object of file names")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not _SHARD.fullmatch(name) or name not in self.files:
                raise ModelNotFound(
                    f"{self.name}: {INDEX} names {name!r}, which the repository does not hold: "
                    "its upload was incomplete; ask its owner, or name another revision"
                )
        return names

    def cached(self, name: str) -> Path | None:
        """The file in the Hugging Face cache, if it is there."""
        path = self.snapshot / name
        return path if path.is_file() else None


def locate(model: str | Path) -> Path | str:
    """An existing folder, or the name of a repository. Raises `ModelNotFound` for what can be neither."""
    # ~nobody, a name too long for the disk, a folder that we may not enter
    with suppress(RuntimeError, OSError):
        folder = Path(model).expanduser()
        if folder.is_dir() and str(
            model
        ):  # an empty name is a variable that was never set, not the current folder
            return folder
    if isinstance(model, Path) or not _REPOSITORY.fullmatch(model):
        raise ModelNotFound(
            f"{model}: no such folder; a model is a folder or a Hugging Face name like owner/name"
        )
    return model


def resolve(
    model: str | Path | None, *, revision: str | None = None, offline: bool = False, progress: bool = True
) -> Path:
    """The folder of a model: the embedded one for None, an existing folder as it is, or a Hugging Face repository,
    downloaded into the Hugging Face cache (its environment variables hold) unless it is there.

    `offline`: use what the cache has, open no connection. Without a network, a complete model in the cache is used
    too. Raises `ModelNotFound`.
    """
    if model is None:
        return EMBEDDED
    place = locate(model)
    if isinstance(place, Path):
        return place
    repository = find(place, revision, offline=offline, progress=progress)
    download(repository, [name for name in repository.small if name == INDEX], progress=False)
    weights = repository.weights(repository.snapshot)
    download(repository, [*repository.small, *weights], progress=progress)
    return repository.snapshot


def find(
    name: str, revision: str | None = None, *, offline: bool = False, progress: bool = True
) -> Repository:
    """The repository `name`, its revision (a branch, tag or commit; the default branch for None) resolved once to a
    commit. One request; none with `offline` or when a commit is named that the cache has whole; without a network, or
    when the server fails, what the cache has. Raises `ModelNotFound`.
    """
    where = name if revision is None else f"{name} at revision {revision}"
    if revision is not None and not _REVISION.fullmatch(revision):
        raise ModelNotFound(f"{where}: the repository has no such revision")
    if is_offline(offline):
        return _from_cache(where, name, revision, "and offline was asked for")
    if revision is not None and _COMMIT.fullmatch(revision):
        with suppress(ModelNotFound):
            return _from_cache(where, name, revision, "")
    try:
        told = transfer.describe(name, revision, progress)
        files = dict(filter(None, map(_file, told["siblings"])))
        commit = str(told["sha"])
    except transfer.client_error() as error:
        status = transfer.status_of(error)
        if status is None:
            return _from_cache(where, name, revision, f"and {transfer.host()} cannot be reached ({error})")
        if status in transfer.BUSY:
            with suppress(ModelNotFound):
                return _from_cache(where, name, revision, "")
        raise transfer.explained(name, where, error) from None
    except (KeyError, TypeError, AttributeError, ValueError):
        files, commit = {}, ""
    if not _COMMIT.fullmatch(commit):
        raise ModelNotFound(
            f"{where}: {transfer.host()} does not answer like a Hugging Face server; if HF_ENDPOINT is set, check it"
        )
    if "config.json" not in files:
        raise ModelNotFound(f"{where}: the repository holds no config.json: no model that can be loaded")
    return Repository(name, revision or "main", commit, files)


def download(repository: Repository, names: Iterable[str], *, progress: bool = True) -> None:
    """Bring files into the Hugging Face cache, a few at a time, with one bar over all their bytes.

    Raises `ModelNotFound`; first of all, before a byte, if the disk has no room for them. What was fetched before an
    error or an end of the process is kept and continued.
    """
    missing = [repository.files[name] for name in names if not repository.cached(name)]
    if missing:
        check_space(repository.name, remaining(repository, missing), storage(repository))
        stop = Event()
        with Meter(repository.name, sum(file.nbytes for file in missing), progress) as meter:
            threads = ThreadPoolExecutor(min(_AT_ONCE, len(missing)), "moelocal-hub")
            try:
                jobs = [threads.submit(fetch, repository, file.name, None, meter, stop) for file in missing]
                for job in wait(jobs, return_when=FIRST_EXCEPTION).done:
                    job.result()
            finally:
                stop.set()
                threads.shutdown(cancel_futures=True)
    _remember(repository)


def fetch(repository: Repository, name: str, folder: Path | None, meter: Meter, stop: Event) -> Path:
    """Bring one file into `folder`, or for None into the Hugging Face cache; where it is. It gets its name when it is
    whole and its checksum right; two processes that fetch it do so one after the other.

    Raises `ModelNotFound`, and `Stopped` soon after `stop` was set.
    """
    file = repository.files[name]
    if not file.etag:  # known from the cache alone
        raise ModelNotFound(
            f"{repository.name}: {name} is no longer in the local cache; run the same command again"
        )
    with writing(f"{repository.name}: {name}", folder or storage(repository)):
        if folder is not None:
            transfer.bring(repository, file, folder / name, meter, stop)
            return folder / name
        pointer = repository.snapshot / name
        if not pointer.is_file():
            blob = storage(repository) / "blobs" / file.etag
            transfer.bring(repository, file, blob, meter, stop)
            _point(pointer, blob)
        return pointer


def skeleton(repository: Repository, into: Path, *, progress: bool = True) -> list[str]:
    """Fill the folder `into` so that it reads like the whole model: configs, tokenizer and index as copies, and of each
    weight file a stub (`write_stub`). A few MB are fetched, whatever the model. Gives the names of the weight files.

    Raises `ModelNotFound`.
    """
    download(repository, repository.small, progress=progress)
    names = repository.weights(repository.snapshot)
    with writing(repository.name, into), ThreadPoolExecutor(_AT_ONCE, "moelocal-hub") as threads:
        into.mkdir(parents=True, exist_ok=True)
        for name in repository.small:
            shutil.copyfile(repository.snapshot / name, into / name)
        stop = Event()
        try:
            for name, head in zip(
                names, threads.map(lambda n: _head(repository, n, stop), names), strict=True
            ):
                write_stub(into / name, head, repository.files[name].nbytes)
        finally:
            stop.set()
    return names


@contextmanager
def outline(
    model: str | Path | None, *, revision: str | None = None, offline: bool = False, progress: bool = True
) -> Iterator[Path]:
    """A folder to describe a model from, without its weights being downloaded: the one that is here, or a `skeleton` in
    a temporary folder. Raises `ModelNotFound`."""
    place = EMBEDDED if model is None else locate(model)
    if isinstance(place, Path):
        yield place
        return
    repository = find(place, revision, offline=offline, progress=progress)
    with tempfile.TemporaryDirectory(prefix="moelocal-") as temporary:
        names = skeleton(repository, Path(temporary), progress=progress)
        yield repository.snapshot if all(map(repository.cached, names)) else Path(temporary)


def write_stub(path: Path, head: bytes, nbytes: int) -> None:
    """A sparse file of `nbytes` that holds the header of a safetensors file and takes no room for the rest."""
    temporary = path.with_name(path.name + ".writing")
    with temporary.open("wb") as stream:
        stream.write(head)
        stream.truncate(nbytes)
    temporary.replace(path)


def read_head(stream: IO[bytes]) -> bytes:
    """The first 8 bytes and the header of a safetensors file; fewer if it is cut off."""
    head = stream.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    return head + stream.read(min(length, _MOST_HEADER))


def remaining(repository: Repository, files: Iterable[RemoteFile], folder: Path | None = None) -> int:
    """Bytes that `fetch` would still write for `files`, in `folder` or the cache."""
    total = 0
    for file in files:
        target = folder / file.name if folder else storage(repository) / "blobs" / file.etag
        if not target.exists():
            total += file.nbytes
            with suppress(OSError):
                total -= min(file.nbytes, transfer.part_of(target).stat().st_size)
    return total


def is_offline(asked: bool) -> bool:
    """Whether the network must not be used: asked for, or by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return asked or bool(constants.HF_HUB_OFFLINE)


def storage(repository: Repository) -> Path:
    """Its folder in the Hugging Face cache (which need not exist yet)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repository.name.replace('/', '--')}"


def _file(told: dict[str, Any]) -> tuple[str, RemoteFile] | None:
    """A file by its name, or None if it is none that we may read. Raises KeyError or TypeError."""
    name, nbytes = told["rfilename"], told.get("size")
    if not (_SMALL.fullmatch(name) or _SHARD.fullmatch(name)):
        return None
    etag = told["lfs"]["sha256"] if told.get("lfs") else told["blobId"]
    if not isinstance(nbytes, int) or nbytes < 0 or not _ETAG.fullmatch(etag):
        raise TypeError
    return name, RemoteFile(name, nbytes, etag)


def _head(repository: Repository, name: str, stop: Event) -> bytes:
    """The first 8 bytes and the header of a safetensors file, from the cache or the network."""
    if cached := repository.cached(name):
        with cached.open("rb") as stream:
            return read_head(stream)
    file, data, quiet = repository.files[name], io.BytesIO(), Meter("", 0, False)
    first = min(_FIRST_READ, file.nbytes)
    transfer.receive(repository, file, data, 0, first, hashlib.sha256(), quiet, stop)
    length = struct.unpack("<Q", data.getvalue()[:8])[0] if first >= 8 else 0
    end = min(8 + min(length, _MOST_HEADER), file.nbytes)
    transfer.receive(repository, file, data, first, end, hashlib.sha256(), quiet, stop)
    return data.getvalue()[:end]


def _from_cache(where: str, name: str, revision: str | None, why: str) -> Repository:
    """What the Hugging Face cache has whole. Raises `ModelNotFound`."""
    repository = Repository(name, revision or "main", "", {})
    commit = repository.revision
    if not _COMMIT.fullmatch(commit):
        with suppress(OSError, ValueError):
            commit = (storage(repository) / "refs" / commit).read_text("ascii").strip()
    repository = replace(repository, commit=commit)
    with suppress(OSError):
        for path in repository.snapshot.iterdir():
            if path.is_file():
                repository.files[path.name] = RemoteFile(path.name, path.stat().st_size, "")
    if not repository.files:
        raise ModelNotFound(f"{where}: not in the local cache, {why}")
    try:
        repository.weights(repository.snapshot)
    except ModelNotFound:
        raise ModelNotFound(
            f"{where}: only a part is in the local cache, {why}; the same command with a connection completes it"
        ) from None
    return repository


def _remember(repository: Repository) -> None:
    """Note in the cache which commit the revision is, once all of it is there, so that it is found offline."""
    if _COMMIT.fullmatch(repository.revision):
        return
    ref = storage(repository) / "refs" / repository.revision
    with suppress(ModelNotFound, OSError):  # a cache that cannot be written is still one that can be read
        if all(map(repository.cached, repository.weights(repository.snapshot))):
            ref.parent.mkdir(parents=True, exist_ok=True)
            with whole(ref) as stream:
                stream.write(repository.commit.encode())


def _point(pointer: Path, blob: Path) -> None:
    """The cache's name of a file: a link to its content; on a disk without links the content itself."""
    pointer.parent.mkdir(parents=True, exist_ok=True)
    temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}")
    try:
        temporary.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        blob.replace(pointer)
    else:
        temporary.replace(pointer)
