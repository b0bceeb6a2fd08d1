"""The source that benchmarks/conversion.py makes up: the flagship's shapes, the same bytes in every read."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.hub import write_stub
from moelocal.model import Decoder
from moelocal.quantize.sizes import shapes_of


@pytest.fixture(scope="module")
def benchmark(root) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "benchmarks_conversion", root / "benchmarks" / "conversion.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def source(benchmark) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and files of two layers."""
    raw = json.loads(benchmark.CONFIG.read_text())
    raw["text_config"]["num_hidden_layers"] = 2
    return raw, benchmark.generated(benchmark.original_names(shapes_of(ModelConfig.parse(raw))))


def test_it_is_a_checkpoint_of_the_flagship(benchmark, source, tmp_path: Path):
    raw, files = source
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for name, content in files.items():
        if name.endswith(".json"):
            (tmp_path / name).write_bytes(content)
        else:
            assert content.nbytes < benchmark.SHARD + 10_000
            head = content.read(0, 100_000)
            write_stub(tmp_path / name, head[: 8 + int.from_bytes(head[:8], "little")], content.nbytes)
    checkpoint = Checkpoint.open(tmp_path, ModelConfig.parse(raw))
    Decoder(checkpoint, checkpoint.compute_dtype, evaluate=False)
    assert "layers.1.mlp.switch_mlp.up_proj.weight" in checkpoint.used


def test_a_byte_is_the_same_in_every_read(source):
    name = "model-00002-of-00002.safetensors"
    content = source[1][name]
    assert len(content.read(content.nbytes - 10, 10)) == 10
    random = np.random.RandomState(1)
    for _ in range(30):
        start = int(random.choice([random.randint(5000), random.randint(content.nbytes - 300)]))
        length, inner = int(random.randint(1, 300)), int(random.randint(300))
        data = content.read(start, length + inner)
        assert len(data) == length + inner and content.read(start + inner, length) == data[inner:]


def test_weights_are_finite_and_experts_differ(benchmark, source):
    content = source[1]["model-00001-of-00002.safetensors"]
    begin = 8 + int.from_bytes(content.read(0, 8), "little")
    rows = [content.read(begin + i * 4_194_304, 4096) for i in range(100)]
    assert len(set(rows)) == 100
    values = (np.frombuffer(b"".join(rows), np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(values).all()
    # Student's t with 5 degrees of freedom has variance 5/3 and kurtosis 9; of 200,000 values the former is sure to 1 %
    assert abs(values.var() / 0.02**2 - 5 / 3) < 0.05
