"""The reference's distributions and routes, kept on disk: the original runs once, however many quantizations follow.

A reference is a folder in moelocal's cache, one safetensors file per sequence. Its name is a digest of its `Stamp`:
everything that its numbers depend on. Weights are told apart without reading all of them: by config.json, and of each
file name, size, time of change, tensors, `SAMPLES` pieces of its data, and in the Hugging Face cache the name of the
blob, which is the hash of its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np

import moelocal
from moelocal import machine
from moelocal.checkpoint.files import read_header, weight_files
from moelocal.checkpoint.scope import Checkpoint
from moelocal.errors import CheckpointError, RequestError
from moelocal.evaluate.distribution import MOST, NEGLIGIBLE, Array, Distributions, joined
from moelocal.evaluate.walk import Experts, walk
from moelocal.ops import choice
from moelocal.ops.op import forced
from moelocal.quantize.corpus import Corpus
from moelocal.quantize.streamed import Report

SAMPLES: Final = 16
_PIECE: Final = 4096
_MODULES: Final = (
    *("config.py", "formats.py", "model.py", "checkpoint/*.py", "cache/*.py", "layers/*.py", "ops/*.py"),
    *("quantize/streamed.py", "evaluate/distribution.py", "evaluate/walk.py"),
)
_FORMAT: Final = "moelocal reference, 1"
_LEFT: Final = re.compile(r"[0-9a-f]{32}\.(\d+)\.part")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the numbers of a reference depend on; equal stamps, equal numbers. `code`: kernels and ops (`choice.Stamp`);
    `sources`: what else computes."""

    weights: str
    corpus: str
    dtype: str
    device: str
    forms: str
    chip: str
    macos: str
    mlx: str
    code: str
    sources: str
    version: str
    most: int = MOST
    negligible: float = NEGLIGIBLE
    format: str = _FORMAT

    @classmethod
    def of(cls, folder: Path, corpus: Corpus, dtype: mx.Dtype) -> Stamp:
        """Of a run on this machine, with the weights in `folder` as they are now. Raises `CheckpointError`."""
        here = choice.Stamp.here()
        return cls(
            sources=_sources(),
            weights=_weights(folder),
            corpus=corpus.digest,
            dtype=str(dtype).removeprefix("mlx.core."),
            device=mx.default_device().type.name,
            forms=forced(),
            version=moelocal.__version__,
            **asdict(here),
        )

    @property
    def folder(self) -> Path:
        """Where the reference lies, or would."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return machine.cache_folder() / "references" / digest[:32]


def _sources() -> str:
    """Of the modules that numbers come from: with every release they may change, and for whoever works on them."""
    package = Path(moelocal.__file__).parent
    found = hashlib.sha256()
    for pattern in _MODULES:
        for file in sorted(package.glob(pattern)):
            found.update(file.read_bytes())
    return found.hexdigest()


def _weights(folder: Path) -> str:
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        real, about = file.resolve(), file.stat()
        entries = sorted((e.name, e.dtype, e.shape) for e in read_header(file))
        found.update(repr((file.name, real.name, about.st_size, about.st_mtime_ns, entries)).encode())
        with file.open("rb") as stream:  # some systems give every file the same time
            for number in range(SAMPLES):
                stream.seek(max(about.st_size - _PIECE, 0) * number // (SAMPLES - 1))
                found.update(stream.read(_PIECE))
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class Reference:
    """The stored reference of a stamp; `reused` where an earlier run made it."""

    stamp: Stamp
    reused: bool

    def read(self, number: int) -> tuple[Distributions, Experts]:
        """What is kept of one sequence. Raises `CheckpointError` for a file that is missing, damaged or foreign."""
        return _read(self.stamp.folder, self.stamp, number)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.stamp.folder.iterdir())


def obtain(
    checkpoint: Checkpoint,
    corpus: Corpus,
    dtype: mx.Dtype,
    report: Report = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> Reference:
    """The reference of these weights on this corpus, from the cache or computed now; `note` is told in one line when a
    damaged one is replaced.

    Raises `CheckpointError`, `NumericsError`; `RequestError` if it cannot be written.
    """
    stamp = Stamp.of(checkpoint.folder, corpus, dtype)
    if stamp.folder.exists():
        try:
            for number in range(len(corpus.sequences)):
                _read(stamp.folder, stamp, number)
            return Reference(stamp, True)
        except CheckpointError as error:
            note(f"the stored reference is damaged and is computed again: {error}")
            shutil.rmtree(stamp.folder, ignore_errors=True)
    _compute(checkpoint, corpus, dtype, report, stamp)
    return Reference(stamp, False)


def _compute(checkpoint: Checkpoint, corpus: Corpus, dtype: mx.Dtype, report: Report, stamp: Stamp) -> None:
    """Write the whole folder beside its place, then move it there."""
    part = stamp.folder.with_name(f"{stamp.folder.name}.{os.getpid()}.part")
    try:
        with _writing(part):
            _clear(part.parent)
            shutil.rmtree(part, ignore_errors=True)  # of a process that had our number
            part.mkdir(parents=True)
        experts, chunks = walk(checkpoint, corpus, dtype, report)
        parts: list[Distributions] = []
        for chunk in chunks:
            parts.append(Distributions.of(chunk.logits, chunk.targets))
            if chunk.last:
                with _writing(part):
                    _write(part, stamp, chunk.number, joined(parts), experts[chunk.number])
                parts = []
        with _writing(part):
            if not stamp.folder.exists():  # another process may have been faster
                part.replace(stamp.folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # MLX raises the second
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(
            f"{folder}: the reference cannot be written: {reason}; free some space, or name another folder for the "
            "cache with MOELOCAL_CACHE"
        ) from None


def _clear(folder: Path) -> None:
    """Remove what killed runs left behind."""
    for part in folder.glob("*.part"):
        if not (match := _LEFT.fullmatch(part.name)):
            continue
        try:
            os.kill(int(match[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(part, ignore_errors=True)
        except OSError:
            continue  # alive, and another user's


def _file(folder: Path, number: int) -> Path:
    return folder / f"sequence-{number:05d}.safetensors"


def _write(folder: Path, stamp: Stamp, number: int, kept: Distributions, experts: Experts) -> None:
    arrays: dict[str, Array] = {f.name: getattr(kept, f.name) for f in fields(kept)}
    arrays |= {f"experts.{layer}": chosen for layer, chosen in experts.items()}
    about = {"sha256": _digest(stamp, number, arrays)}
    mx.save_safetensors(str(_file(folder, number)), {n: mx.array(a) for n, a in arrays.items()}, about)


def _read(folder: Path, stamp: Stamp, number: int) -> tuple[Distributions, Experts]:
    file = _file(folder, number)
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        read_header(file)  # before MLX is asked to read a byte
        loaded: Any = mx.load(str(file), return_metadata=True)
        arrays = {name: np.array(array) for name, array in loaded[0].items()}
    except (CheckpointError, RuntimeError, ValueError):
        raise CheckpointError(f"{file} is cut off or malformed") from None
    if loaded[1].get("sha256") != _digest(stamp, number, arrays):
        raise CheckpointError(f"{file}: its checksum does not fit its content")
    names = [f.name for f in fields(Distributions)]
    experts = {int(n.partition(".")[2]): a for n, a in arrays.items() if n.startswith("experts.")}
    return Distributions(*(arrays[name] for name in names)), experts


def _digest(stamp: Stamp, number: int, arrays: Mapping[str, Array]) -> str:
    found = hashlib.sha256(f"{json.dumps(asdict(stamp))} {number}\n".encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(array.data)
    return found.hexdigest()
