"""`moelocal inspect`: what a checkpoint is, how large, what a recipe would make of it, and what fits in memory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from moelocal import flags, hub
from moelocal.config import AttentionSpec, ModelConfig, MoESpec
from moelocal.errors import ConfigError, RequestError
from moelocal.quantize.fit import fit
from moelocal.quantize.recipe import BUILT_IN, Recipe, misfits
from moelocal.quantize.sizes import (
    WORKING,
    Memory,
    Part,
    Sizes,
    cache_per_token,
    context_that_fits,
    shapes_of,
    sizes,
    stored_sizes,
)
from moelocal.survey import Survey, survey
from moelocal.units import GIB, parse_memory, parse_size, size

_NAMES = {
    "embedding": "embedding",
    "head": "output head",
    "router": "router",
    "shared_gate": "shared expert's gate",
    "attention": "attention",
    "delta": "delta net",
    "shared": "shared expert",
    "experts": "experts",
    "dense": "feed-forward",
    "other": "norms and others",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `inspect`."""
    flags.add(parser, "model", "--revision", "--offline")
    parser.add_argument(
        "--recipe", metavar="RECIPE", help=f"what it would become: {', '.join(BUILT_IN)}, or a file"
    )
    parser.add_argument(
        "--target-size",
        metavar="SIZE",
        help="fit the recipe (balanced unless named) to so many bytes, like 20.9GB or 19.5GiB",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="what would fit on a Mac with so much, like 24GB; else this machine"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def inspect(parsed: argparse.Namespace) -> None:
    """Describe a checkpoint: size by kind of weight, bytes read per token, what fits in memory, and what a recipe
    would make of it. Of one on Hugging Face the headers alone are downloaded."""
    target = None if parsed.target_size is None else parse_size(parsed.target_size, "--target-size")
    memory = Memory.here() if parsed.memory is None else Memory.of(parse_memory(parsed.memory, "--memory"))
    recipe = None
    if parsed.recipe is not None or target is not None:
        recipe = Recipe.open(parsed.recipe or "balanced")
    progress = sys.stderr.isatty()
    with hub.outline(
        parsed.model, revision=parsed.revision, offline=parsed.offline, progress=progress
    ) as folder:
        found = survey(folder)
    place = hub.locate(parsed.model) if parsed.model else folder
    report = _Report(str(place), found, memory, recipe, target)
    print(json.dumps(report.as_json()) if parsed.json else report.as_text())


class _Report:
    """Everything that `inspect` says. Raises `RequestError` for a recipe on a checkpoint that is already quantized."""

    def __init__(
        self, place: str, found: Survey, memory: Memory, recipe: Recipe | None, target: int | None
    ) -> None:
        if recipe is not None and found.packed:
            raise RequestError(
                f"{place}: already quantized; what a recipe makes of a model depends on the original weights"
            )
        self.place, self.found, self.memory = place, found, memory
        self.config, self.recipe, self.target = found.config, recipe, target
        self.shapes = shapes_of(found.config)
        self.now = stored_sizes(found)
        self.kept: list[str] = []
        self.then: Sizes | None = None
        if recipe is not None:
            plan = recipe.plan(self.config, self.shapes)
            self.kept = misfits(plan, recipe)
            if target is not None:  # which, if it is large, keeps others, for another reason
                plan = fit(recipe, self.config, self.shapes, target, dtype_size=found.dtype.size)
            self.then = sizes(self.config, self.shapes, plan, found.dtype.size)
        self.others: list[tuple[Recipe, Sizes]] = []
        if recipe is None and not found.packed:
            for name in BUILT_IN:
                other = Recipe.open(name)
                plan = other.plan(self.config, self.shapes)
                self.others.append((other, sizes(self.config, self.shapes, plan, found.dtype.size)))

    def _context(self, found: Sizes) -> int | None:
        return context_that_fits(self.config, found, self.memory.usable)

    def as_json(self) -> dict[str, Any]:
        config, memory = self.config, self.memory

        def described(found: Sizes) -> dict[str, Any]:
            return {
                "nbytes": found.nbytes,
                "parameters": found.parameters,
                "bits_per_weight": found.bits_per_weight,
                "read_per_token_nbytes": found.read_per_token,
                "cache_per_token_nbytes": found.cache_per_token,
                "state_nbytes": found.state,
                "context_that_fits": self._context(found),
                "parts": {
                    part.name: {
                        "parameters": part.parameters,
                        "nbytes": part.nbytes,
                        "read_per_token_nbytes": part.read,
                        "formats": dict(part.formats),
                    }
                    for part in found.parts
                },
            }

        result: dict[str, Any] = {
            "model": self.place,
            "architecture": config.architecture,
            "layers": len(config.layers),
            "context": config.context,
            "files": self.found.files,
            "dtype": str(self.found.dtype).removeprefix("mlx.core."),
            "quantized": bool(self.found.packed),
            "left_out": {part.name: part.nbytes for part in self.found.left_out},
            "memory": {"nbytes": memory.total, "usable_nbytes": memory.usable, "working_nbytes": WORKING},
            "now": described(self.now),
        }
        if self.recipe is not None and self.then is not None:
            target = {} if self.target is None else {"target_nbytes": self.target}
            fitted = {"recipe": self.recipe.name, **target, "kept": self.kept}
            result["then"] = fitted | described(self.then)
        if self.others:
            result["recipes"] = {recipe.name: described(found) for recipe, found in self.others}
        return result

    def as_text(self) -> str:
        count = self.found.files
        lines = [self.place, *_described(self.config), ""]
        lines += [f"The text model in {count} {'file' if count == 1 else 'files'}: {_summary(self.now)}"]
        if self.then is None:
            lines += ["", *_parts(self.now)]
        if self.found.left_out:
            parts = ", ".join(f"{part.name} {size(part.nbytes)}" for part in self.found.left_out)
            lines += [f"Left out, because generating text does not read it: {parts}."]
        if self.recipe is not None and self.then is not None:
            name = f"recipe {self.recipe.name}"
            if self.target is not None:
                name += f", fitted to {size(self.target)}"
            lines += ["", f"With {name}: {_summary(self.then)}", "", *_parts(self.then)]
            if self.kept:
                names = ", ".join(self.kept[:4]) + (f" and {len(self.kept) - 4} more" * (len(self.kept) > 4))
                lines += [f"No group divides the columns of {names}: kept."]
        lines += ["", *self._memory(self.then or self.now)]
        if self.others:
            lines += [
                "",
                "What `moelocal quantize --recipe NAME` would make of it, and the context that fits then:",
                "",
            ]
            lines += _table(
                ("recipe", "size", "bits", "read per token", "context", ""),
                [
                    (
                        recipe.name,
                        size(found.nbytes),
                        f"{found.bits_per_weight:.2f}",
                        size(found.read_per_token),
                        "too large" if (fits := self._context(found)) is None else f"{fits:,}",
                        recipe.summary,
                    )
                    for recipe, found in self.others
                ],
            )
        return "\n".join(lines)

    def _in_bits(self, found: Sizes, kv_bits: int) -> int:
        """The context that fits with keys and values in so many bits, of weights that fit. Raises `ConfigError`."""
        per_token = cache_per_token(self.config, self.found.dtype.size, kv_bits)
        return self._context(replace(found, cache_per_token=per_token)) or 0

    def _memory(self, found: Sizes) -> list[str]:
        memory, fits = self.memory, self._context(found)
        subject = "it" if self.then is None else "the result"
        if fits is None:
            verdict = "does not fit"
        elif fits == self.config.context:
            verdict = f"fits with its whole context of {fits:,} tokens"
        else:
            verdict = f"fits with a context of {fits:,} tokens"
            with suppress(ConfigError):  # heads of a size that has no codes
                verdict += (
                    f" ({self._in_bits(found, 8):,} and {self._in_bits(found, 4):,} with --kv-bits 8 and 4)"
                )
        return [
            f"Cache: {size(found.cache_per_token)} for each token of context"
            + (f", and {size(found.state)} of states." if found.state else "."),
            f"Memory: {memory.total / GIB:.1f} GiB; {memory.source}, {size(memory.usable)}: {subject} {verdict}.",
            f"(Counted: weights, states, cache of one conversation, {size(WORKING)} for activations, an assumption.)",
        ]


def _summary(found: Sizes) -> str:
    return (
        f"{size(found.nbytes)}, {_count(found.parameters)} weights of {found.bits_per_weight:.2f} bits; "
        f"a token reads {size(found.read_per_token)}."
    )


def _described(config: ModelConfig) -> list[str]:
    layers = len(config.layers)
    attention = sum(isinstance(layer.mixer, AttentionSpec) for layer in config.layers)
    hybrid = attention < layers
    first = config.layers[0].mlp
    if isinstance(first, MoESpec):
        mlp = f"{first.experts} experts of width {first.width}, {first.per_token} per token"
        if first.shared_width:
            mlp += f", and a shared one of width {first.shared_width}"
    else:
        mlp = f"dense, width {first.width}"
    return [
        f"architecture  {config.architecture}",
        f"layers        {layers}: "
        + (f"{layers - attention} delta net, " * hybrid)
        + f"{attention} attention",
        f"feed-forward  {mlp}",
        f"size          hidden {config.hidden}, vocabulary {config.vocab:,}, context {config.context:,}",
    ]


def _parts(found: Sizes) -> list[str]:
    """The table of parts: classes of one family with the same formats share a row, the largest first."""
    rows: dict[object, list[Part]] = {}
    for part in found.parts:
        rows.setdefault((part.name.split(".")[0], part.formats), []).append(part)
    ordered = sorted(rows.values(), key=lambda parts: -sum(part.nbytes for part in parts))
    lines = [
        (
            " ".join(
                [_NAMES[parts[0].name.split(".")[0]], ", ".join(_leaf(part.name) for part in parts)]
            ).strip(),
            _formats(parts[0].formats),
            _count(sum(part.parameters for part in parts)),
            size(sum(part.nbytes for part in parts)),
            size(sum(part.read for part in parts)),
        )
        for parts in ordered
    ]
    total = ("all", "", _count(found.parameters), size(found.nbytes), size(found.read_per_token))
    table = _table(("part", "format", "weights", "size", "read per token"), [*lines, total], left=2)
    if any("groups of" in words for part in found.parts for words, _ in part.formats):
        table.append("Groups of 64 weights share a scale and a bias, or as many as stand behind a /.")
    return table


def _leaf(name: str) -> str:
    return name.partition(".")[2]


def _formats(formats: tuple[tuple[str, int], ...]) -> str:
    """ "4 bits", "5 bits in 24 layers, 4 bits/32 in 16"."""
    short = [
        (words.replace(" in groups of 64", "").replace(" in groups of ", "/"), count)
        for words, count in formats
    ]
    if len(short) == 1:
        return short[0][0]
    (first, count), *others = short
    return ", ".join([f"{first} in {count} layers", *(f"{words} in {count}" for words, count in others)])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table: the first `left` columns and the last one without a head flush left, the others flush right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < left or not head[i] else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,}"
