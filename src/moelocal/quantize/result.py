"""What a conversion leaves in the folder of its result: config.json with the formats, and conversion.json, which says
where the weights come from and what was done to them, and by which the same conversion knows itself again."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moelocal.checkpoint.names import mlx_name
from moelocal.config import ModelConfig, read_json
from moelocal.errors import ConfigError, RequestError
from moelocal.formats import QuantSpec
from moelocal.quantize.pieces import Part, Plan, spec_of
from moelocal.quantize.shards import state_of

WORK: Final = ".conversion"
"""The folder, inside that of the result, of what is not finished."""

MANIFEST: Final = "conversion.json"


@dataclass(frozen=True, slots=True)
class Converted:
    """The result: its folder, bytes of its weights and of what they were made from; `left_out`: tensors by kind;
    `before`: it was there already."""

    folder: Path
    nbytes: int
    source_nbytes: int
    left_out: Mapping[str, int]
    before: bool = False


def finished(folder: Path, request: str, source: Path | str) -> Converted | None:
    """The result that is there already. Raises `RequestError` for a folder that holds anything else, for a result of
    which weights are missing, and for one of a folder `source` whose weights have changed since."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise RequestError(f"{folder}: is a file; the result needs a folder")
    others = sorted(path.name for path in folder.iterdir() if path.name != WORK)
    if not others:
        return None
    try:
        found = read_json(folder / MANIFEST)
        read_json(folder / "config.json")
    except ConfigError:
        if (folder / WORK / "journal").exists():
            return None
        raise RequestError(
            f"{folder}: holds files that no conversion wrote, {others[0]} among them; choose a new folder with --to"
        ) from None
    if found.get("request") != request:
        recipe = found.get("recipe")
        name = recipe.get("name") if isinstance(recipe, dict) else recipe
        raise RequestError(
            f"{folder}: holds the result of another conversion ({found.get('source')}, recipe {name}); "
            "choose a new folder with --to, or delete this one"
        )
    weights = [folder / name for name in found["sha256"]]
    if sum(file.stat().st_size for file in weights if file.is_file()) != found["bytes"]:
        raise RequestError(
            f"{folder}: weights of this result were removed or cut off after it was finished; "
            "delete the folder and run the same command again"
        )
    if isinstance(source, Path) and state_of(source) not in (None, found.get("source_state")):
        raise RequestError(
            f"{folder}: holds what was made of {source} before the weights there changed; "
            "choose a new folder with --to, or delete this one"
        )
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return Converted(folder, found["bytes"], found["source_bytes"], found["left_out"], before=True)


def config_of(
    raw: Mapping[str, Any], parts: Sequence[Part], plan: Plan, config: ModelConfig
) -> dict[str, Any]:
    """config.json of the result: the source's, without the vision tower that is left out, and with the formats. The
    most frequent one is the default; every matrix that deviates has an entry, for readers that trust config.json."""
    result = {key: value for key, value in raw.items() if key != "vision_config"}
    result["model_type"] = config.architecture  # mlx-lm knows no text-only forms, whose names end in _text
    if isinstance(text := raw.get("text_config"), dict):
        result["text_config"] = dict(text)
    for place in (result, result.get("text_config", {})):
        place.pop("quantization", None)
        place.pop("quantization_config", None)
    formats = {part.path: spec_of(part, plan) for part in parts if part.matrices}
    counts = Counter(spec for spec in formats.values() if spec is not None)
    if not counts:
        return result
    default = max(counts, key=lambda spec: (counts[spec], -spec.bits, -spec.group))
    entries = {
        mlx_name(path, config): _entry(spec) if spec else False
        for path, spec in formats.items()
        if spec != default
    }
    result["quantization"] = result["quantization_config"] = {**_entry(default), **entries}
    return result


def _entry(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group, "bits": spec.bits, "mode": spec.mode}


def copy(file: Path, to: Path) -> None:
    """Copy a file so that it is there whole or not at all."""
    temporary = to.with_name(f".{to.name}.part")
    shutil.copyfile(file, temporary)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(to)
