"""Sizes: bytes by class, bytes per token, what fits in memory; held against files and published figures."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelocal.cache import AttentionCache, RecurrentCache
from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import RequestError
from moelocal.formats import QuantSpec
from moelocal.model import Decoder
from moelocal.quantize.recipe import BUILT_IN, Recipe
from moelocal.quantize.sizes import (
    WORKING,
    Memory,
    context_that_fits,
    packed_nbytes,
    shapes_of,
    sizes,
)
from moelocal.units import GIB, size
from parity.checkpoints import SMALL, config, write
from parity.checkpoints import Recipe as Model

# Size budget of the 35B-A3B, computed by hand from its tensors: GB, GiB, bits per weight, MB that a token reads. The
# figures of the plain ones, 18.17 and 34.30 GiB, are also those of the published MLX conversions.
BUDGET = {
    "4bit": (19.51, 18.17, 4.50, 1670),
    "fast": (20.90, 19.47, 4.83, 2025),
    "balanced": (20.93, 19.50, 4.83, 2314),
    "quality": (20.90, 19.47, 4.82, 2541),
    "small": (17.68, 16.46, 4.08, None),  # the table's 2,437 MB are with b and a of the delta nets at 8 bits
    "8bit": (None, 34.30, 8.50, None),
}


@pytest.fixture(scope="module")
def flagship(root):
    found = ModelConfig.parse(json.loads((root / "benchmarks/configs/qwen3.6-35b-a3b.json").read_text()))
    return found, shapes_of(found)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_flagship_has_the_sizes_of_the_budget(flagship, name):
    found = sizes(*flagship, Recipe.open(name).plan(*flagship))
    gb, gib, bits, read = BUDGET[name]
    assert gb is None or round(found.nbytes / 1e9, 2) == gb
    # the table rounds the exact 16.4653 GiB of `small` down
    assert math.isclose(found.nbytes / GIB, gib, abs_tol=0.0055)
    assert round(found.bits_per_weight, 2) == bits
    assert read is None or round(found.read_per_token / 1e6) == read


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_page_about_formats_has_these_sizes(root, flagship, name):
    found = sizes(*flagship, Recipe.open(name).plan(*flagship))
    row = f"| `{name}` | {size(found.nbytes)} | {found.bits_per_weight:.2f} | {size(found.read_per_token)} | "
    assert row in (root / "docs" / "formats.md").read_text()


def test_the_flagship_unquantized(flagship):
    found = sizes(*flagship, {})
    # counted in the headers of the release: text parameters, cache and state bytes
    assert found.parameters == 34_660_610_688 and found.nbytes == 2 * found.parameters
    assert found.bits_per_weight == 16
    assert found.cache_per_token == 20_480
    assert found.state == 62_914_560 + 1_474_560
    # 2,946,429,568 parameters are active without the embedding, and 2,048 of it
    assert found.read_per_token == 2 * (2_946_429_568 + 2_048)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe"])
def test_shapes_are_those_that_the_network_asks_for(tmp_path, family, tied):
    folder = write(tmp_path / "model", Model(family, **SMALL, tied=tied))
    checkpoint = Checkpoint.open(folder, ModelConfig.read(folder))
    Decoder(checkpoint, checkpoint.compute_dtype, evaluate=False)  # which takes every tensor, or raises
    assert shapes_of(checkpoint.config) == {name: source.shape for name, source in checkpoint.sources.items()}


@given(
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([32, 64, 128]),
    st.lists(st.integers(1, 5), min_size=1, max_size=2),
    st.integers(1, 3),
    st.sampled_from([mx.float32, mx.bfloat16]),
)
def test_packed_bytes_are_what_mlx_packs(bits, group, lead, groups, dtype):
    shape = (*lead, groups * group)
    arrays = mx.quantize(mx.zeros(shape, dtype), group, bits)
    assert packed_nbytes(shape, QuantSpec(bits, group), dtype.size) == sum(a.nbytes for a in arrays)


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)])
def test_packed_bytes_of_the_floating_point_modes(mode, bits, group):
    arrays = mx.quantize(mx.zeros((3, 64)), group, bits, mode=mode)
    assert packed_nbytes((3, 64), QuantSpec(bits, group, mode), 2) == sum(a.nbytes for a in arrays)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_5", "qwen3_moe"])
def test_cache_and_state_are_what_a_timeline_holds(tmp_path, family):
    folder = write(tmp_path / "model", Model(family, **SMALL))
    decoder = Decoder.open(folder, mx.float32)
    cache, length = (
        decoder.new_cache(),
        256,
    )  # where the buffers grow: what they hold is filled to the last row
    mx.eval(decoder(mx.zeros((1, length), mx.int32), cache))
    found = sizes(decoder.config, shapes_of(decoder.config), {}, dtype_size=4)
    held = {
        kind: sum(a.nbytes for layer in cache.layers if isinstance(layer, kind) for a in layer.arrays)
        for kind in (AttentionCache, RecurrentCache)
    }
    assert found.cache_per_token * length == held[AttentionCache]
    assert found.state == held[RecurrentCache]


def test_what_a_token_reads():
    found = ModelConfig.parse(config(Model("qwen3_5_moe", experts=16, per_token=4)))
    parts = {part.name: part for part in sizes(found, shapes_of(found), {}).parts}
    assert parts["experts.up"].read * 4 == parts["experts.up"].nbytes
    assert parts["shared.up"].read == parts["shared.up"].nbytes
    assert parts["head"].read == parts["head"].nbytes
    assert parts["embedding"].read * found.vocab == parts["embedding"].nbytes
    tied = ModelConfig.parse(config(Model("qwen3_5_moe", tied=True)))
    parts = {part.name: part for part in sizes(tied, shapes_of(tied), {}).parts}
    # it is the head as well
    assert parts["embedding"].read == parts["embedding"].nbytes and "head" not in parts


def test_formats_of_a_part(flagship):
    parts = {p.name: p for p in sizes(*flagship, Recipe.open("balanced").plan(*flagship)).parts}
    assert parts["experts.down"].formats == (("5 bits in groups of 64", 24), ("4 bits in groups of 64", 16))
    assert parts["router"].formats == (("16-bit float", 40),)


@pytest.mark.parametrize(
    ("memory", "usable"),
    # MB that Metal recommends, as llama.cpp prints them on Macs of that memory
    [(16, 12713.12), (24, 19069.67), (32, 26800.60), (48, 40200.90), (64, 55662.79), (128, 115448.73)],
)
def test_what_a_mac_gives_its_gpu(memory, usable):
    # 16 kB pages, and shares of two digits
    assert math.isclose(Memory.of(memory * GIB).usable / 1e6, usable, rel_tol=1e-5)


def test_context_that_fits(flagship):
    found = sizes(*flagship, Recipe.open("balanced").plan(*flagship))
    config = flagship[0]
    least = found.nbytes + found.state + WORKING
    assert context_that_fits(config, found, least - 1) is None
    assert context_that_fits(config, found, least) == 0
    assert context_that_fits(config, found, least + 20_480 * 1000 + 20_479) == 1000
    assert context_that_fits(config, found, 1 << 50) == config.context == 262_144
    # what the recipes are for: 20.9 GB on Macs with 32 GB, 17.7 GB on those with 24
    assert (context_that_fits(config, found, Memory.of(32 * GIB).usable) or 0) > 200_000
    small = sizes(*flagship, Recipe.open("small").plan(*flagship))
    assert context_that_fits(config, found, Memory.of(24 * GIB).usable) is None
    assert (context_that_fits(config, small, Memory.of(24 * GIB).usable) or 0) > 10_000


def test_this_machine(monkeypatch):
    monkeypatch.setattr("moelocal.machine.memory", lambda: 32 * GIB)
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert Memory.here() == Memory.of(32 * GIB)
    # on a Mac Metal knows, also when the owner has set another limit
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 30 * GIB})
    assert Memory.here() == Memory(32 * GIB, 30 * GIB, "of it, Metal says, the GPU may use")
    monkeypatch.setattr("moelocal.machine.memory", lambda: 0)
    with pytest.raises(RequestError) as error:
        Memory.here()
    assert str(error.value) == "memory: this system does not say how much it has; name it with --memory 32GB"
