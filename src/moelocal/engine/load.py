"""`load` and the `Model` that it gives: the network with the texts that belong to it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Final

import mlx.core as mx

from moelocal.cache import Cache
from moelocal.config import ModelConfig
from moelocal.engine.sampling import Sampling
from moelocal.errors import RequestError
from moelocal.model import Decoder
from moelocal.text.generation_config import GenerationDefaults
from moelocal.text.template import ChatTemplate
from moelocal.text.tokenizer import Tokenizer

_DTYPES: Final = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class Model:
    """A loaded checkpoint. Calling it evaluates tokens; text files are read when a text call first needs them, so
    that a folder without a tokenizer works for tokens.

    `name`: what it was loaded as; `folder`: where its files are.
    """

    def __init__(self, decoder: Decoder, folder: Path, name: str) -> None:
        self.decoder, self.folder, self.name = decoder, folder, name

    @property
    def config(self) -> ModelConfig:
        """The model as its config.json describes it."""
        return self.decoder.config

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations."""
        return self.decoder.dtype

    def new_cache(self, padding: Sequence[int] | None = None) -> Cache:
        """An empty timeline; with `padding`, a batch whose rows start with that many padding tokens each."""
        return self.decoder.new_cache(padding)

    def __call__(self, tokens: mx.array, cache: Cache | None = None, rows: int | None = None) -> mx.array:
        """Evaluate tokens int [B, T] behind what `cache` holds -> logits float32 [B, T, V], or of the last `rows`.

        Raises `RequestError` for tokens of another shape or dtype.
        """
        return self.decoder(tokens, cache, rows)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises `TokenizerError` if the folder has none."""
        return Tokenizer.open(self.folder)

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises `TemplateError` if the folder has none."""
        return ChatTemplate.open(self.folder)

    @cached_property
    def _generation(self) -> GenerationDefaults:
        return GenerationDefaults.open(self.folder, self.config.eos)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The ids that end an answer, from generation_config.json and config.json. Raises `ConfigError`."""
        return self._generation.stop_tokens

    @property
    def defaults(self) -> Sampling:
        """The sampling that the checkpoint's generation_config.json asks for. Raises `ConfigError`."""
        return Sampling.from_defaults(self._generation.sampling)


def load(
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    quantization: str = "auto",
    dtype: str | mx.Dtype | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Model:
    """Load a model: a folder, a Hugging Face name, or (None) the small embedded demonstration model.

    `revision`: branch, tag or commit of a Hugging Face repository. `quantization`: "none" runs the weights as they are;
    a recipe (a name, or a file: docs/formats.md) quantizes original weights once and keeps the result in the cache of
    moelocal; "auto" does so with "balanced" or "small" for weights that do not fit this machine's memory. `dtype` of
    activations: "float32", "float16", "bfloat16" or an MLX dtype; None takes the checkpoint's own, or float32 on the
    CPU device. `offline`: open no connection. `progress`: say on standard error what takes long, on a terminal with a
    bar.

    Raises `ModelNotFound`, `ConfigError`, `UnsupportedModel`, `CheckpointError`; `RequestError` for a bad `dtype`, and
    for weights that do not fit in any way.
    """
    wanted = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and (not isinstance(wanted, mx.Dtype) or wanted not in _DTYPES.values()):
        raise RequestError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    # imported here: every import of moelocal would pay for it
    from moelocal.quantize.once import prepared

    folder = prepared(model, quantization, revision=revision, offline=offline, progress=progress)
    with _layer_bar(progress) as report:
        decoder = Decoder.open(folder, wanted, report)
    return Model(decoder, folder, "embedded" if model is None else str(model))


@contextmanager
def _layer_bar(wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, from the second second on."""
    started, bar = time.monotonic(), None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and wanted and sys.stderr.isatty() and time.monotonic() - started > 1:
            # imported here: most loads are over before it would be shown
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True)
            bar.add_task("loading the weights")
            bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()
