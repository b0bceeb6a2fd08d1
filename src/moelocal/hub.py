"""From the name of a model to a folder on this machine. The only module that may use the network.

The protocol, the tokens and the layout of the cache are huggingface_hub's (https://huggingface.co/docs/huggingface_hub);
the bytes are fetched here, over HTTP with Range. huggingface_hub 2.4 begins a file anew when its process was killed and
leaves what it had on the disk for good, gives up at a 503 for a file, waits as long as a server says, and takes any
bytes of the right number for the file. Here a file goes on where it ended, whatever ended it, and gets its name only
when its checksum is the one that the repository states.

One file because whoever wants to know what leaves this machine should have to read this one only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from typing import IO, TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote, urlsplit

from moelocal.config import read_json
from moelocal.errors import ConfigError, ModelNotFound
from moelocal.units import size

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

EMBEDDED: Final = Path(__file__).parent / "embedded"
"""The small demonstration model that ships with the package."""

INDEX: Final = "model.safetensors.index.json"

_REPOSITORY: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REVISION: Final = re.compile(r"(?!.*(\.\.|//))\w[\w./+-]*", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SMALL: Final = re.compile(r"\w[\w.+-]*\.(json|jinja)|tokenizer\.model", re.ASCII)
_SHARD: Final = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_CHECKSUM: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_ETAG: Final = re.compile(r"[\w-]{1,200}", re.ASCII)
_BUSY: Final = (408, 429, 500, 502, 503, 504)
_AT_ONCE: Final = 4
_WAITS: Final = [1.0, 2.0, 4.0, 8.0, 16.0]
"""Seconds before each new attempt; a byte that arrives starts the count again."""
_LONGEST_WAIT: Final = 300.0
"""Seconds of Retry-After that we wait; a server that asks for more is an error that says so."""
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
        told = _describe(name, revision, progress)
        files = dict(filter(None, map(_file, told["siblings"])))
        commit = str(told["sha"])
    except _client_error() as error:
        status = _status(error)
        if status is None:
            return _from_cache(where, name, revision, f"and {_host()} cannot be reached ({error})")
        if status in _BUSY:
            with suppress(ModelNotFound):
                return _from_cache(where, name, revision, "")
        raise _explained(name, where, error) from None
    except (KeyError, TypeError, AttributeError, ValueError):
        files, commit = {}, ""
    if not _COMMIT.fullmatch(commit):
        raise ModelNotFound(
            f"{where}: {_host()} does not answer like a Hugging Face server; if HF_ENDPOINT is set, check it"
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
            _bring(repository, file, folder / name, meter, stop)
            return folder / name
        pointer = repository.snapshot / name
        if not pointer.is_file():
            blob = storage(repository) / "blobs" / file.etag
            _bring(repository, file, blob, meter, stop)
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
                total -= min(file.nbytes, _part(target).stat().st_size)
    return total


def check_space(
    what: str, nbytes: int, folder: Path, otherwise: str = "set HF_HOME to a folder on a larger disk"
) -> None:
    """Raises `ModelNotFound` unless the disk of `folder` (which need not exist yet) has room for `nbytes` more."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise ModelNotFound(
            f"{what}: {size(nbytes)} must still be downloaded, but the disk of {folder} has {size(free)} free: "
            f"free {size(nbytes - free)} more, or {otherwise}"
        )


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """What the system says about files while `what` is written to `folder`, as `ModelNotFound`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ModelNotFound(
                f"{what}: no space left on the disk of {folder}: free some and run the same command again; "
                "what was downloaded is kept"
            ) from None
        raise ModelNotFound(f"{what}: {error.filename or folder}: {error.strerror or error}") from None


def is_offline(asked: bool) -> bool:
    """Whether the network must not be used: asked for, or by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return asked or bool(constants.HF_HUB_OFFLINE)


