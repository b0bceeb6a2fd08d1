"""What a timeline of tokens leaves behind in the layers, so that the next token need not read it again."""

from moelocal.cache.cache import Cache, Chunks, Mark
from moelocal.cache.disk import Disk
from moelocal.cache.layers import AttentionCache, LayerCache, RecurrentCache
from moelocal.cache.store import Fate, Found, Store

__all__ = [
    "AttentionCache",
    "Cache",
    "Chunks",
    "Disk",
    "Fate",
    "Found",
    "LayerCache",
    "Mark",
    "RecurrentCache",
    "Store",
]
