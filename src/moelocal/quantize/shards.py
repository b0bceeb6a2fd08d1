"""The source of a conversion, on this machine only as far as it is needed: `Shards`.

In the work folder:
    source.json   what was asked for and what it was resolved to; written last, so it says that the skeleton is whole
    skeleton/     config, tokenizer, templates and index as they are; of each shard a *stub*: a sparse file of the full
                  size that holds the header alone
    source/       the same names as links: to the skeleton, or for a shard whose bytes are here, to those
    downloads/    shards that are to be deleted after use

A link is replaced atomically, so each shard is a stub or whole at any moment, whenever the process may end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any, Final, Self

from moelocal import hub
from moelocal.checkpoint.files import read_header, weight_files
from moelocal.checkpoint.writing import write_json
from moelocal.errors import CheckpointError, ModelNotFound, MoelocalError, RequestError

SMALL: Final = ("*.json", "*.jinja", "tokenizer.model")
"""Names of the files beside the weights that belong to a model."""

_SKELETON: Final = Path("..", "skeleton")
_DOWNLOADS: Final = Path("..", "downloads")


class Shards:
    """The shards of a folder or repository. `folder` reads like a model folder at once: names, shapes and offsets of
    all tensors are there; the bytes of a shard from `need` to `done`.

    folder: the skeleton with the shards that are present.
    origin: "owner/name@commit", or the absolute path of a local folder.
    files: names of the shards, in order.
    state: of a local folder's shards when the conversion began (`state_of`); None for a repository.
    """

    def __init__(
        self, work: Path, told: dict[str, Any], *, offline: bool, delete: bool, progress: bool
    ) -> None:
        self.folder = work / "source"
        self.origin: str = told["origin"]
        self.files: tuple[str, ...] = tuple(told["shards"])
        self._stamps: dict[str, list[int]] = told["shards"]
        self._repository = _repository(told["repository"]) if told["repository"] else None
        self.state = None if self._repository else _digest(self._stamps)
        self._downloads = work / "downloads" if delete else None
        self._offline, self._delete, self._progress = offline, delete, progress
        self._jobs: dict[str, Future[None]] = {}
        self._stop = Event()
        # two: a shard that is waited for, and one that comes meanwhile
        self._threads = ThreadPoolExecutor(2, "moelocal-shards")

    @classmethod
    def open(
        cls,
        source: str | Path,
        work: Path,
        *,
        revision: str | None = None,
        offline: bool = False,
        delete: bool = False,
        progress: bool = True,
    ) -> Self:
        """Open `source` (a folder or the name of a repository) in the folder `work`, or continue what was opened there.
        Continuing asks the network for nothing: the commit stays the one that was found the first time.

        delete: a shard is removed at `done`: a local one from its folder (with the file that it links to), a downloaded
        one from `work`, so that no more lie on the disk than are between `need` and `done`. A shard that the Hugging
        Face cache has already is used and left there. Without it, shards are downloaded into that cache.

        Raises `ModelNotFound`, `CheckpointError`, and `RequestError` if `work` holds another source.
        """
        place = hub.locate(source)
        asked = [str(place.resolve()) if isinstance(place, Path) else place, revision]
        state = work / "source.json"
        if state.exists():
            try:
                told = json.loads(state.read_text("utf-8"))
            except ValueError:
                raise CheckpointError(f"{state}: damaged; delete its folder and start again") from None
            if told["asked"] != asked:
                _compare(told, place, revision, offline, progress, work)
        else:
            # perhaps of another source: what is left of a process that was killed before it was whole
            shutil.rmtree(work / "skeleton", ignore_errors=True)
            told = {"asked": asked} | _begin(place, work / "skeleton", revision, offline, progress)
            write_json(state, told)
        shards = cls(work, told, offline=offline, delete=delete, progress=progress)
        with hub.writing(shards.origin, work):
            shards.folder.mkdir(exist_ok=True)
            for path in (work / "skeleton").iterdir():
                shards._connect(path.name)
        return shards

    def need(self, files: Iterable[str], soon: str | None = None) -> None:
        """Return when the bytes of these shards are in `folder`. `soon` comes meanwhile, and after.

        Raises `ModelNotFound` if one cannot be downloaded, `CheckpointError` if a local one was deleted.
        """
        names = list(files)
        self._start(names)
        if soon is not None:
            with suppress(MoelocalError):  # it is raised when the shard is needed, if it is still so
                self._start([soon])
        pending = {self._jobs[name] for name in names if name in self._jobs and not self._is_here(name)}
        if pending and self._repository:
            wanted = [self._repository.files[name] for name in names]
            left = hub.remaining(self._repository, wanted, self._downloads)
            with hub.Meter(self._repository.name, left, self._progress) as meter:
                while pending:
                    finished, pending = wait(pending, 0.2, FIRST_EXCEPTION)
                    for job in finished:
                        job.result()
                    now = hub.remaining(self._repository, wanted, self._downloads)
                    meter.advance(left - now)
                    left = now

    def done(self, file: str) -> None:
        """No tensor of `file` is needed any more. May be called again, as after a restart."""
        link = self.folder / file
        target = link.readlink()
        ours = target.is_relative_to(_DOWNLOADS)
        if self._delete and (ours or (self._repository is None and not target.is_relative_to(_SKELETON))):
            if target.is_symlink():
                link.resolve().unlink(missing_ok=True)
            # the link last: a link that leads nowhere is one that `open` puts back to the stub
            (self.folder / target).unlink(missing_ok=True)
            self._link(file, _SKELETON / file)

    def room(self) -> tuple[Path, int]:
        """Where shards that are not here yet go, and how many bytes they will take at most: all of them, or with
        `delete` the two largest."""
        if self._repository is None:
            return self.folder, 0
        missing = [self._repository.files[name] for name in self.files if not self._is_here(name)]
        if self._downloads is None:
            return hub.storage(self._repository), hub.remaining(self._repository, missing)
        return self._downloads, sum(sorted(file.nbytes for file in missing)[-2:])

    def close(self) -> None:
        """Stop what is being downloaded (it is kept, and continued another time) and wait for its threads."""
        self._stop.set()
        self._threads.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, names: list[str]) -> None:
        """Bring shards in other threads, unless they are here or on their way. Raises if that cannot succeed."""
        names = [n for n in names if not self._is_here(n) and (n not in self._jobs or self._jobs[n].done())]
        if not names:
            return
        repository = self._repository
        if repository is None:
            raise CheckpointError(
                f"{self.origin}/{names[0]}: deleted after it was converted, and now it is needed again: "
                "put it back, or begin again with another source"
            )
        if hub.is_offline(self._offline):
            raise ModelNotFound(
                f"{self.origin}: {names[0]} is not in the local cache, and offline was asked for"
            )
        left = hub.remaining(repository, map(repository.files.__getitem__, names), self._downloads)
        if self._downloads:
            hub.check_space(repository.name, left, self._downloads, "choose a folder on a larger disk")
        else:
            hub.check_space(repository.name, left, hub.storage(repository))
        for name in names:
            self._jobs[name] = self._threads.submit(self._bring, repository, name)

    def _bring(self, repository: hub.Repository, name: str) -> None:
        path = hub.fetch(repository, name, self._downloads, hub.Meter("", 0, False), self._stop)
        self._link(name, _DOWNLOADS / name if self._downloads else path.absolute())

    def _connect(self, name: str) -> None:
        """Make the link of a file of the skeleton, to the best that is here."""
        link = self.folder / name
        best = _SKELETON / name
        if name in self._stamps:
            if self._repository is None:
                local = Path(self.origin) / name
                if local.exists():
                    if _stamp(local) != self._stamps[name]:
                        raise CheckpointError(
                            f"{local}: changed since its conversion began: put the old file back, or begin again"
                        )
                    best = local
            elif link.exists() and not link.readlink().is_relative_to(_SKELETON):
                return
            elif cached := self._repository.cached(name):
                best = cached.absolute()
        if not link.exists() or link.readlink() != best:
            self._link(name, best)

    def _is_here(self, name: str) -> bool:
        link = self.folder / name
        return not link.readlink().is_relative_to(_SKELETON) and link.exists()

    def _link(self, name: str, target: Path) -> None:
        """Point the name at `target`, atomically."""
        temporary = self.folder / f".{name}.link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(self.folder / name)


def _begin(
    place: Path | str, skeleton: Path, revision: str | None, offline: bool, progress: bool
) -> dict[str, Any]:
    """Fill the skeleton; what source.json will say of the source."""
    if isinstance(place, str):
        repository = hub.find(place, revision, offline=offline, progress=progress)
        names = hub.skeleton(repository, skeleton, progress=progress)
        origin = f"{repository.name}@{repository.commit}"
        shards = {name: [repository.files[name].nbytes, 0] for name in names}
        return {"origin": origin, "repository": asdict(repository), "shards": shards}
    place = place.resolve()
    files = weight_files(place)
    stamps = {path.name: _stamp(path) for path in files}
    with hub.writing(str(place), skeleton):
        skeleton.mkdir(parents=True, exist_ok=True)
        for pattern in SMALL:
            for path in place.glob(pattern):
                shutil.copyfile(path, skeleton / path.name)
        for path in files:
            read_header(path)
            with path.open("rb") as stream:
                hub.write_stub(skeleton / path.name, hub.read_head(stream), path.stat().st_size)
    return {"origin": str(place), "repository": None, "shards": stamps}


def _compare(
    told: dict[str, Any], place: Path | str, revision: str | None, offline: bool, progress: bool, work: Path
) -> None:
    """Raises `RequestError` unless `place` is what `told` says under another name."""
    if isinstance(place, str):
        repository = hub.find(place, revision, offline=offline, progress=progress)
        origin = f"{repository.name}@{repository.commit}"
    else:
        origin = str(place.resolve())
    if told["origin"] != origin:
        raise RequestError(
            f"{work}: holds a conversion of {told['origin']}, and {origin} was asked for: "
            "name another folder, or remove this one to begin again"
        )


def _repository(told: dict[str, Any]) -> hub.Repository:
    files = {name: hub.RemoteFile(**file) for name, file in told["files"].items()}
    return hub.Repository(told["name"], told["revision"], told["commit"], files)


def state_of(folder: Path) -> str | None:
    """What changes when a shard of a local folder does; None if not all are there, as after their deletion."""
    try:
        return _digest({path.name: _stamp(path) for path in weight_files(folder)})
    except (CheckpointError, OSError):
        return None


def _digest(stamps: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> list[int]:
    """What changes when a file does: size and time of change."""
    return [path.stat().st_size, path.stat().st_mtime_ns]
