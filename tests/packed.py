"""Packed copies of checkpoints, for tests: stock `mx.quantize`, in the layout and with the names of MLX."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig

MATRICES = ("_proj", "embed_tokens", "lm_head", "in_proj_qkv", "in_proj_z", "gate", "shared_expert_gate")


def pack(source: Path, target: Path, bits: int, group: int = 32) -> Path:
    """A copy of `source` whose matrices are affine with `bits` bits; files other than weights are copied."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        if not file.name.startswith("model"):
            shutil.copy(file, target)
    raw = json.loads((source / "config.json").read_text())
    tensors: dict[str, mx.array] = {}
    for name, tensor in Checkpoint.open(source, ModelConfig.read(source)).sources.items():
        path, array = name.removesuffix(".weight"), tensor.read()
        if name.endswith(".weight") and path.endswith(MATRICES) and array.ndim > 1:
            packed, scales, biases = mx.quantize(array, group_size=group, bits=bits)
            tensors |= {name: packed, f"{path}.scales": scales, f"{path}.biases": biases}
        else:
            tensors[name] = array
    mx.save_safetensors(str(target / "model.safetensors"), {f"model.{n}": a for n, a in tensors.items()})
    quantization = {"bits": bits, "group_size": group, "mode": "affine"}
    (target / "config.json").write_text(json.dumps(raw | {"quantization": quantization}))
    return target
