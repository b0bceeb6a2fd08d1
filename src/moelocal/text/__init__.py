"""Tokenizer, chat template and everything that turns sampled tokens into an answer. Imports no MLX."""
