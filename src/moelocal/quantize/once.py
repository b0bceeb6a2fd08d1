"""What `load` does with original weights: quantize them once, into the cache of moelocal, if they do not fit."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Final

from moelocal import hub, machine
from moelocal.errors import RequestError
from moelocal.quantize.convert import convert
from moelocal.quantize.progress import progress_bar
from moelocal.quantize.recipe import Recipe
from moelocal.quantize.result import MANIFEST
from moelocal.quantize.shards import SMALL
from moelocal.quantize.sizes import WORKING, Memory, Sizes, context_that_fits, shapes_of, sizes
from moelocal.survey import Survey, survey
from moelocal.units import size

AUTOMATIC: Final = ("balanced", "small")
"""The recipes that are chosen without being asked for, the first that fits."""

LEAST_CONTEXT: Final = 8192
"""Tokens of context that must fit beside the weights."""


def prepared(
    model: str | Path | None,
    quantization: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Path:
    """The folder to load a model from, downloaded and quantized as need be.

    `quantization`: a recipe (a name or a file); "none" for the weights as they are; "auto" for that too, unless they
    are unquantized and do not fit this machine's memory: then the first of `AUTOMATIC` that does. What is quantized
    here is kept, and found again without a network. Raises `RequestError` if nothing fits, and what `hub.resolve` and
    `convert` raise.
    """

    def as_it_is() -> Path:
        return hub.resolve(model, revision=revision, offline=offline, progress=progress)

    def made(recipe: Recipe) -> Path:
        with progress_bar(progress) as report:
            return convert(
                place,
                _folder(place, recipe, revision),
                recipe,
                # what lies in a folder of the user's stays; a download is not needed any more
                delete_source=isinstance(place, str),
                revision=revision,
                offline=offline,
                report=report,
                progress=progress and sys.stderr.isatty(),
            ).folder

    place = hub.EMBEDDED if model is None else hub.locate(model)
    if quantization == "none":
        return as_it_is()
    if quantization != "auto":
        return made(Recipe.open(quantization))
    usable, recipes = Memory.here().usable - WORKING, [Recipe.open(name) for name in AUTOMATIC]
    if isinstance(place, Path):
        if sum(file.stat().st_size for file in place.glob("*.safetensors")) <= usable:
            return place
    else:
        for recipe in recipes:
            if (_folder(place, recipe, revision) / MANIFEST).exists():
                return made(recipe)
    with hub.outline(model, revision=revision, offline=offline, progress=progress) as outline:
        found = survey(outline)
    if found.packed or found.nbytes <= usable:
        return as_it_is()
    for recipe in recipes:
        then = _sizes(found, recipe)
        if (context_that_fits(found.config, then, usable + WORKING) or 0) >= min(
            LEAST_CONTEXT, found.config.context
        ):
            if progress:
                print(
                    f"{model}: {size(found.nbytes)} of weights do not fit the {size(usable)} that this machine "
                    f"has for them: quantizing them once to {recipe.name}, {size(then.nbytes)}. "
                    f"`moelocal inspect {model}` shows other recipes.",
                    file=sys.stderr,
                )
            return made(recipe)
    raise RequestError(
        f"{model}: {size(found.nbytes)} of weights, or {size(then.nbytes)} as {recipe.name}, do not fit the "
        f"{size(usable)} that this machine has for them; take a smaller model, or try it with quantization: none"
    )


def _sizes(found: Survey, recipe: Recipe) -> Sizes:
    shapes = shapes_of(found.config)
    return sizes(found.config, shapes, recipe.plan(found.config, shapes), found.dtype.size)


def _folder(place: Path | str, recipe: Recipe, revision: str | None) -> Path:
    """Where the quantized form of a model lies: a repository by name and revision, a folder by the files
    of the model that lie in it now."""
    if isinstance(place, str):
        name = place.replace("/", "--") + ("" if revision is None else f"@{revision.replace('/', '-')}")
    else:
        digest = hashlib.sha256(str(place.resolve()).encode())
        files = (
            file for pattern in (*SMALL, "*.safetensors") for file in place.glob(pattern) if file.exists()
        )
        for file in sorted(files):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\0".encode())
        name = f"{place.resolve().name}-{digest.hexdigest()[:12]}"
    return machine.cache_folder() / "models" / f"{name}-{recipe.name}-{recipe.digest[:8]}"
