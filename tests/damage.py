"""Checkpoint folders to damage, and the assertion that loading them fails as it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moelocal
from parity.checkpoints import SMALL, Recipe
from parity.storage import Tensor, read_tensors, write_tensors

HYBRID = Recipe("qwen3_5_moe", **SMALL)
NEXT = Recipe("qwen3_next", **SMALL)
LAYER = "model.language_model.layers.0."


def assert_fails(folder: Path, kind: type[Exception], message: str) -> None:
    """Loading `folder` raises `kind` itself with exactly this message; {folder} stands for the folder."""
    with pytest.raises(kind) as caught:
        moelocal.load(str(folder))
    assert type(caught.value) is kind
    assert str(caught.value) == message.replace("{folder}", str(folder))


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the text part of config.json, or to all of it where there is one part only."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config.get("text_config", config))
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply `change` to the tensors of a folder with one file."""
    tensors = read_tensors([folder / "model.safetensors"])
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors)