def storage(repository: Repository) -> Path:
    """Its folder in the Hugging Face cache (which need not exist yet)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repository.name.replace('/', '--')}"


class Stopped(Exception):
    """A fetch was told to stop. Never reaches a user."""


class Meter:
    """Bytes that have come, over all files of a download and from all its threads: one bar with rate and time left on
    stderr if that is a terminal and `shown`, nothing elsewhere."""

    def __init__(self, title: str, total: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        console = Console(stderr=True)
        self._title = title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            SpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def have(self, nbytes: int) -> None:
        """`nbytes` are on the disk from before (negative: they are of no use); they do not count for the rate."""
        task = self._bar.tasks[0]
        self._bar.update(self._task, total=(task.total or 0) - nbytes)

    def advance(self, nbytes: int) -> None:
        """`nbytes` have come."""
        self._bar.advance(self._task, nbytes)

    def say(self, text: str = "") -> None:
        """Show `text` beside the title, for instance what is waited for."""
        self._bar.update(self._task, description=f"{self._title} {text}".rstrip())


def _bring(repository: Repository, file: RemoteFile, target: Path, meter: Meter, stop: Event) -> None:
    """`file` at `target`, whole and checked. What has come so far lies beside it, where the next call goes on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    held = 1
    while held:  # a second time, from the first byte, if what an earlier process left was wrong
        with _claimed(target, meter, stop) as part:
            if part is None:
                meter.have(file.nbytes)
                return
            held, digest = 0, _digest(file)
            for chunk in iter(lambda: part.read(1 << 20), b""):
                if stop.is_set():
                    raise Stopped
                digest.update(chunk)
                held += len(chunk)
                meter.have(len(chunk))
            if held <= file.nbytes:
                _receive(repository, file, part, held, file.nbytes, digest, meter, stop)
                if digest.hexdigest() == file.etag or not _CHECKSUM.fullmatch(file.etag):
                    part.flush()
                    os.fsync(part.fileno())
                    _part(target).replace(target)
                    return
            meter.have(-max(held, file.nbytes))
            part.truncate(0)
    raise ModelNotFound(
        f"{repository.name}: {file.name}: the bytes that {_host()} sent do not have the checksum that it states "
        f"({file.etag}); they were thrown away. Run the same command again; if it stays so, tell the owner of the "
        "repository"
    )


def _receive(
    repository: Repository,
    file: RemoteFile,
    into: IO[bytes],
    held: int,
    end: int,
    digest: Digest,
    meter: Meter,
    stop: Event,
) -> None:
    """Append bytes `held` to `end` (exclusive) to `into` and `digest`, through cut connections and busy servers."""
    failures = 0
    while held < end:
        try:
            with _request(repository, file, held, end) as response:
                skip = held if response.status_code == 200 else 0  # a server may ignore Range and send all
                for chunk in response.iter_bytes():
                    if stop.is_set():
                        raise Stopped
                    chunk, skip = chunk[skip:], max(0, skip - len(chunk))
                    if held + len(chunk) > file.nbytes:
                        raise _wrong_size(repository, file, "more")
                    chunk = chunk[: end - held]
                    into.write(chunk)
                    digest.update(chunk)
                    held += len(chunk)
                    meter.advance(len(chunk))
                    failures = 0 if chunk else failures
                    if held == end < file.nbytes:
                        return
            if held < end:
                raise EOFError("it ended early")
        except (_client_error(), EOFError) as error:
            into.flush()
            delay = _delay(error, failures)
            if delay is None:
                raise _explained(repository.name, f"{repository.name}: {file.name}", error) from None
            meter.say(f"(waiting {delay:.0f} s for {_host()})")
            if stop.wait(delay):
                raise Stopped from None
            meter.say()
            failures += 1


