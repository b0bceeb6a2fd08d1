"""Recipes: which format each class of matrix gets. A recipe is a small TOML file; `recipes/` has the built-in ones.

    summary = "One line for people."
    misfit = "smaller"                # optional: "error" (default), "smaller" or "keep"

    [formats]
    default = { bits = 4, group = 64 }
    head = { bits = 6 }                                            # group 64 unless it says so
    router = "keep"                                                # stays as the source has it
    attention = { bits = 6 }                                       # all of a family, or ...
    delta.out = { bits = 8 }                                       # ... one class of it
    experts.down = { bits = 4, edges = { bits = 5, share = 0.6 } }

`edges` gives another format to that share of the layers which have such a matrix, counted from both ends of the network
inwards: first, last, second, last but one, … The published measurements behind it: layers near the ends of the flagship
are the more sensitive ones (its first and last five, APEX). A share, not a count, so that a recipe means the same at
every depth.

`misfit` says what happens to a matrix whose columns the group does not divide: "error" refuses the recipe; "smaller"
takes the largest group that divides, and keeps the matrix as it is where none does; "keep" keeps it, as mlx-lm does.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from moelocal.config import ModelConfig
from moelocal.errors import ConfigError
from moelocal.formats import QuantSpec

Plan = dict[str, QuantSpec | None]
"""Path of every matrix -> its format; None: kept as the source has it."""

BITS: Final = (2, 3, 4, 5, 6, 8)
GROUPS: Final = (32, 64, 128)
BUILT_IN: Final = ("4bit", "fast", "balanced", "quality", "small", "8bit")
"""The recipes that ship with the package, in the order in which they are shown."""

FAMILIES: Final[dict[str, tuple[str, ...]]] = {
    "attention": ("q", "k", "v", "o"),
    "delta": ("qkv", "z", "b", "a", "out"),
    "shared": ("gate", "up", "down"),
    "experts": ("gate", "up", "down"),
    "dense": ("gate", "up", "down"),
}
SINGLE: Final = ("embedding", "head", "router", "shared_gate")
CLASSES: Final = (*SINGLE, *(f"{family}.{part}" for family, parts in FAMILIES.items() for part in parts))
"""Every class of matrix; a matrix belongs to exactly one (`class_of`)."""

_PATHS: Final = {
    r"embed_tokens": "embedding",
    r"lm_head": "head",
    r"layers\.\d+\.self_attn\.([qkvo])_proj": "attention",
    r"layers\.\d+\.linear_attn\.in_proj_(qkv|z|b|a)": "delta",
    r"layers\.\d+\.linear_attn\.(out)_proj": "delta",
    r"layers\.\d+\.mlp\.gate": "router",
    r"layers\.\d+\.mlp\.shared_expert_gate": "shared_gate",
    r"layers\.\d+\.mlp\.shared_expert\.(gate|up|down)_proj": "shared",
    r"layers\.\d+\.mlp\.switch_mlp\.(gate|up|down)_proj": "experts",
    r"layers\.\d+\.mlp\.(gate|up|down)_proj": "dense",
}
_NAME: Final = re.compile(r"[\w.-]+", re.ASCII)
_FOLDER: Final = Path(__file__).parent / "recipes"

Misfit = Literal["error", "smaller", "keep"]


def class_of(path: str) -> str | None:
    """The class of the matrix at `path` (a name of ours without `.weight`); None for norms, convolutions and gates,
    which no recipe quantizes."""
    for pattern, name in _PATHS.items():
        if match := re.fullmatch(pattern, path):
            return f"{name}.{match[1]}" if match.lastindex else name
    return None


def layer_of(path: str) -> int | None:
    """The layer that a path lies in; None for embedding and head."""
    match = re.match(r"layers\.(\d+)\.", path)
    return int(match[1]) if match else None


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(path, class, shape) of every matrix among tensors by our names."""
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        kind = class_of(path) if path != name else None
        if kind is not None:
            yield path, kind, shape


