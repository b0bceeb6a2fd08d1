"""What a state depends on besides the tokens: snapshots of anything else are never used.

The weights are named by the SHA-256 of their files. Every file is read once; its hash is then remembered in moelocal's
cache for as long as the file is the same one by path, inode, size and times. A file of the Hugging Face cache is stored
under its SHA-256 and is not read at all: who changes such a file in place has to delete the snapshots.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal import machine, metal
from moelocal.cache.keys import GRID
from moelocal.checkpoint.files import weight_files
from moelocal.config import ModelConfig
from moelocal.engine.chunks import STRIDE
from moelocal.engine.progress import late_bar
from moelocal.errors import CheckpointError
from moelocal.ops import choice
from moelocal.ops.op import forced
from moelocal.whole import whole

FORMAT: Final = 3
"""Counts changes of what is stored, and of the arithmetic that leads there."""

THREADS: Final = 4
"""Files that are read at the same time."""

_PIECE: Final = 1 << 22
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it is without reading it. Times in ns; `changed` is that of the inode, which nobody can set back."""

    path: Path
    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, file: Path) -> Stamp:
        """Links are followed. Raises `CheckpointError` if there is none."""
        try:
            path = file.resolve(strict=True)
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        return cls(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def stamps(folder: Path) -> tuple[Stamp, ...]:
    """Those of config.json and the weights, to know later whether they are still what was loaded. Raises
    `CheckpointError`."""
    return tuple(Stamp.of(file) for file in (folder / "config.json", *weight_files(folder)))


def fingerprint(
    folder: Path,
    dtype: mx.Dtype,
    config: ModelConfig,
    kv_bits: int | None,
    loaded: Sequence[Stamp] | None = None,
) -> str:
    """Names the weights in `folder`, config.json (the quantization in it), the layers of `config` (which YaRN may have
    changed), the dtypes of activations, keys and values, the device, the forms of operations and the text of their
    kernels, and the versions of MLX, NumPy and of what is stored.

    `loaded`: the `stamps` before the weights were loaded. Raises `CheckpointError` if the files are others by now, or
    cannot be read.
    """
    now = stamps(folder)
    if loaded is not None and now != tuple(loaded):
        raise CheckpointError(
            f"{folder}: its files changed since the model was loaded, so its states cannot be named; load it again"
        )
    digest = hashlib.blake2b(digest_size=16)
    version: str = mx.__version__  # type: ignore[attr-defined]
    device = mx.default_device().type.name
    for text in (
        f"{FORMAT} {STRIDE} {GRID}",
        version,
        np.__version__,
        device,
        str(dtype),
        _forms(),
        f"{kv_bits} {config.layers}",
        *(
            f"{file.name} {content}"
            for file, content in zip(weight_files(folder), _contents(now[1:]), strict=True)
        ),
    ):
        digest.update(text.encode() + b"\0")
    digest.update((folder / "config.json").read_bytes())
    return digest.hexdigest()


def _forms() -> str:
    if not metal.available():
        return f"{forced()}"
    chosen = choice.current()
    entries = [] if chosen is None else sorted(map(repr, chosen.entries))
    texts = hashlib.sha256()
    for file in sorted(metal.FOLDER.glob("*.metal")):
        texts.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return f"{forced()} {metal.executor() is not None} {entries} {texts.hexdigest()}"


def _contents(files: Sequence[Stamp]) -> list[str]:
    """The SHA-256 of each file: its name in the Hugging Face cache, what was remembered, or read now."""
    known = {stamp: content for stamp in files if (content := _named(stamp) or _remembered(stamp))}
    unread = [stamp for stamp in files if stamp not in known]
    if unread:
        what, total = "reading the weights once, to name their states", sum(stamp.size for stamp in unread)
        with late_bar(what, total) as advance, ThreadPoolExecutor(THREADS) as pool:
            stopped = threading.Event()
            waiting = [pool.submit(_sha256, stamp, advance, stopped) for stamp in unread]
            try:
                for stamp, future in zip(unread, waiting, strict=True):
                    known[stamp] = future.result()
                    _remember(stamp, known[stamp])
            finally:  # also when interrupted: the pool waits for its threads
                stopped.set()
    return [known[stamp] for stamp in files]


def _named(stamp: Stamp) -> str | None:
    """Of models--OWNER--NAME/blobs/SHA256, as huggingface_hub stores large files."""
    *_, repository, folder, name = ("", "", *stamp.path.parts)
    in_cache = folder == "blobs" and repository.startswith("models--")
    return name if in_cache and _SHA256.fullmatch(name) else None


def _sha256(stamp: Stamp, advance: Callable[[int], None], stopped: threading.Event) -> str:
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    try:
        with stamp.path.open("rb", buffering=0) as stream:
            while not stopped.is_set() and (count := stream.readinto(piece)):
                digest.update(memoryview(piece)[:count])
                advance(count)
    except OSError as error:
        raise CheckpointError(f"{stamp.path}: cannot be read: {error.strerror}") from None
    if Stamp.of(stamp.path) != stamp:
        raise CheckpointError(f"{stamp.path}: changed while it was read; load the model again")
    return digest.hexdigest()


def _memo(stamp: Stamp) -> Path:
    """A file for each, so that processes that write at the same time lose nothing of each other's."""
    name = hashlib.sha256(os.fsencode(stamp.path)).hexdigest()
    return machine.cache_folder() / "hashes" / f"{name}.json"


def _fields(stamp: Stamp) -> dict[str, str | int]:
    return {
        "path": os.fsencode(stamp.path).hex(),
        "size": stamp.size,
        "modified": stamp.modified,
        "changed": stamp.changed,
        "inode": stamp.inode,
    }


def _remembered(stamp: Stamp) -> str | None:
    """What was noted of exactly this file; None if nothing was, or what is there is damaged."""
    try:
        found = json.loads(_memo(stamp).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    content = found.pop("sha256", None) if isinstance(found, dict) else None
    if not isinstance(content, str) or not _SHA256.fullmatch(content) or found != _fields(stamp):
        return None
    return content


def _remember(stamp: Stamp, content: str) -> None:
    """A cache that cannot be written costs only that the file is read again."""
    memo = _memo(stamp)
    with contextlib.suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        with whole(memo, private=True) as stream:
            stream.write(json.dumps(_fields(stamp) | {"sha256": content}).encode())
