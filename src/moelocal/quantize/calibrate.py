"""Calibrated quantization of a whole model, layer by layer, in bounded memory.

The texts run through two models at once: the original, and the quantized one as far as it exists. Both are streams of
hidden states; one layer's weights are in memory at a time. Each matrix is fitted (`quantize.gptq`) to give, on its
inputs in the quantized stream, what the original gives in its own. So every matrix sees the errors made before it; and
those that add to the states, the mixer's output and the (shared) down projection, mend them too: their target is the
original's state less what the quantized stream has without them.

`quantize.calibrated_layer` has the order within a layer, `quantize.moments` what helps experts that get few tokens.

Memory, for N tokens, hidden size h, b bytes per activation, E experts of which a token meets K:
    4 N h b                                  both streams, and their normed copies while experts are fitted
    + the weights of one layer, and what is made of it
    + the larger of gate and up once more, joined for the forward pass, and what fits a batch of B experts:
      5 `EXPERT_BYTES`                       moments, their factors and corrections; B = `EXPERT_BYTES` / 4 h²
      + 8 N h B K / E                        the inputs of these experts, if all are chosen alike
      + 48 `gptq.CHUNK`                      weights in work
For 65,536 tokens of Qwen3.6-35B-A3B in bfloat16: 1.1 + 1.7 + 0.5 + 0.7 + 0.3 + 0.8 = 5.0 GB. Besides, both streams
(0.5 GB) lie in the work folder, as `states-L.safetensors`, for the layer to come and the one before it: an interrupted
run goes on there.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import mlx.core as mx

from moelocal.checkpoint.scope import Checkpoint
from moelocal.errors import CheckpointError, TokenizerError
from moelocal.ops.norm import rms_norm
from moelocal.ops.op import on_cpu
from moelocal.quantize import gptq, moments
from moelocal.quantize.calibrated_layer import Layer, Made, Plan, Streams, fit
from moelocal.quantize.corpus import Corpus
from moelocal.quantize.moments import Sums
from moelocal.quantize.streamed import embed


class Calibration:
    """Quantizes the layers of one conversion in order. Made for one text; `digest` says what its results depend on
    besides the weights. `dtype`: of activations; None: float32 on the CPU device, else the checkpoint's."""

    def __init__(self, corpus: Corpus, dtype: mx.Dtype | None = None) -> None:
        self.corpus, self._dtype = corpus, dtype
        self._streams: Streams | None = None
        settings = (corpus.digest, str(dtype), gptq.DAMPING, gptq.ROUNDS, moments.SHRINKAGE)
        self.digest = hashlib.sha256(repr(settings).encode()).hexdigest()

    def begin(self, source: Checkpoint, output: Checkpoint, work: Path) -> None:
        """The embedding is finished and can be read from the output, and unless an earlier run came this far also from
        the source. Hidden states are kept in the folder `work`. Raises `CheckpointError`; `TokenizerError` for a text
        with tokens that the embedding has no row for."""
        highest, rows = max(map(max, self.corpus.sequences)), source.config.vocab
        if highest >= rows:
            raise TokenizerError(
                f"the calibration text has token {highest}, but {source.folder} has only {rows} rows; "
                "the tokenizer files belong to another model"
            )
        self.work = work
        self.dtype = self._dtype or (mx.float32 if on_cpu() else source.compute_dtype)
        if any(self._file(index).exists() for index in range(len(source.config.layers) + 1)):
            return
        sequences = [mx.array(ids, mx.int32) for ids in self.corpus.sequences]
        streams = [embed(checkpoint, sequences, self.dtype) for checkpoint in (source, output)]
        self._keep(0, Streams(*streams))

    def layer(self, index: int, source: Checkpoint, plan: Plan) -> Made:
        """The matrices of a layer that the plan quantizes, by path. Raises `CheckpointError`, and `NumericsError` where
        an activation is NaN or infinite."""
        streams = self._take(index)
        made = Layer(index, source, plan, self.dtype, streams).quantize()
        self._keep(index + 1, streams)
        self._file(index - 1).unlink(missing_ok=True)
        mx.clear_cache()
        return made

    def resume(self, index: int, output: Checkpoint) -> None:
        """An earlier run finished this layer: its states are in the work folder."""

    def head(self, source: Checkpoint, plan: Plan) -> Made:
        """`lm_head`, after all layers. Not called where the embedding is the head."""
        config = source.config
        spec = plan.get("lm_head")
        if spec is None:
            return {}
        streams = self._take(len(config.layers))
        norm = source.root().array("norm.weight", (config.hidden,))
        sums = Sums(f"{source.folder}: the output head")
        for pair in streams.pairs():
            sums.add(*(rms_norm(x, norm, config.norm_eps) for x in pair))
        weight = source.root().matrix("lm_head", config.vocab, config.hidden, None)
        return fit({"lm_head": weight}, {"lm_head": spec}, sums.moments(), source.compute_dtype)

    def _file(self, index: int) -> Path:
        """The states that go into layer `index`."""
        return self.work / f"states-{index}.safetensors"

    def _keep(self, index: int, streams: Streams) -> None:
        self._streams, self._index = streams, index
        arrays = {f"original.{i}": x for i, x in enumerate(streams.original)}
        arrays |= {f"quantized.{i}": x for i, x in enumerate(streams.quantized)}
        part = self.work / f"part-{self._file(index).name}"
        mx.save_safetensors(str(part), arrays)
        part.replace(self._file(index))

    def _take(self, index: int) -> Streams:
        """The states that go into a layer; they are changed by it, so that they are handed out once."""
        if self._streams is not None and self._index == index:
            streams, self._streams = self._streams, None
            return streams
        file = self._file(index)
        try:
            arrays = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{file}: the states of the interrupted calibration cannot be read ({error}); delete the result's "
                "folder and begin again"
            ) from None
        assert isinstance(arrays, dict)
        count = len(self.corpus.sequences)
        streams = Streams(
            *([arrays[f"{name}.{i}"] for i in range(count)] for name in ("original", "quantized"))
        )
        mx.eval(streams.original, streams.quantized)
        return streams
