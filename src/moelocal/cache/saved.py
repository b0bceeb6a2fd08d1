"""A whole timeline in one file of the user's, to go on from later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import mlx.core as mx
import numpy as np

from moelocal.cache.cache import Cache
from moelocal.cache.file import Damaged, Packed, Tensor, read, tensors
from moelocal.cache.layers import AttentionCache, LayerCache, RecurrentCache, copy
from moelocal.cache.snapshot import check
from moelocal.errors import RequestError

VERSION: Final = "2"
"""Of what is in the file."""


def _names(bits: int | None) -> tuple[str, ...]:
    """Of the arrays of an attention layer."""
    return ("stored",) if bits is None else ("codes", "scales", "biases")


def save(path: Path, fingerprint: str, tokens: Sequence[int], cache: Cache, logits: mx.array) -> None:
    """Write a timeline, its `tokens` and the logits behind them, float32 [V], to `path`, atomically. `fingerprint`: as
    for `Store`.

    Raises `RequestError` if the cache has padding or several rows, does not stand behind `tokens`, or if the file
    cannot be written.
    """
    check(tokens, cache)
    if not path.name:
        raise RequestError(f"save: expected the name of a file, got {str(path)!r}")
    arrays: dict[str, mx.array] = {"logits": copy(logits)}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, AttentionCache):
            kept = zip(_names(layer.bits), layer.part(0, cache.position), strict=True)
            arrays |= {f"{index}.{name}": copy(part) for name, part in kept}
        else:
            assert layer.conv is not None and layer.state is not None
            arrays[f"{index}.conv"], arrays[f"{index}.state"] = copy(layer.conv), copy(layer.state)
    listed = Tensor.of_bytes(np.asarray(tokens, dtype="<i4").tobytes())
    metadata = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "layers": str(len(cache.layers)),
        "chunks": json.dumps(cache.chunks),
        "kv_bits": json.dumps(next((x.bits for x in cache.layers if isinstance(x, AttentionCache)), None)),
    }
    try:
        Packed.of({"tokens": listed, **tensors(arrays)}, metadata).write(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be written: {error.strerror}") from None


def load(path: Path, fingerprint: str) -> tuple[list[int], Cache, mx.array]:
    """The tokens, the timeline and the logits that `save` wrote.

    Raises `RequestError` if the file cannot be read, is damaged or no such file, or has another fingerprint.
    """
    try:
        metadata, content = read(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except Damaged as error:
        raise RequestError(f"{path}: damaged, or no saved session: {error}") from None
    version, found = metadata.get("version"), metadata.get("fingerprint")
    if version != VERSION or "layers" not in metadata:
        raise RequestError(f"{path}: expected a saved session of version {VERSION}, got version {version}")
    if found != fingerprint:
        raise RequestError(
            f"{path}: saved with other weights, settings or another version of moelocal or MLX: expected "
            f"{fingerprint}, got {found}; read its messages again in a new session"
        )
    tokens: list[int] = np.frombuffer(content["tokens"].data, "<i4").tolist()
    layers: list[LayerCache] = []
    bits: int | None = json.loads(metadata["kv_bits"])
    for index in range(int(metadata["layers"])):
        if f"{index}.state" not in content:
            part = [content[f"{index}.{name}"].array() for name in _names(bits)]
            layers.append(AttentionCache.joined([part], len(tokens), bits))
        else:
            layers.append(RecurrentCache(content[f"{index}.conv"].array(), content[f"{index}.state"].array()))
    cache = Cache.of(layers, [(number, size) for number, size in json.loads(metadata["chunks"])])
    logits = content["logits"].array()
    mx.eval(cache.arrays, logits)
    return tokens, cache, logits
