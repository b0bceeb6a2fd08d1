"""What a timeline of tokens leaves behind in the layers, so that the next token need not read it again."""

from moelocal.cache.cache import Cache
from moelocal.cache.layers import AttentionCache, LayerCache, RecurrentCache

__all__ = ["AttentionCache", "Cache", "LayerCache", "RecurrentCache"]
