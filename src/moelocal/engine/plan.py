"""How much memory a request takes, known before its prompt is read.

A plan adds up what must be there at the same time: the weights, for every row its recurrent state and its keys and
values (at the sizes to which their buffers grow), and the work of one step. Weights, state, keys and values are counted
exactly. Work is an upper bound, the arrays of one whole layer of one chunk, since what MLX has in flight reaches from
one operation into the next; tests/engine/test_plan.py holds it against MLX's own count of bytes on the CPU device.
On Metal it was not measured. There command buffers keep what they refer to until they are done, so that MLX may hold
more while it has room: it waits for them only above its own limit (`mx.set_memory_limit`).

Only tokens that come cost memory: a prompt that fits is never refused for the sake of a large `max_tokens`, which then
counts as far as memory reaches.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from moelocal import machine
from moelocal.cache.layers import capacity, group_of, kv_nbytes
from moelocal.config import AttentionSpec, DeltaNetSpec, DenseSpec, LayerSpec, ModelConfig, MoESpec
from moelocal.engine.chunks import STRIDE
from moelocal.errors import ContextOverflow, MemoryOverflow
from moelocal.formats import arrays_of
from moelocal.model import Decoder
from moelocal.ops import experts, linear
from moelocal.ops.attend import BLOCK, fused
from moelocal.ops.attend_packed import FEW
from moelocal.ops.cores import AHEAD
from moelocal.ops.host import MANY_ROWS
from moelocal.ops.op import on_cpu
from moelocal.units import parse_size, size

SHARE: Final = 0.9
"""Of the machine's memory, where MLX does not say how much the device should take. The rest is for other programs."""

SAMPLING: Final = 8
"""Float32 rows of the size of the vocabulary that choosing a token takes, the logits included."""

VARIABLE: Final = "MOELOCAL_MEMORY"


