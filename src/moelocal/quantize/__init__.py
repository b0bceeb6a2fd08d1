"""From original weights to a quantized checkpoint, shard by shard: what `moelocal quantize` does."""
