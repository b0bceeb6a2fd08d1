"""`generation_config.json`: the tokens that end an answer, and the sampling its authors recommend."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelocal.errors import ConfigError

_FRACTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """`stop_tokens`: ids that end an answer. `sampling`: the values given, under the names of `Sampling`.

    The stop set is the union of both files: `config.json` of Qwen3.5 names `<|endoftext|>` only, and an
    engine that reads it alone never stops at `<|im_end|>`.
    """

    stop_tokens: frozenset[int]
    sampling: dict[str, float | int]

    @classmethod
    def open(cls, folder: Path, config_eos: Iterable[int]) -> GenerationDefaults:
        """Read `generation_config.json`; without the file, the stop set is `config_eos` and no sampling is
        given.

        Unknown keys are ignored. Raises ConfigError for a file that is no JSON object, or a value of a wrong
        type.
        """
        path = folder / "generation_config.json"
        if not path.is_file():
            return cls(frozenset(config_eos), {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not readable as JSON ({error})") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}")
        stop_tokens = frozenset(config_eos) | _stop_tokens(path, content.get("eos_token_id"))
        return cls(stop_tokens, _sampling(path, content))


def _stop_tokens(path: Path, value: Any) -> frozenset[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"{path}: eos_token_id must be a token id or a list of them, found {value!r}")
    return frozenset(ids)


def _sampling(path: Path, content: Mapping[str, Any]) -> dict[str, float | int]:
    sampling: dict[str, float | int] = {}
    for key in _FRACTIONS:
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(f"{path}: {key} must be a number, found {value!r}")
        sampling[key] = float(value)
    top_k = content.get("top_k")
    if top_k is not None:
        if not isinstance(top_k, int) or isinstance(top_k, bool):
            raise ConfigError(f"{path}: top_k must be an integer, found {top_k!r}")
        sampling["top_k"] = top_k
    do_sample = content.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise ConfigError(f"{path}: do_sample must be true or false, found {do_sample!r}")
    if do_sample is False:
        sampling["temperature"] = 0.0
    return sampling
