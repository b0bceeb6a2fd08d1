"""Checkpoints on disk: files and headers (`files`), names of every known layout (`names`), typed access (`scope`)."""