def _describe(name: str, revision: str | None, progress: bool) -> Any:
    """What the server says about a repository: JSON with its commit and its files with sizes and checksums. Asks again
    while it is busy or cuts the connection, not if nobody can be reached. Raises what the client raises."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    if not re.match(r"https?://[\w.\[-]", constants.ENDPOINT):
        raise ModelNotFound(
            f"{name}: HF_ENDPOINT: expected an address like https://huggingface.co, got {constants.ENDPOINT!r}"
        )
    url = f"{constants.ENDPOINT}/api/models/{name}"
    url += f"/revision/{quote(revision, safe='')}" if revision else ""
    timeout, failures = constants.HF_HUB_DOWNLOAD_TIMEOUT, 0
    while True:
        try:
            response = get_session().get(url, params={"blobs": True}, headers=_headers(name), timeout=timeout)
            hf_raise_for_status(response)
            return response.json()
        except _client_error() as error:
            delay = _delay(error, failures)
            if delay is None or (_status(error) is None and "Connect" in type(error).__name__):
                raise
            with Meter(name, 0, progress) as meter:
                meter.say(f"(waiting {delay:.0f} s for {_host()})")
                time.sleep(delay)
            failures += 1


def _file(told: dict[str, Any]) -> tuple[str, RemoteFile] | None:
    """A file by its name, or None if it is none that we may read. Raises KeyError or TypeError."""
    name, nbytes = told["rfilename"], told.get("size")
    if not (_SMALL.fullmatch(name) or _SHARD.fullmatch(name)):
        return None
    etag = told["lfs"]["sha256"] if told.get("lfs") else told["blobId"]
    if not isinstance(nbytes, int) or nbytes < 0 or not _ETAG.fullmatch(etag):
        raise TypeError
    return name, RemoteFile(name, nbytes, etag)


def _headers(name: str) -> dict[str, str]:
    """The user's token, if there is one. Not the client's own headers: they tell the versions of other packages."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ModelNotFound(
            f"{name}: the Hugging Face token holds characters that no token has; see HF_TOKEN"
        )
    return {"User-Agent": "moelocal"} | ({"Authorization": f"Bearer {token}"} if token else {})