def memory_limit() -> int | None:
    """Bytes that a model may take with all that it works on; None if nothing says.

    `MOELOCAL_MEMORY` ("24GB", "512MiB", or bytes) if it is set; on Metal what the system recommends for the device
    (`max_recommended_working_set_size`); else nine tenths of the memory, on a CUDA device of its own.
    Raises `RequestError` if the variable is no size.
    """
    if own := os.environ.get(VARIABLE):
        return parse_size(own, VARIABLE)
    if not on_cpu():
        device = mx.device_info()
        if recommended := int(device.get("max_recommended_working_set_size", 0)):
            return recommended
        if total := int(device.get("total_memory", 0)):
            return int(total * SHARE)
    return int(machine.memory() * SHARE) or None


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes at the peak of a request: `weights`; `held`, what else stays in memory; of all rows `states` and `cache`
    (keys and values of `prompt_tokens` + `max_tokens` positions each); `work` of the largest step.

    `limit`: what is there, None if unknown. `largest_context`: the most positions of a row for which all fits, at most
    those of the model; 0 if not even one does. `max_tokens`: the tokens of an answer that memory and context leave, at
    most those asked for; below 1 if the prompt does not fit.
    """

    weights: int
    held: int
    states: int
    cache: int
    work: int
    prompt_tokens: int
    max_tokens: int
    rows: int
    limit: int | None
    largest_context: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weights + self.held + self.states + self.cache + self.work

    @property
    def fits(self) -> bool:
        """Whether the prompt and at least one token of an answer fit."""
        return self.max_tokens >= 1

    def check(self) -> Plan:
        """This plan. Raises `MemoryOverflow`, with the figure and the largest context that fits, if it does not fit."""
        if self.fits:
            return self
        assert self.limit is not None  # else everything fits
        rows = f" in each of {self.rows} rows" if self.rows > 1 else ""
        parts = {"weights": self.weights, "held": self.held, "state": self.states}
        parts |= {"keys and values": self.cache, "work": self.work}
        each = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in parts.items() if nbytes)
        largest = f"the largest context that fits{rows} has {self.largest_context} tokens"
        if not self.largest_context:
            largest = "not even one token fits"
        raise MemoryOverflow(
            f"a prompt of {self.prompt_tokens} tokens{rows} needs {size(self.nbytes)} ({each}), and {size(self.limit)} "
            f"are there; {largest}. Shorten the prompt, take a smaller quantization, or allow more with {VARIABLE}"
        )


def plan(
    config: ModelConfig,
    weights_nbytes: int,
    dtype: mx.Dtype,
    prompt_tokens: int,
    max_tokens: int,
    rows: int = 1,
    *,
    kv_bits: int | None = None,
    held: int = 0,
) -> Plan:
    """The plan of `rows` answers of up to `max_tokens` to prompts of `prompt_tokens`, activations in `dtype`, keys and
    values in `kv_bits` (None: in `dtype`).

    `held`: bytes that stay besides, as snapshots do. Raises `ContextOverflow` for a prompt that leaves no room in the
    model's context, `RequestError` for a bad `MOELOCAL_MEMORY`.
    """
    if prompt_tokens >= config.context:
        raise ContextOverflow(
            f"the prompt has {prompt_tokens} tokens, the context {config.context}; shorten it"
        )
    limit = memory_limit()
    shape = _Shape(config, dtype.size, rows, kv_bits)
    fixed = weights_nbytes + held + shape.states

    def fitting(prompt: int, total: int) -> bool:
        return limit is None or fixed + sum(shape.peak(prompt, total)) <= limit

    context = config.context
    largest = _largest(lambda tokens: fitting(tokens, tokens), context)
    answer = _largest(
        lambda tokens: fitting(prompt_tokens, prompt_tokens + tokens),
        min(max_tokens, context - prompt_tokens),
    )
    # of a request that does not fit, what its prompt and one token take
    keys, work = shape.peak(prompt_tokens, prompt_tokens + max(answer, 1))
    return Plan(
        weights=weights_nbytes,
        held=held,
        states=shape.states,
        cache=keys,
        work=work,
        prompt_tokens=prompt_tokens,
        max_tokens=answer,
        rows=rows,
        limit=limit,
        largest_context=largest,
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` that fits, where all below one that fits do too."""
    low, high = 0, max(most, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Shape:
    """The bytes that a model of `config` works with, for `rows` timelines and activations of `size` bytes, keys and
    values in `kv_bits`."""

    def __init__(self, config: ModelConfig, size: int, rows: int, kv_bits: int | None) -> None:
        self.config, self.size, self.rows, self.kv_bits = config, size, rows, kv_bits
        # stock operations, of which MLX's CPU device allocates up to a hundred ahead (float32 prompts take NumPy)
        self.ahead = on_cpu() and size < 4
        self.attention = [each.mixer for each in config.layers if isinstance(each.mixer, AttentionSpec)]
        self.deltas = [each.mixer for each in config.layers if isinstance(each.mixer, DeltaNetSpec)]

    @property
    def states(self) -> int:
        """The recurrent states of all rows, and those of one layer before a step."""
        each = [self._state(spec) for spec in self.deltas]
        return self.rows * (sum(each) + max(each, default=0))

    def _state(self, spec: DeltaNetSpec) -> int:
        conv = (spec.conv_width - 1) * spec.conv_channels * self.size
        return conv + 4 * spec.value_heads * spec.value_dim * spec.key_dim

    def keys(self, tokens: int) -> int:
        """Keys and values of one row, in buffers with room for `tokens` positions."""
        return capacity(tokens) * sum(kv_nbytes(spec, self.size, self.kv_bits) for spec in self.attention)

    def peak(self, prompt: int, total: int) -> tuple[int, int]:
        """Keys and values, and work, of the larger one: the last chunk of the last prompt, when the other rows have
        `total` positions; or the last token."""
        read = (
            (self.rows - 1) * self.keys(total) + self.keys(prompt),
            self.work(min(prompt, STRIDE), prompt, 1),
        )
        answered = self.rows * self.keys(total), self.work(1, total, self.rows)
        return max(read, answered, key=sum)

    def work(self, time: int, keys: int, rows: int) -> int:
        """A step of `time` positions in each of `rows` rows, the last of them at `keys`."""
        choosing = SAMPLING * 4 * self.config.vocab
        layers = self.config.layers
        asking = [time] * (len(layers) - 1) + [1]  # of the last layer one position is asked for
        return rows * choosing + max(
            rows * (time * self._layer(each) + self._beside(each.mixer, queries, keys))
            + self._unpacked(each, time)
            for each, queries in zip(layers, asking, strict=True)
        )

    def _beside(self, spec: AttentionSpec | DeltaNetSpec, time: int, keys: int) -> int:
        """What an attention layer works with beside the arrays of its positions."""
        if isinstance(spec, DeltaNetSpec):
            return 0
        # a buffer that grows, or is still read while it is written to, is there twice
        twice = capacity(keys) * kv_nbytes(spec, self.size, self.kv_bits)
        if self.kv_bits is not None and time > FEW:  # spelled out
            twice += keys * kv_nbytes(spec, self.size, None)
        elif self.kv_bits is not None:  # scales and biases in float32
            twice += capacity(keys) * 2 * spec.kv_heads * spec.head_dim // group_of(spec.head_dim) * 2 * 4
        if fused(spec.head_dim):
            return twice
        # scores before and after their softmax, and the mask
        queries, copies = (time, 1.25) if self.ahead else (min(time, BLOCK), 2)
        return twice + int(queries * keys * (copies * spec.heads * self.size + 1))

    def _layer(self, spec: LayerSpec) -> int:
        """The arrays of one position in one layer."""
        hidden = 6 * self.config.hidden * self.size
        return hidden + self._mixer(spec.mixer) + self._mlp(spec.mlp)

    def _unpacked(self, spec: LayerSpec, time: int) -> int:
        """What NumPy multiplies with on the CPU device, in float32, and what is unpacked ahead of it."""
        if not on_cpu() or self.size < 4 or time < MANY_ROWS:
            return 0
        hidden, mixer, mlp = self.config.hidden, spec.mixer, spec.mlp
        if isinstance(mixer, AttentionSpec):
            widest = mixer.heads * mixer.head_dim * (2 if mixer.gated else 1)
        else:
            widest = mixer.conv_channels + mixer.value_heads * mixer.value_dim
        widest = max(widest, 2 * (mlp.width if isinstance(mlp, DenseSpec) else mlp.shared_width))
        weights = min(hidden * widest, (1 + AHEAD) * linear.UNPACKED)
        if isinstance(mlp, MoESpec):
            each = 3 * hidden * mlp.width
            used = min(mlp.experts, time * mlp.per_token)
            weights = max(weights, each * min(used, 2 * max(1, experts.UNPACKED // each)))
        return 8 * weights  # with what is gathered to be unpacked; measured up to 6.4

    def _mixer(self, spec: AttentionSpec | DeltaNetSpec) -> int:
        size = self.size
        if isinstance(spec, AttentionSpec):
            q, k = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
            projected = (q * (2 if spec.gated else 1) + 2 * k) * size
            turned = 2 * 4 * (q + k) + 2 * 4 * k + (q + 2 * k) * size  # normed, rotated, rounded
            return projected + turned + 3 * q * size
        channels, values = spec.conv_channels, spec.value_heads * spec.value_dim
        projected = (channels + values + 2 * spec.value_heads) * size
        mixed = channels * (size + 4 * 4) + 2 * 4 * spec.key_heads * spec.key_dim
        if self.ahead:  # the window unfolded, and the state after each position
            mixed += 4 * channels * (spec.conv_width + 1) + 4 * values * spec.key_dim
        return projected + mixed + 4 * 4 * spec.value_heads + values * (4 * 4 + size)

    def _mlp(self, spec: MoESpec | DenseSpec) -> int:
        size, hidden = self.size, self.config.hidden
        if isinstance(spec, DenseSpec):
            return 5 * spec.width * size + 2 * hidden * size
        wide = max(size, 4) if on_cpu() else size  # there dense experts are float32
        each = 3 * hidden * wide + 4 * hidden + 5 * spec.width * wide  # rows, outputs, in order, float32
        shared = 5 * spec.shared_width * size + 2 * hidden * size
        return spec.per_token * each + shared + 4 * 4 * (spec.experts + 1) + 2 * 4 * hidden


def batch_nbytes(decoder: Decoder, rows: Sequence[tuple[int, int]]) -> int:
    """Bytes at the peak of a batch: for each row the tokens of its prompt and of prompt and answer together. The
    largest prompt is taken to be read while all other rows have all their tokens."""
    shape = _Shape(decoder.config, decoder.dtype.size, len(rows), decoder.kv_bits)
    longest = max(total for _, total in rows)
    work = [shape.work(1, longest, len(rows)), *(shape.work(min(p, STRIDE), p, 1) for p, _ in rows)]
    keys = sum(shape.keys(total) for _, total in rows)
    return weights_nbytes(decoder) + shape.states + keys + max(work)


def weights_nbytes(decoder: Decoder) -> int:
    """The bytes of all weights as they lie in memory."""
    arrays = [array for block in decoder.blocks for array in block.arrays]
    arrays += [decoder.norm, *arrays_of(decoder.embedding)]
    if decoder.head is not decoder.embedding:
        arrays += arrays_of(decoder.head)
    return sum(array.nbytes for array in arrays)
