"""What leaves this machine, and the files that come: the only module that may connect to other machines.

The protocol, the tokens and the layout of the cache are huggingface_hub's (https://huggingface.co/docs/huggingface_hub);
the bytes are fetched here, over HTTP with Range. huggingface_hub 2.4 begins a file anew when its process was killed and
leaves what it had on the disk for good, gives up at a 503 for a file, waits as long as a server says, and takes any
bytes of the right number for the file. Here a file goes on where it ended, whatever ended it, and gets its name only
when its checksum is the one that the repository states.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from typing import IO, TYPE_CHECKING, Any, Final, cast
from urllib.parse import quote, urlsplit

from moelocal.errors import ModelNotFound
from moelocal.units import size

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

    from moelocal.hub.repository import RemoteFile, Repository

_CHECKSUM: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
BUSY: Final = (408, 429, 500, 502, 503, 504)
"""Status codes of a server that may answer later."""
_WAITS: Final = [1.0, 2.0, 4.0, 8.0, 16.0]
"""Seconds before each new attempt; a byte that arrives starts the count again."""
_LONGEST_WAIT: Final = 300.0
"""Seconds of Retry-After that we wait; a server that asks for more is an error that says so."""


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


def bring(repository: Repository, file: RemoteFile, target: Path, meter: Meter, stop: Event) -> None:
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
                receive(repository, file, part, held, file.nbytes, digest, meter, stop)
                if digest.hexdigest() == file.etag or not _CHECKSUM.fullmatch(file.etag):
                    part.flush()
                    os.fsync(part.fileno())
                    part_of(target).replace(target)
                    return
            meter.have(-max(held, file.nbytes))
            part.truncate(0)
    raise ModelNotFound(
        f"{repository.name}: {file.name}: the bytes that {host()} sent do not have the checksum that it states "
        f"({file.etag}); they were thrown away. Run the same command again; if it stays so, tell the owner of the "
        "repository"
    )


@contextmanager
def _claimed(target: Path, meter: Meter, stop: Event) -> Iterator[IO[bytes] | None]:
    """The partial file of `target`, to this process alone; None if `target` is there (another may have brought it)."""
    path, waited = part_of(target), False
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


def part_of(target: Path) -> Path:
    """Where the bytes of `target` gather. Tools that clean the cache know the suffix."""
    return target.with_name(target.name + ".moelocal.incomplete")


def _digest(file: RemoteFile) -> Digest:
    if len(file.etag) == 40:
        return hashlib.sha1(b"blob %d\0" % file.nbytes, usedforsecurity=False)
    return hashlib.sha256()


def receive(
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
        except (client_error(), EOFError) as error:
            into.flush()
            delay = _delay(error, failures)
            if delay is None:
                raise explained(repository.name, f"{repository.name}: {file.name}", error) from None
            meter.say(f"(waiting {delay:.0f} s for {host()})")
            if stop.wait(delay):
                raise Stopped from None
            meter.say()
            failures += 1


def describe(name: str, revision: str | None, progress: bool) -> Any:
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
        except client_error() as error:
            delay = _delay(error, failures)
            if delay is None or (status_of(error) is None and "Connect" in type(error).__name__):
                raise
            with Meter(name, 0, progress) as meter:
                meter.say(f"(waiting {delay:.0f} s for {host()})")
                time.sleep(delay)
            failures += 1


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
                    f"{repository.name}: {file.name}: {host()} was asked for the bytes from {first} and sent "
                    f"{told}: something on the way there changes requests; try another network"
                )
            total = span[2]
        elif "Content-Encoding" in response.headers:
            total = None  # it is the length of the encoded bytes
        if total and total.isdigit() and int(total) != file.nbytes:
            raise _wrong_size(repository, file, total)
        yield response


def _headers(name: str) -> dict[str, str]:
    """The user's token, if there is one. Not the client's own headers: they tell the versions of other packages."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ModelNotFound(
            f"{name}: the Hugging Face token holds characters that no token has; see HF_TOKEN"
        )
    return {"User-Agent": "moelocal"} | ({"Authorization": f"Bearer {token}"} if token else {})


def _wrong_size(repository: Repository, file: RemoteFile, got: str) -> ModelNotFound:
    return ModelNotFound(
        f"{repository.name}: {file.name}: the repository lists {file.nbytes} bytes, {host()} sends {got}: "
        "run the same command again; if it stays so, tell the owner of the repository"
    )


def _delay(error: Exception, failures: int) -> float | None:
    """Seconds until another attempt: what the server asks for, or ours; None if there should be none."""
    status = status_of(error)
    if failures >= len(_WAITS) or (status is not None and status not in BUSY):
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


def status_of(error: Exception) -> int | None:
    """The HTTP status behind what the client raised; None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def client_error() -> type[Exception]:
    """The base of what the HTTP client raises: huggingface_hub 1 is built on httpx, 2 on httpx2."""
    from huggingface_hub import errors

    return cast(type[Exception], errors.HfHubHTTPError.__bases__[0])


def explained(name: str, where: str, error: Exception) -> ModelNotFound:
    """What the client raised about the repository `name`, in our words; `where`: with a revision or file."""
    from huggingface_hub import errors

    status = status_of(error)
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
        text = f"{host()} lists this file but does not have it (404): tell the owner of the repository"
    elif status == 401 and "Authorization" in cast(Any, error).response.request.headers:
        text = (
            f"{host()} does not know the token in use (401): log in again with `hf auth login`, "
            "or go without one: `hf auth logout`, and unset HF_TOKEN"
        )
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        text = (
            "no such folder and no such public repository on Hugging Face; "
            "for a private one, log in with `hf auth login`"
        )
    elif status == 403:
        text = (
            f"{host()} refuses access (403): the account or token in use may not read it; "
            "`hf auth login` changes the token"
        )
    elif status == 429:
        seconds = _retry_after(error)
        when = f"in {seconds:.0f} seconds" if seconds else "in some minutes"
        text = f"{host()} asks for fewer requests (429): run the same command again {when}; {kept}"
    elif status is None:
        text = f"the connection to {host()} failed ({error}): run the same command again; {kept}"
    elif status >= 500:
        text = f"{host()} has trouble of its own ({status}): run the same command again later; {kept}"
    else:
        text = f"{host()} answers with status {status}: run the same command again later; {kept}"
    return ModelNotFound(f"{where}: {text}")


def host() -> str:
    """The server that is asked, for messages."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc or str(constants.ENDPOINT)
