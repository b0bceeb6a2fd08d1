"""The original implementations on a checkpoint folder: transformers (float32, eager) and mlx-lm (float32)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

_CLASSES = {
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


class Transformers:
    """transformers on a folder, in float32 with plain PyTorch attention."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        import torch
        import transformers

        # several test processes share the cores
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        chosen = getattr(transformers, _CLASSES[kind])
        self.torch = torch
        self.model, info = chosen.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
        )
        self.model.eval()
        # a tensor that it did not find would be random: the comparison would prove nothing
        assert not info["missing_keys"] and not info["mismatched_keys"], info

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[T] or [B, T] -> [.., T, V], without a cache."""
        with self.torch.no_grad():
            out = self.model(self.torch.tensor(np.atleast_2d(tokens)), use_cache=False).logits.float().numpy()
        return out if tokens.ndim == 2 else out[0]

    def stepwise(self, tokens: np.ndarray, prefill: int) -> np.ndarray:
        """[T] -> [T, V]: `prefill` tokens at once, then one by one on the cache."""
        parts, cache = [], None
        with self.torch.no_grad():
            for part in _cut(tokens, [prefill]):
                out = self.model(self.torch.tensor(part[None]), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits[0].float().numpy())
        return np.concatenate(parts)

    def save(self, folder: Path) -> Path:
        """What a fine-tune of today leaves behind."""
        self.model.save_pretrained(folder)
        return folder


class MlxLm:
    """mlx-lm on a folder, floating-point values in float32."""

    def __init__(self, folder: Path) -> None:
        self.model, self.config = load_model(folder)
        as_float32(self.model)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[T] -> [T, V], without a cache."""
        return np.array(self.model(mx.array(tokens)[None])[0].astype(mx.float32))

    def stepwise(self, tokens: np.ndarray, prefill: int) -> np.ndarray:
        """[T] -> [T, V]: `prefill` tokens at once, then one by one on the cache."""
        cache, parts = make_prompt_cache(self.model), []
        for part in _cut(tokens, [prefill]):
            parts.append(np.array(self.model(mx.array(part)[None], cache)[0].astype(mx.float32)))
        return np.concatenate(parts)


def _cut(tokens: np.ndarray, chunks: Sequence[int]) -> list[np.ndarray]:
    """Chunks of these sizes, then single tokens."""
    borders = np.cumsum(chunks).tolist()
    return np.split(tokens, borders + list(range(borders[-1] + 1, len(tokens))))


def as_float32(model: Any) -> None:
    def cast(_: str, value: mx.array) -> mx.array:
        return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def convert(source: Path, target: Path, quantize: dict[str, Any] | None = None,
            predicate: Callable[[str, Any], bool | dict[str, Any]] | None = None) -> Path:  # fmt: skip
    """`source` as mlx_lm.convert would write it to `target` (its own steps, less the tokenizer).

    `quantize`: group_size, bits, mode; `predicate` decides per path as mlx-lm's `quant_predicate` does.
    """
    model, raw = load_model(source, lazy=True)
    if quantize is not None:
        model, raw = quantize_model(
            model,
            raw,
            quantize.get("group_size"),
            quantize.get("bits"),
            mode=quantize.get("mode", "affine"),
            quant_predicate=predicate,
        )
    save_model(target, model)
    save_config(raw, target / "config.json")
    return target
