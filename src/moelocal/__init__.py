"""Quantized mixture-of-experts language models on your own Mac."""
