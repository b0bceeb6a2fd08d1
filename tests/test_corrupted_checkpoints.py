"""A checkpoint damaged at random loads and runs, or raises our error; never another exception."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import moelocal
from damage import HYBRID, NEXT
from moelocal.config import ModelConfig
from moelocal.errors import CheckpointError, ConfigError, MoelocalError
from parity.checkpoints import config as config_of
from parity.checkpoints import write

# numbers at the borders of what arithmetic on them survives, and everything else that JSON can say
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e-300, 1e308, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
Path_ = tuple[str | int, ...]


def load_and_run(folder: Path) -> None:
    """Ours or success. A model that loads must also run."""
    try:
        model = moelocal.load(str(folder))
        mx.eval(model(mx.array([[3, 1, 2]]), model.new_cache()))
    except MoelocalError as error:
        assert str(error)


def paths(value: Any, at: Path_ = ()) -> list[Path_]:
    """Where every value of a JSON document is."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [path for key, item in inner for path in paths(item, (*at, key))]


def replaced(value: Any, path: Path_, new: Any) -> Any:
    """A copy of a JSON document with the value at `path` replaced."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return copy


class Sound:
    """A sound checkpoint of one file, and the damaged copy that each example writes over the last."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = (folder / "model.safetensors").read_bytes()
        self.header_end = 8 + struct.unpack("<Q", self.weights[:8])[0]
        self.header = json.loads(self.weights[8 : self.header_end])

    def write(self, config: Any = None, weights: bytes | None = None, header: Any = None) -> Path:
        """The folder with some of its parts replaced."""
        if header is not None:
            text = json.dumps(header).encode()
            weights = struct.pack("<Q", len(text)) + text + self.weights[self.header_end :]
        (self.folder / "config.json").write_text(json.dumps(self.config if config is None else config))
        (self.folder / "model.safetensors").write_bytes(self.weights if weights is None else weights)
        return self.folder


@pytest.fixture(scope="module", params=[HYBRID, NEXT], ids=lambda recipe: recipe.family)
def sound(request, tmp_path_factory):
    """A sound checkpoint of a family."""
    return Sound(write(tmp_path_factory.mktemp("model") / "model", request.param, shards=1))


@settings(max_examples=200)
@given(
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)
)
def test_flipped_bytes_in_the_header(sound, flips):
    content = bytearray(sound.weights)
    for place, mask in flips:
        content[int(place * sound.header_end)] ^= mask
    load_and_run(sound.write(weights=bytes(content)))


@settings(max_examples=50)
@given(place=st.floats(0, 1, exclude_max=True))
@example(place=0.0)
def test_a_file_cut_off_anywhere(sound, place):
    folder = sound.write(weights=sound.weights[: int(place * len(sound.weights))])
    with pytest.raises(CheckpointError):
        moelocal.load(str(folder))


@settings(max_examples=200)
@given(data=st.data())
def test_random_edits_of_the_header(sound, data):
    path = data.draw(st.sampled_from(paths(sound.header)))
    value = data.draw(VALUES | st.sampled_from(["F32", "BF16", "U32", "F64", "BOOL", "I8", "F8_E4M3"]))
    load_and_run(sound.write(header=replaced(sound.header, path, value)))


@settings(max_examples=100)
@given(data=st.data())
def test_renamed_and_lost_tensors(sound, data):
    header = dict(sound.header)
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3, unique=True)):
        header[data.draw(st.text(max_size=12) | st.just(name.replace("0", "1")))] = header.pop(name)
    load_and_run(sound.write(header=header))


@settings(max_examples=250)
@given(data=st.data())
def test_random_values_in_the_config(sound, data):
    path = data.draw(st.sampled_from(paths(sound.config)))
    load_and_run(sound.write(config=replaced(sound.config, path, data.draw(VALUES))))


QUANTIZED = {
    "bits": 4,
    "group_size": 64,
    "mode": "affine",
    "layers.0.mlp.gate": {"bits": 8, "group_size": 64},
}


@pytest.mark.parametrize("recipe", [HYBRID, NEXT], ids=lambda recipe: recipe.family)
@settings(max_examples=1500)
@given(data=st.data())
def test_random_values_in_every_key_give_a_config_or_our_error(recipe, data):
    document = config_of(recipe) | {"quantization": QUANTIZED}
    path = data.draw(st.sampled_from(paths(document)))
    try:
        parsed = ModelConfig.parse(replaced(document, path, data.draw(VALUES)))
    except ConfigError as error:
        assert str(error).startswith("config.json: ")
    else:
        assert parsed.layers


@pytest.mark.parametrize("recipe", [HYBRID, NEXT], ids=lambda recipe: recipe.family)
def test_every_key_survives_every_nasty_value(recipe):
    nasty = [
        None,
        True,
        -1,
        0,
        10**400,
        1e-300,
        1e308,
        float("nan"),
        float("inf"),
        "x",
        [],
        [1],
        {},
        {"a": 1},
    ]
    document = config_of(recipe) | {"quantization": QUANTIZED}
    refused = 0
    for path in paths(document):
        for value in nasty:
            try:
                ModelConfig.parse(replaced(document, path, value))
            except ConfigError:
                refused += 1
    assert refused > 300
