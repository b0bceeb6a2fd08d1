"""`Decoder`: the one network. Families differ by config and names only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx

from moelocal.cache import Cache, RecurrentCache
from moelocal.cache.layers import group_of
from moelocal.cache.ragged import Rows
from moelocal.checkpoint.scope import AnyCheckpoint, Checkpoint
from moelocal.config import AttentionSpec, ModelConfig
from moelocal.errors import RequestError
from moelocal.formats import QuantizedArray, arrays_of
from moelocal.layers.block import Block
from moelocal.ops.host import MANY_ROWS
from moelocal.ops.linear import linear
from moelocal.ops.norm import rms_norm
from moelocal.ops.op import forced, on_cpu, setting


def require_kv_bits(config: ModelConfig, kv_bits: int | None) -> None:
    """Raises `RequestError` unless keys and values of this model can be kept as codes of so many bits (None: as they
    are)."""
    if kv_bits is None:
        return
    if not isinstance(kv_bits, int) or kv_bits not in (4, 8):
        raise RequestError(f"kv_bits: expected 8, 4 or None, got {kv_bits!r}")
    for layer in config.layers:
        if isinstance(layer.mixer, AttentionSpec):
            group_of(layer.mixer.head_dim)


class Decoder:
    """Embedding, blocks, final norm, head. Weights in the formats of the checkpoint, activations in `dtype`, keys and
    values in codes of `kv_bits` (None: in the dtype of activations)."""

    def __init__(
        self,
        checkpoint: AnyCheckpoint,
        dtype: mx.Dtype,
        evaluate: bool = True,
        report: Callable[[int, int], None] = lambda done, total: None,
        kv_bits: int | None = None,
    ) -> None:
        """Without `evaluate` the weights stay lazy: enough to know that a checkpoint fits. `report` is told after each
        layer how many of how many are there."""
        config = checkpoint.config
        require_kv_bits(config, kv_bits)
        self.config, self.dtype, self.kv_bits = config, dtype, kv_bits
        root = checkpoint.root()
        self.embedding = root.matrix("embed_tokens", config.vocab, config.hidden, dtype)
        self.blocks: list[Block] = []
        for index, spec in enumerate(config.layers):
            block = Block(root.at(f"layers.{index}"), spec, config.hidden, config.norm_eps, dtype)
            if evaluate:  # one by one: what a fusion was made of is freed before the next layer is read
                mx.eval(block.arrays)
            self.blocks.append(block)
            report(index + 1, len(config.layers))
        self.norm = root.array("norm.weight", (config.hidden,))
        self.head = (
            self.embedding if config.tied else root.matrix("lm_head", config.vocab, config.hidden, dtype)
        )
        checkpoint.require_all_used()
        if evaluate:
            mx.eval(self.norm, *arrays_of(self.embedding), *arrays_of(self.head))

    @classmethod
    def open(
        cls,
        folder: Path,
        dtype: mx.Dtype | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
        *,
        context: int | None = None,
        kv_bits: int | None = None,
    ) -> Decoder:
        """Load the text model of a checkpoint folder.

        `dtype` None: float32 on the CPU device, whose kernels for the 16-bit types are slow, else the checkpoint's own.
        `context`: as in `ModelConfig.with_context`. `kv_bits`: 8 or 4 keeps keys and values as codes of so many bits.
        Raises `ConfigError`, `UnsupportedModel`, `CheckpointError`; `RequestError` for a bad `context` or `kv_bits`.
        """
        config = ModelConfig.read(folder)
        if context is not None:
            config = config.with_context(context)
        checkpoint = Checkpoint.open(folder, config)
        dtype = dtype or (mx.float32 if on_cpu() else checkpoint.compute_dtype)
        return cls(checkpoint, dtype, report=report, kv_bits=kv_bits)

    def new_cache(self, padding: Sequence[int] | None = None) -> Cache:
        """An empty timeline; with `padding`, a batch whose rows start with that many padding tokens each."""
        return Cache(self.config, padding, self.kv_bits)

    def __call__(self, tokens: mx.array, cache: Cache | None = None, rows: int | None = None) -> mx.array:
        """Evaluate tokens int [B, T] behind what `cache` holds -> logits float32 [B, T, V], or of the last `rows`.

        Raises `RequestError` for tokens of another shape or dtype, and for a cache whose last evaluation was
        interrupted.
        """
        if tokens.ndim != 2 or not tokens.size or not mx.issubdtype(tokens.dtype, mx.integer):
            raise RequestError(
                f"tokens: expected integers [batch, time], got {tokens.dtype} {list(tokens.shape)}"
            )
        cache = cache or self.new_cache()
        time, padding = tokens.shape[1], cache.padding
        if time == 1 and padding is None and tokens.shape[0] < MANY_ROWS and forced() in ("auto", "metal"):
            return self._step(tokens, cache)
        valid = None
        if padding is not None:
            valid = mx.arange(cache.position, cache.position + time) >= padding[:, None]
        cache.begin()
        x = self.embed(tokens)
        last = len(self.blocks) - 1
        for index, (block, layer) in enumerate(zip(self.blocks, cache.layers, strict=True)):
            x = block(x, layer, cache.position, padding, valid, rows if index == last else None)
        cache.advance(time)
        return self.logits(x)

    def _step(self, tokens: mx.array, cache: Cache) -> mx.array:
        """One token per row, through the compiled form of each block."""
        cache.begin()
        position, length = mx.array(cache.position), mx.array(cache.position + 1)
        x, now = self.embed(tokens), setting()
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block.step(x, layer, position, length, now)
        cache.advance(1)
        return self.logits(x)

    def step_rows(self, tokens: mx.array, rows: Rows) -> mx.array:
        """One token for each of several timelines, int [B, 1] -> logits float32 [B, 1, V].

        Raises `RequestError` for another shape, or more rows than one product computes as it computes a single one.
        """
        count = len(rows.caches)
        if tokens.shape != (count, 1) or not 0 < count < MANY_ROWS:
            raise RequestError(
                f"tokens: expected one for each of {count} rows, at most {MANY_ROWS - 1}, got {list(tokens.shape)}"
            )
        if forced() not in (
            "auto",
            "metal",
        ):  # a form that was asked for evaluates each row as it would alone
            each = zip(mx.split(tokens, count), rows.apart(), strict=True)
            return mx.concatenate([self(token, cache) for token, cache in each])
        layers = rows.together()
        rows.begin()
        positions = [cache.position for cache in rows.caches]
        position, lengths = mx.array(positions), [mx.array(p + 1) for p in positions]
        x, now = self.embed(tokens), setting()
        for block, layer in zip(self.blocks, layers, strict=True):
            if isinstance(layer, RecurrentCache):
                x = block.step(x, layer, position, position, now)
            else:
                x = block.step_rows(x, layer, position, lengths, now)
        rows.advance(1)
        return self.logits(x)

    def embed(self, tokens: mx.array) -> mx.array:
        """Rows of the embedding [..., H] in the compute dtype."""
        if isinstance(self.embedding, QuantizedArray):
            return self.embedding.rows(tokens).dequantize(self.dtype)
        return self.embedding[tokens]

    def logits(self, x: mx.array) -> mx.array:
        """Final norm and head: hidden states [..., H] -> float32 [..., V]."""
        return linear(rms_norm(x, self.norm, self.config.norm_eps), self.head).astype(mx.float32)
