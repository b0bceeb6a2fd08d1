"""One bounded pass from original weights to a quantized checkpoint: read a piece, quantize it, put it in its place.

Until the result is finished, its folder holds `.conversion/`: the source as far as it is needed (`shards`), the output
files (`checkpoint.writing`), and the journal of finished pieces. So memory holds one piece whatever the model is, a
process that was killed at any point goes on with the next piece, and its result has the same bytes. config.json comes
last: a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal, Protocol, get_args

import mlx.core as mx

from moelocal import hub
from moelocal.checkpoint.scope import Checkpoint
from moelocal.checkpoint.writing import Output, Tensor, disk_errors, write_json
from moelocal.config import ModelConfig, read_json
from moelocal.errors import CheckpointError, RequestError
from moelocal.formats import QuantizedArray
from moelocal.model import Decoder
from moelocal.ops.group_search import group_search
from moelocal.ops.min_max import min_max
from moelocal.quantize.fit import fit
from moelocal.quantize.journal import Journal, locked
from moelocal.quantize.pieces import (
    Piece,
    Plan,
    interleave,
    parts_of,
    pieces_of,
    spec_of,
    stored_dtype,
    tensors_of,
)
from moelocal.quantize.recipe import Recipe
from moelocal.quantize.result import MANIFEST, WORK, Converted, config_of, copy, finished
from moelocal.quantize.shards import Shards
from moelocal.units import size

FORMAT: Final = 1
"""Of journal and result: another number for every change that changes bytes."""

Method = Literal["search", "minmax"]
Report = Callable[[str, int, int], None]
"""What is being done, how many bytes of how many."""

_BEGUN: Final = "calibration"
"""In the journal: the calibrator needs the source's embedding no longer."""

WAITING: Final = "waiting for the source"
"""What is reported before a shard is waited for, which may draw a bar of its own."""