@contextmanager
def _request(repository: Repository, file: RemoteFile, first: int, end: int) -> Iterator[Any]:
    """A response (httpx) whose body is bytes `first` to `end` (exclusive) of `file`, or all of it if its status is 200.
    Raises what the client raises, and `ModelNotFound` if the server announces another size."""
    from huggingface_hub import constants, get_session, hf_raise_for_status

    headers = _headers(repository.name) | {"Accept-Encoding": "identity"}
    if (first, end) != (0, file.nbytes):
        headers["Range"] = f"bytes={first}-{end - 1}"
    url = f"{constants.ENDPOINT}/{repository.name}/resolve/{repository.commit}/{quote(file.name)}"
    with get_session().stream(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        if response.status_code == 416:
            raise _wrong_size(repository, file, "fewer")
        hf_raise_for_status(response)
        total = response.headers.get("Content-Length")
        if response.status_code == 206:
            told = response.headers.get("Content-Range", "nothing")
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
            if not span or int(span[1]) != first:
                raise ModelNotFound(
                    f"{repository.name}: {file.name}: {_host()} was asked for the bytes from {first} and sent "
                    f"{told}: something on the way there changes requests; try another network"
                )
            total = span[2]
        elif "Content-Encoding" in response.headers:
            total = None  # it is the length of the encoded bytes
        if total and total.isdigit() and int(total) != file.nbytes:
            raise _wrong_size(repository, file, total)
        yield response


def _wrong_size(repository: Repository, file: RemoteFile, got: str) -> ModelNotFound:
    return ModelNotFound(
        f"{repository.name}: {file.name}: the repository lists {file.nbytes} bytes, {_host()} sends {got}: "
        "run the same command again; if it stays so, tell the owner of the repository"
    )


def _head(repository: Repository, name: str, stop: Event) -> bytes:
    """The first 8 bytes and the header of a safetensors file, from the cache or the network."""
    if cached := repository.cached(name):
        with cached.open("rb") as stream:
            return read_head(stream)
    file, data, quiet = repository.files[name], io.BytesIO(), Meter("", 0, False)
    first = min(_FIRST_READ, file.nbytes)
    _receive(repository, file, data, 0, first, hashlib.sha256(), quiet, stop)
    length = struct.unpack("<Q", data.getvalue()[:8])[0] if first >= 8 else 0
    end = min(8 + min(length, _MOST_HEADER), file.nbytes)
    _receive(repository, file, data, first, end, hashlib.sha256(), quiet, stop)
    return data.getvalue()[:end]


def _delay(error: Exception, failures: int) -> float | None:
    """Seconds until another attempt: what the server asks for, or ours; None if there should be none."""
    status = _status(error)
    if failures >= len(_WAITS) or (status is not None and status not in _BUSY):
        return None
    delay = max(_WAITS[failures], _retry_after(error))
    return delay if delay <= _LONGEST_WAIT else None


def _retry_after(error: Exception) -> float:
    """Seconds that the response behind `error` asks to wait (RFC 9110, 10.2.3; or Hugging Face's RateLimit); or 0."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    reset = re.search(r"\br=0;t=(\d{1,9})\b", headers.get("RateLimit", ""))
    return float(reset[1]) if reset else 0.0


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _client_error() -> type[Exception]:
    """The base of what the HTTP client raises: huggingface_hub 1 is built on httpx, 2 on httpx2."""
    from huggingface_hub import errors

    return cast(type[Exception], errors.HfHubHTTPError.__bases__[0])


def _explained(name: str, where: str, error: Exception) -> ModelNotFound:
    """What the client raised about the repository `name`, in our words; `where`: with a revision or file."""
    from huggingface_hub import errors

    status = _status(error)
    kept = "what was downloaded is kept"
    if isinstance(error, errors.GatedRepoError):
        where = name
        text = (
            f"access must be granted first: accept the terms at https://huggingface.co/{name}, "
            "then log in with `hf auth login`"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        text = "the repository has no such revision"
    elif isinstance(error, errors.EntryNotFoundError):
        text = f"{_host()} lists this file but does not have it (404): tell the owner of the repository"
    elif status == 401 and "Authorization" in cast(Any, error).response.request.headers:
        text = (
            f"{_host()} does not know the token in use (401): log in again with `hf auth login`, "
            "or go without one: `hf auth logout`, and unset HF_TOKEN"
        )
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        text = (
            "no such folder and no such public repository on Hugging Face; "
            "for a private one, log in with `hf auth login`"
        )
    elif status == 403:
        text = (
            f"{_host()} refuses access (403): the account or token in use may not read it; "
            "`hf auth login` changes the token"
        )
    elif status == 429:
        seconds = _retry_after(error)
        when = f"in {seconds:.0f} seconds" if seconds else "in some minutes"
        text = f"{_host()} asks for fewer requests (429): run the same command again {when}; {kept}"
    elif status is None:
        text = f"the connection to {_host()} failed ({error}): run the same command again; {kept}"
    elif status >= 500:
        text = f"{_host()} has trouble of its own ({status}): run the same command again later; {kept}"
    else:
        text = f"{_host()} answers with status {status}: run the same command again later; {kept}"
    return ModelNotFound(f"{where}: {text}")


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
            temporary = ref.with_name(f"{ref.name}.{os.getpid()}.writing")
            temporary.write_text(repository.commit)
            temporary.replace(ref)


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


@contextmanager
def _claimed(target: Path, meter: Meter, stop: Event) -> Iterator[IO[bytes] | None]:
    """The partial file of `target`, to this process alone; None if `target` is there (another may have brought it)."""
    path, waited = _part(target), False
    while not target.exists():
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                meter.say("(waiting: another process is downloading it)")
                waited = True
                if stop.wait(0.1):
                    raise Stopped from None
                continue
            except OSError:
                pass  # a disk without locks: two processes may fetch the same bytes; the checksum still decides
            if waited:
                meter.say()
            # whoever had it may have given it its name in the meantime
            if path.exists() and path.stat().st_ino == os.fstat(part.fileno()).st_ino:
                yield part
                return
    yield None


def _part(target: Path) -> Path:
    """Where the bytes of `target` gather. Tools that clean the cache know the suffix."""
    return target.with_name(target.name + ".moelocal.incomplete")


def _digest(file: RemoteFile) -> Digest:
    if len(file.etag) == 40:
        return hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
    return hashlib.sha256()


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc or str(constants.ENDPOINT)
