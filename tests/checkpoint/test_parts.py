"""Parts of tensors: read by their bytes alone, and the same numbers as in the whole tensor, in every layout."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelocal.checkpoint.files import read_entries
from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import CheckpointError
from parity.checkpoints import SMALL, Recipe, write

LAYOUTS = {
    "fused experts": Recipe("qwen3_5_moe", **SMALL, dtype="BF16"),
    "single experts": Recipe("qwen3_moe", **SMALL, dtype="F16"),
    "interleaved": Recipe("qwen3_next", **{**SMALL, "key_heads": 2, "value_heads": 4}),
    "dense": Recipe("qwen3_5", **SMALL, tied=True),
}


def bits(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("layouts")
    return {name: write(top / name.replace(" ", "_"), recipe) for name, recipe in LAYOUTS.items()}


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, ModelConfig.read(folder))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_what_the_whole_tensor_has(folders, layout):
    whole, parts = opened(folders[layout]), opened(folders[layout])

    @settings(max_examples=8)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        first = data.draw(st.integers(0, array.shape[0]))
        last = data.draw(st.integers(first, array.shape[0]))
        part = parts.sources[name].read(first, last) if last > first else array[:0]
        assert part.dtype == array.dtype and part.shape == (last - first, *array.shape[1:])
        assert bits(part) == bits(array[first:last])

    for name, source in whole.sources.items():
        array = source.read()
        assert (array.shape, array.dtype) == (source.shape, source.dtype), name
        check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_reads_nothing_but_what_it_names(folders, tmp_path, layout):
    """All bytes but those of the stored tensors that `needs` names are overwritten; the part stays the same."""
    for name, source in opened(folders[layout]).sources.items():
        if not name.startswith(("layers.0", "layers.3")):
            continue
        needs = source.needs(0, 1)
        expected = bits(source.read(0, 1))
        damaged = tmp_path / name
        damaged.mkdir()
        (damaged / "config.json").write_bytes((folders[layout] / "config.json").read_bytes())
        (damaged / "model.safetensors.index.json").write_bytes(
            (folders[layout] / "model.safetensors.index.json").read_bytes()
        )
        for file in folders[layout].glob("*.safetensors"):
            content = bytearray(file.read_bytes())
            for entry in read_entries(folders[layout]).values():
                if entry.file == file and entry.name not in needs:
                    content[entry.offset : entry.offset + entry.nbytes] = b"\xff" * entry.nbytes
            (damaged / file.name).write_bytes(content)
        assert bits(opened(damaged).sources[name].read(0, 1)) == expected, name


def test_one_expert_of_a_stack_needs_one_stored_tensor(folders):
    source = opened(folders["single experts"]).sources["layers.0.mlp.switch_mlp.up_proj.weight"]
    assert source.needs(2, 3) == ("model.layers.0.mlp.experts.2.up_proj.weight",)
    assert len(source.needs(0, 4)) == 4
    fused = opened(folders["fused experts"]).sources["layers.0.mlp.switch_mlp.up_proj.weight"]
    assert fused.needs(2, 3) == ("model.language_model.layers.0.mlp.experts.gate_up_proj",)


def test_files_that_change_under_the_reader_are_errors(tmp_path):
    folder = write(tmp_path / "model", LAYOUTS["dense"], shards=1)
    source = opened(folder).sources["embed_tokens.weight"]
    file, name = folder / "model.safetensors", source.stored[0]
    content = file.read_bytes()
    file.write_bytes(content[:2000])
    with pytest.raises(CheckpointError) as caught:
        source.read(0, source.shape[0])
    assert str(caught.value) == f"{file}: {name}: the file has become shorter since it was opened"
    file.unlink()
    with pytest.raises(CheckpointError) as caught:
        source.read(0, source.shape[0])
    assert str(caught.value) == f"{file}: {name}: cannot be read: No such file or directory"
