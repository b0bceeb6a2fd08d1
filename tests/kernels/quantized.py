"""The embedded model as mlx-lm would write it at 4 bits, for the kernels that read packed weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

EMBEDDED = Path(__file__).parents[2] / "src" / "moelocal" / "embedded"
BITS, GROUP, ROUTER_BITS = 4, 32, 8


def write(folder: Path) -> None:
    """Convert the embedded model into `folder`."""
    config = json.loads((EMBEDDED / "config.json").read_text())
    plan: dict = {"bits": BITS, "group_size": GROUP, "mode": "affine"}
    stored: dict[str, mx.array] = {}
    for name, raw in _mlx_names(mx.load(str(EMBEDDED / "model.safetensors"))).items():
        path = name.removesuffix(".weight")
        if raw.ndim == 1 or "conv1d" in name or not name.endswith(".weight"):
            stored[name] = raw
            continue
        bits = BITS
        if path.endswith(("mlp.gate", "shared_expert_gate")):
            bits = ROUTER_BITS
            plan[path] = {"bits": bits, "group_size": GROUP}
        stored[name], stored[f"{path}.scales"], stored[f"{path}.biases"] = mx.quantize(
            raw, group_size=GROUP, bits=bits
        )
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), stored, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization": plan}))
    for file in EMBEDDED.glob("*"):
        if file.name not in ("config.json", "model.safetensors") and file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder)


def _mlx_names(raw: dict[str, mx.array]) -> dict[str, mx.array]:
    """Experts split and stacked, the convolution with channels last, norms with their + 1; no MTP layer."""
    out: dict[str, mx.array] = {}
    for name, array in raw.items():
        if name.startswith("mtp."):
            continue
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("lm_head", "language_model.lm_head")
        base = name.rpartition("experts.")[0]
        if name.endswith("experts.gate_up_proj"):
            gate, up = mx.split(array, 2, axis=1)
            out[f"{base}switch_mlp.gate_proj.weight"], out[f"{base}switch_mlp.up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            out[f"{base}switch_mlp.down_proj.weight"] = array
        elif name.endswith("conv1d.weight"):
            out[name] = mx.swapaxes(array, 1, 2)
        elif name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            out[name] = (array.astype(mx.float32) + 1).astype(array.dtype)
        else:
            out[name] = array
    return out