def from_the_edges(layers: list[int]) -> list[int]:
    """First, last, second, last but one, …: [0, 1, 2, 3] -> [0, 3, 1, 2]."""
    ordered = sorted(layers)
    half = (len(ordered) + 1) // 2
    pairs = zip(ordered[:half], reversed(ordered[len(ordered) - half :]), strict=True)
    return list(dict.fromkeys(layer for pair in pairs for layer in pair))


@dataclass(frozen=True, slots=True)
class Rule:
    """The format of a class, None to keep it; `edges` that of the `share` of its layers nearest to the ends."""

    spec: QuantSpec | None
    edges: QuantSpec | None = None
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe: `rules` has one for every class. `digest` changes with everything that can change a plan."""

    name: str
    summary: str
    rules: Mapping[str, Rule]
    misfit: Misfit

    @property
    def digest(self) -> str:
        """Of what the recipe means, whatever its file looks like: 64 hexadecimal digits."""
        meaning = repr(([(name, self.rules[name]) for name in CLASSES], self.misfit))
        return hashlib.sha256(meaning.encode()).hexdigest()

    @classmethod
    def open(cls, name_or_file: str | Path) -> Recipe:
        """A built-in recipe by name, or a recipe file. Raises `ConfigError`: no such recipe, or what is wrong in it."""
        text = str(name_or_file)
        file = _FOLDER / f"{text}.toml" if text in BUILT_IN else Path(text)
        try:
            content = file.expanduser().read_bytes()
        except (FileNotFoundError, IsADirectoryError, RuntimeError, ValueError):  # ~nobody, a zero byte
            raise ConfigError(
                f"{text}: no such recipe; expected one of {', '.join(BUILT_IN)}, or the name of a recipe file"
            ) from None
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
        try:
            raw = tomllib.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}: not valid TOML: {error}") from None
        return _Reader(str(file)).recipe(file.stem, raw)

    def plan(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
        """The format of every matrix among `shapes`: our tensor names with their unpacked shapes, [rows, cols] or
        [experts, rows, cols]. Tensors that are no matrix (norms, A_log, dt_bias, conv1d) are not in the plan.

        A tied embedding is the head as well, and gets the better of both formats. Raises `ConfigError` if a group
        does not divide the columns of a matrix and the recipe does not say what to do then (`misfit`).
        """
        found = list(matrices(shapes))
        layers: dict[str, list[int]] = {}
        for path, kind, _ in found:
            if (layer := layer_of(path)) is not None:
                layers.setdefault(kind, []).append(layer)
        outer = {
            kind: set(from_the_edges(members)[: _rounded(self.rules[kind].share * len(members))])
            for kind, members in layers.items()
        }
        plan: Plan = {}
        for path, kind, shape in found:
            rule = self.rules[kind]
            spec = rule.edges if layer_of(path) in outer.get(kind, ()) else rule.spec
            if kind == "embedding" and config.tied:
                spec = max(spec, self.rules["head"].spec, key=_quality)
            plan[path] = self._fitted(path, spec, shape)
        return plan

    def _fitted(self, path: str, spec: QuantSpec | None, shape: tuple[int, ...]) -> QuantSpec | None:
        """`spec` with a group that divides the columns, as far as `misfit` allows."""
        if spec is None or shape[-1] % spec.group == 0:
            return spec
        if self.misfit == "error":
            raise ConfigError(
                f"recipe {self.name}: {path}: groups of {spec.group} do not divide its {shape[-1]} columns; "
                'choose another group, "keep", or misfit = "smaller"'
            )
        smaller = [g for g in GROUPS if g < spec.group and shape[-1] % g == 0]
        return QuantSpec(spec.bits, max(smaller)) if self.misfit == "smaller" and smaller else None


def misfits(plan: Plan, recipe: Recipe) -> list[str]:
    """The paths that stay unquantized although the recipe has a format for their class: no group divides them."""
    return [path for path, spec in plan.items() if spec is None and _wanted(path, recipe) is not None]


def _wanted(path: str, recipe: Recipe) -> QuantSpec | None:
    kind = class_of(path)
    assert kind is not None, path
    return recipe.rules[kind].spec


def _rounded(value: float) -> int:
    """To the nearest whole number, halves up, so that a share means the same for every Python."""
    return int(value + 0.5)


def _quality(spec: QuantSpec | None) -> tuple[int, int]:
    return (16, 0) if spec is None else (spec.bits, -spec.group)


class _Reader:
    """Builds a `Recipe` from parsed TOML; `where` is the file that its errors name."""

    def __init__(self, where: str) -> None:
        self.where = where

    def wrong(self, key: str, expected: str, got: object) -> ConfigError:
        return ConfigError(f"{self.where}: {key}: expected {expected}, got {got!r}")

    def known(self, prefix: str, table: Mapping[str, Any], *keys: str) -> None:
        for key in table:
            if key not in keys:
                name = f"{prefix}.{key}" if prefix else key
                raise ConfigError(f"{self.where}: {name}: unknown key; expected one of {', '.join(keys)}")

    def recipe(self, name: str, raw: Mapping[str, Any]) -> Recipe:
        self.known("", raw, "summary", "misfit", "formats")
        summary, misfit, formats = raw.get("summary", ""), raw.get("misfit", "error"), raw.get("formats")
        if not isinstance(summary, str) or "\n" in summary:
            raise self.wrong("summary", "one line of text", summary)
        if misfit not in ("error", "smaller", "keep"):
            raise self.wrong("misfit", '"error", "smaller" or "keep"', misfit)
        if not isinstance(formats, dict):
            raise self.wrong("formats", "a table of formats by class", formats)
        self.known("formats", formats, "default", *SINGLE, *FAMILIES)
        if "default" not in formats:
            raise ConfigError(
                f"{self.where}: formats.default: missing; it is the format of what has no other"
            )
        rules = dict.fromkeys(CLASSES, self.rule("formats.default", formats["default"]))
        for key, value in formats.items():
            where = f"formats.{key}"
            if key in SINGLE:
                rules[key] = self.rule(where, value)
            elif key in FAMILIES and isinstance(value, dict) and not set(value) & {"bits", "group", "edges"}:
                self.known(where, value, *FAMILIES[key])
                for part, inner in value.items():
                    rules[f"{key}.{part}"] = self.rule(f"{where}.{part}", inner)
            elif key in FAMILIES:
                rules.update(dict.fromkeys((f"{key}.{p}" for p in FAMILIES[key]), self.rule(where, value)))
        return Recipe(name, summary, rules, misfit)

    def rule(self, where: str, value: object) -> Rule:
        if value == "keep":
            return Rule(None)
        if not isinstance(value, dict):
            raise self.wrong(where, '"keep" or { bits = …, group = … }', value)
        layered = not where.endswith((".embedding", ".head", ".default"))
        self.known(where, value, "bits", "group", *(("edges",) if layered else ()))
        spec = self.spec(where, value, 64)
        if "edges" not in value:
            return Rule(spec)
        inner, place = value["edges"], f"{where}.edges"
        if not isinstance(inner, dict):
            raise self.wrong(place, "{ bits = …, share = … }", inner)
        self.known(place, inner, "bits", "group", "share")
        share = inner.get("share")
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise self.wrong(f"{place}.share", "a share of the layers above 0 and up to 1", share)
        return Rule(spec, self.spec(place, inner, spec.group), float(share))

    def spec(self, where: str, value: Mapping[str, Any], group: int) -> QuantSpec:
        return QuantSpec(
            self.choice(f"{where}.bits", value.get("bits"), BITS),
            self.choice(f"{where}.group", value.get("group", group), GROUPS),
        )

    def choice(self, key: str, value: object, allowed: tuple[int, ...]) -> int:
        # True equals 1, and 4.0 equals 4: neither is a number of bits
        if type(value) is not int or value not in allowed:
            raise self.wrong(key, f"one of {', '.join(map(str, allowed))}", value)
        return value
