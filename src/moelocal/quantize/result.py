"""What a conversion leaves in the folder of its result: config.json with the formats, and conversion.json, which says
where the weights come from and what was done to them, and by which the same conversion knows itself again."""

from __future__ import annotations

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


def finished(folder: Path, request: str) -> Converted | None:
    """The result that is there already. Raises `RequestError` for a folder that holds anything else."""
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
        raise RequestError(
            f"{folder}: holds the result of another conversion ({found.get('source')}, recipe "
            f"{found.get('recipe', {}).get('name')}); choose a new folder with --to, or delete this one"
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
    temporary.replace(to)
