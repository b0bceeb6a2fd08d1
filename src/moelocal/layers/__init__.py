"""The layers of the decoder. Each takes its weights from a `Scope`, and is called with arrays and its own cache."""