class Calibrator(Protocol):
    """Quantizes with what it measured on texts. Called once `begin`, then for every layer in order `layer`, or `resume`
    if an earlier run finished it, then `head`. Each call gets its own checkpoint, which hands out each tensor once.

    `digest`: everything that its results depend on besides the weights. Equal calls must give equal bits.
    """

    digest: str

    def begin(self, source: Checkpoint, output: Checkpoint, work: Path) -> None:
        """The embedding is finished and can be read from the output; from the source too, unless an earlier run has
        returned from here. What is put into the folder `work` is there for the runs that follow."""

    def layer(self, index: int, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
        """Quantized matrices of a layer by path, in the formats of the plan; those left out are quantized without
        calibration. The weights of the layer can be read from the source."""

    def resume(self, index: int, output: Checkpoint) -> None:
        """A layer that an earlier run finished: it can be read from the output, and no longer from the source."""

    def head(self, source: Checkpoint, plan: Plan) -> Mapping[str, QuantizedArray]:
        """As `layer`, for `lm_head`; the final norm can be read too. Not called where the embedding is the head."""


@dataclass(frozen=True, slots=True)
class _Unit:
    """Pieces after which shards may go; `layer` -1 is the embedding, the number of layers the head, None anything."""

    pieces: Sequence[Piece]
    layer: int | None = None

    @property
    def files(self) -> list[str]:
        return sorted({file for piece in self.pieces for file in piece.files})


def convert(
    source: str | Path,
    to: str | Path,
    recipe: Recipe,
    *,
    method: Method = "search",
    target: int | None = None,
    delete_source: bool = False,
    revision: str | None = None,
    offline: bool = False,
    dequantize: bool = False,
    calibrator: Calibrator | None = None,
    report: Report = lambda what, done, total: None,
    progress: bool = False,
) -> Converted:
    """Quantize a folder or a Hugging Face repository into the folder `to`. What an earlier run of the same conversion
    finished there is taken as it is.

    `target`: bytes that the weights may take, to which the recipe is fitted. `delete_source`: delete each source shard
    once its tensors are on the disk. `dequantize`: accept a quantized source. `progress`: show downloads on a terminal;
    all else is told to `report`.

    Raises `RequestError` (a folder that cannot be the target), `ModelNotFound`, `ConfigError`, `UnsupportedModel`,
    `CheckpointError` (a source that cannot be quantized, no space left).
    """
    if method not in get_args(Method):
        raise RequestError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    place = hub.locate(source)
    try:
        folder = Path(to).expanduser().resolve()
    except RuntimeError as error:
        raise RequestError(f"{to}: {error}".rstrip(".")) from None
    if isinstance(place, Path) and folder.exists() and folder.samefile(place):
        raise RequestError(f"{to}: is the source itself; choose another folder with --to")
    request = {
        "format": FORMAT,
        "source": str(place.resolve() if isinstance(place, Path) else place),
        "revision": revision,
        "recipe": recipe.digest,
        "method": method,
        "target size": target,
        "dequantize": dequantize,
        "calibration": None if calibrator is None else calibrator.digest,
    }
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    if (already := finished(folder, digest, place)) is not None:
        return already
    work = folder / WORK
    with locked(work):
        # another process may have finished it just now
        if (already := finished(folder, digest, place)) is not None:
            return already
        try:
            with closing(
                Shards.open(
                    source, work, revision=revision, offline=offline, delete=delete_source, progress=progress
                )
            ) as shards:
                run = _Conversion(folder, shards, recipe, method, target, dequantize, calibrator, report)
                with closing(run.output):
                    run.reserve()
                    run.run(request)
                    done = run.finish(digest)
        except BaseException:
            if not (work / "journal").exists():  # nothing was begun
                shutil.rmtree(work, ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()
            raise
        shutil.rmtree(work, ignore_errors=True)
    return done


class _Conversion:
    """One run: what is to be written, and the state of it."""

    def __init__(
        self,
        folder: Path,
        shards: Shards,
        recipe: Recipe,
        method: Method,
        target: int | None,
        dequantize: bool,
        calibrator: Calibrator | None,
        report: Report,
    ) -> None:
        self.folder, self.shards, self.recipe = folder, shards, recipe
        self.method, self.target, self.calibrator, self.report = method, target, calibrator, report
        self.raw = read_json(shards.folder / "config.json")
        self.source_config = ModelConfig.parse(self.raw)
        checked = Checkpoint.open(shards.folder, self.source_config)
        dtype = checked.compute_dtype
        Decoder(checked, dtype, evaluate=False)  # names, shapes and formats fit, or it raises
        if checked.packed and not dequantize:
            raise CheckpointError(
                f"{shards.origin}: is quantized already ({len(checked.packed)} matrices); take the original weights, "
                "or let `moelocal quantize --dequantize` quantize these once more, which adds to their error"
            )
        self.entries, self.skipped, self.dtype = checked.entries, checked.skipped, dtype
        self.checkpoint = self.source(split=False)
        self.parts = parts_of(self.checkpoint, checked.packed)
        shapes = {part.name: part.shape for part in parts_of(self.source(), checked.packed)}
        self.plan: Plan = recipe.plan(self.source_config, shapes)
        if target is not None:
            self.plan = self._fitted(target, shapes)
        self.output = Output(folder, folder / WORK, self._tensors(self.plan))
        self.config = config_of(self.raw, self.parts, self.plan, self.source_config)
        self.units = _units(
            pieces_of(self.parts, self.checkpoint), self.source_config, calibrator is not None
        )
        self.total = sum(piece.nbytes for unit in self.units for piece in unit.pieces)

    def _tensors(self, plan: Plan) -> list[Tensor]:
        return [
            t
            for part in self.parts
            for t in tensors_of(part, spec_of(part, plan), self.checkpoint, self.dtype)
        ]

    def _fitted(self, target: int, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
        """The plan of at most `target` bytes, also where matrices of different formats are written as one."""
        goal = target
        while True:
            plan = fit(self.recipe, self.source_config, shapes, goal, dtype_size=self.dtype.size)
            nbytes = sum(tensor.nbytes for tensor in self._tensors(plan))
            if nbytes <= target:
                return plan
            goal -= nbytes - target

    def source(self, split: bool = True) -> Checkpoint:
        """The source, nothing read yet."""
        return Checkpoint.of(self.shards.folder, self.source_config, self.entries, split)

    def result(self) -> Checkpoint:
        """The output as far as it is written."""
        return Checkpoint.of(self.folder, ModelConfig.parse(self.config), self.output.entries())

    def reserve(self) -> None:
        """Raise `CheckpointError` if a disk has no room for the output, or for shards that are still to come."""
        place, shards = self.shards.room()
        needed = {self.folder: self.output.missing}
        if shards:
            place = next(path for path in (place, *place.parents) if path.exists())
            shared = place.stat().st_dev == self.folder.stat().st_dev
            needed = {self.folder: self.output.missing + shards} if shared else needed | {place: shards}
        for folder, nbytes in needed.items():
            if nbytes > (free := shutil.disk_usage(folder).free):
                raise CheckpointError(
                    f"{folder}: {size(nbytes)} are needed, but only {size(free)} are free on this disk; free "
                    "some space, or choose another one with --to"
                )

    def run(self, request: Mapping[str, Any]) -> None:
        """Write all pieces that are not written."""
        job = {**request, "source": self.shards.origin, "layout": self.output.digest}
        self.journal = Journal(self.folder / WORK / "journal", job)
        self.output.prepare()
        self._check()
        last_use = {file: i for i, unit in enumerate(self.units) for file in unit.files}
        order = list(dict.fromkeys(file for unit in self.units for file in unit.files))
        after = dict(itertools.pairwise(order))
        here: set[str] = set()
        progress = 0
        for i, unit in enumerate(self.units):
            if any(piece.name not in self.journal.pieces for piece in unit.pieces):
                if not here.issuperset(unit.files):
                    self.report(WAITING, progress, self.total)
                    here.update(unit.files)
                self.shards.need(unit.files, after.get(max(unit.files, key=order.index)))
                made = self._calibrated(unit)
                for piece in unit.pieces:
                    if piece.name not in self.journal.pieces:
                        self._write(piece, made.get(piece.part.path))
                    progress += piece.nbytes
                    self.report("quantizing", progress, self.total)
                made = {}  # a layer's result is not held while the next one is fitted
            else:
                progress += sum(piece.nbytes for piece in unit.pieces)
                if (
                    self.calibrator is not None
                    and unit.layer is not None
                    and 0 <= unit.layer < len(self.source_config.layers)
                ):
                    self.calibrator.resume(unit.layer, self.result())
            if self.calibrator is not None and unit.layer == -1:
                if _BEGUN not in self.journal.pieces:
                    self.shards.need(unit.files)
                self.calibrator.begin(self.source(), self.result(), self.folder / WORK)
                if _BEGUN not in self.journal.pieces:
                    self.journal.add(_BEGUN, 0)
            for file in unit.files:
                if last_use[file] == i:
                    self.shards.done(file)

    def _check(self) -> None:
        """Forget journalled pieces whose bytes are not what was written."""
        pieces = [p for unit in self.units for p in unit.pieces if p.name in self.journal.pieces]
        done, total = 0, sum(piece.nbytes for piece in pieces)
        for piece in pieces:
            checksum = 0
            for tensor in tensors_of(piece.part, spec_of(piece.part, self.plan), self.checkpoint, self.dtype):
                checksum = self.output.checksum(tensor.name, piece.first, piece.last, checksum)
            if checksum != self.journal.pieces[piece.name]:
                del self.journal.pieces[piece.name]
            done += piece.nbytes
            self.report("checking what is there", done, total)

    def _calibrated(self, unit: _Unit) -> Mapping[str, QuantizedArray]:
        if self.calibrator is None or unit.layer is None or unit.layer < 0:
            return {}
        for piece in unit.pieces:
            piece.part.read(piece.first, piece.last)  # NaN found here is named
        parts = {piece.part.path: piece.part for piece in unit.pieces}
        plan = {path: spec_of(part, self.plan) for part in parts.values() for path in part.matrices}
        if unit.layer < len(self.source_config.layers):
            made = self.calibrator.layer(unit.layer, self.source(), plan)
        else:
            made = self.calibrator.head(self.source(), plan) if plan else {}
        joined = {path: interleave(part, made, self.source_config) for path, part in parts.items()}
        return {path: matrix for path, matrix in joined.items() if matrix is not None}

    def _write(self, piece: Piece, made: QuantizedArray | None) -> None:
        part, spec, checksum = piece.part, spec_of(piece.part, self.plan), 0
        if made is not None:
            assert made.spec == spec, (part.path, made.spec, spec)
            arrays = tuple(a[piece.first : piece.last] for a in made.astype(self.dtype).arrays)
        else:
            array = part.read(piece.first, piece.last)
            if spec is None:
                arrays = (array.astype(stored_dtype(part, self.dtype)),)
            elif self.method == "search":
                arrays = group_search(array, spec, None, self.dtype).arrays
            else:
                arrays = min_max(array, spec, self.dtype).arrays
        for tensor, array in zip(tensors_of(part, spec, self.checkpoint, self.dtype), arrays, strict=True):
            checksum = self.output.write(tensor.name, piece.first, array, checksum)
        self.output.sync()
        self.journal.add(piece.name, checksum)
        mx.clear_cache()

    def finish(self, request: str) -> Converted:
        """Everything is written: give it its place, config.json last."""
        with disk_errors(self.folder):
            for file in sorted(self.shards.folder.iterdir()):
                if not file.name.endswith(".safetensors") and file.name not in (
                    "config.json",
                    "model.safetensors.index.json",
                ):
                    copy(file, self.folder / file.name)
        self.output.publish()
        left_out = {kind: len(names) for kind, names in self.skipped.items()}
        manifest = {
            "request": request,
            "source": Path(self.shards.origin).name if self.shards.state else self.shards.origin,
            "source_state": self.shards.state,
            "recipe": {"name": self.recipe.name, "digest": self.recipe.digest},
            "method": self.method,
            "target_size": self.target,
            "calibration": None if self.calibrator is None else self.calibrator.digest,
            "bytes": self.output.nbytes,
            "source_bytes": self.total,
            "left_out": left_out,
            "sha256": self._digests(),
            "versions": {"moelocal": version("moelocal"), "mlx": version("mlx")},
        }
        write_json(self.folder / MANIFEST, manifest)
        write_json(self.folder / "config.json", self.config)
        return Converted(self.folder, self.output.nbytes, self.total, left_out)

    def _digests(self) -> dict[str, str]:
        digests, done = {}, 0
        for file in self.output.files:
            digest = hashlib.sha256()
            with (self.folder / file.name).open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
                    done += len(block)
                    self.report("finishing", done, self.output.nbytes)
            digests[file.name] = digest.hexdigest()
        return digests


def _units(pieces: Sequence[Piece], config: ModelConfig, by_layer: bool) -> list[_Unit]:
    """One piece each, in the order of the shards; or embedding, layers in order, head."""
    if not by_layer:
        return [_Unit([piece]) for piece in pieces]
    units: dict[int, list[Piece]] = {index: [] for index in range(-1, len(config.layers) + 1)}
    for piece in pieces:
        name = piece.part.name
        if name.startswith("layers."):
            units[int(name.split(".")[1])].append(piece)
        else:
            units[-1 if name.startswith("embed_tokens") else len(config.layers)].append(piece)
    return [_Unit(members, index) for index, members in units.items()]
