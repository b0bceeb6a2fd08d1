"""The layer-streamed pass computes what `Decoder` computes, with one layer in memory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from moelocal.checkpoint.scope import Checkpoint
from moelocal.config import ModelConfig
from moelocal.errors import CheckpointError, NumericsError
from moelocal.model import Decoder
from moelocal.quantize.streamed import ROWS, block_of, embed, logits, stream
from packed import pack
from parity.checkpoints import SMALL, Recipe, tokens, write
from parity.storage import encode, read_tensors, write_tensors

FAMILIES = ("qwen3_5_moe", "qwen3_5", "qwen3_next", "qwen3_moe")


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, ModelConfig.read(folder))


def sequences(*lengths: int) -> list[mx.array]:
    return [mx.array(tokens(length, 96, seed), mx.int32) for seed, length in enumerate(lengths)]


def streamed(folder: Path, texts: list[mx.array], dtype: mx.Dtype) -> list[np.ndarray]:
    checkpoint = opened(folder)
    rows: list[list[np.ndarray]] = [[] for _ in texts]
    for number, first, chunk in logits(checkpoint, stream(checkpoint, texts, dtype), dtype):
        assert first == sum(map(len, rows[number])) and chunk.dtype == mx.float32
        rows[number].append(np.array(chunk))
    checkpoint.require_all_used()
    return [np.concatenate(parts) for parts in rows]


def whole(folder: Path, texts: list[mx.array], dtype: mx.Dtype) -> list[np.ndarray]:
    decoder = Decoder.open(folder, dtype)
    return [np.array(decoder(ids[None])[0]) for ids in texts]


def assert_equal(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert np.array_equal(mine, yours)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_decoder_bit_for_bit(tmp_path, family, dtype):
    folder = write(tmp_path / "model", Recipe(family, **SMALL))
    texts = sequences(40, 7, 1)
    assert_equal(streamed(folder, texts, dtype), whole(folder, texts, dtype))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_too(tmp_path, family, bits):
    folder = pack(write(tmp_path / "raw", Recipe(family, **SMALL)), tmp_path / "packed", bits)
    texts = sequences(40, 3)
    assert_equal(streamed(folder, texts, mx.float32), whole(folder, texts, mx.float32))


@pytest.mark.parametrize("packed", [False, True])
def test_a_tied_head_reads_the_embedding_again(tmp_path, packed):
    folder = write(tmp_path / "raw", Recipe("qwen3_5", **SMALL, tied=True))
    folder = pack(folder, tmp_path / "packed", 4) if packed else folder
    texts = sequences(20)
    assert_equal(streamed(folder, texts, mx.float32), whole(folder, texts, mx.float32))


def test_logits_in_several_chunks(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL))
    texts = sequences(2 * ROWS + 5)
    (ours,), (theirs,) = streamed(folder, texts, mx.float32), whole(folder, texts, mx.float32)
    # a product of 517 rows and three of at most 256 add up in other orders: 1e-6 seen at logits of up to 7
    assert np.abs(ours - theirs).max() < 1e-5


def test_reports_count_sequences_through_layers_and_after_sees_every_layer(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL))
    reported: list[tuple[int, int]] = []
    seen: list[tuple[int, list[np.ndarray]]] = []
    states = stream(
        opened(folder),
        sequences(5, 9),
        mx.float32,
        lambda *at: reported.append(at),
        lambda index, states: seen.append((index, [np.array(x) for x in states])),
    )
    assert reported == [(done, 8) for done in range(1, 9)]
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert [x.shape for x in seen[0][1]] == [(1, 5, 32), (1, 9, 32)]
    assert_equal(seen[3][1], [np.array(x) for x in states])


def test_embedding_rows_of_packed_tables_are_those_of_the_decoder(tmp_path):
    folder = pack(write(tmp_path / "raw", Recipe("qwen3_moe", **SMALL)), tmp_path / "packed", 4)
    (ids,) = sequences(30)
    for dtype in (mx.float32, mx.bfloat16):
        (rows,) = embed(opened(folder), [ids], dtype)
        assert rows.dtype == dtype
        assert mx.array_equal(rows, Decoder.open(folder, dtype).embed(ids[None]))


@pytest.mark.parametrize(
    "stored, dtype", [("F32", mx.float32), ("BF16", mx.bfloat16), ("BF16", mx.float32), ("packed", mx.float32)],
    ids=str,
)  # fmt: skip
def test_memory_holds_at_most_two_layers(tmp_path, stored, dtype):
    # ten layers whose experts are most of the weights, so that activations are small against one of them
    recipe = Recipe("qwen3_5_moe", layers=10, hidden=64, vocab=96, experts=64, mtp=False,
                    width=160 if stored == "packed" else 64, dtype="BF16" if stored == "BF16" else "F32")  # fmt: skip
    folder = write(tmp_path / "raw", recipe)
    folder = pack(folder, tmp_path / "packed", 4) if stored == "packed" else folder
    texts = sequences(24, 24)
    layer = sum(array.nbytes for array in block_of(opened(folder), 0, dtype).arrays)

    def peak(run) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run(folder, texts, dtype)
        return mx.get_peak_memory() - before

    assert peak(streamed) < 2 * layer
    assert peak(whole) > 9 * layer  # the control: this is how a whole model is seen


def test_a_layer_is_freed_with_its_block(tmp_path):
    checkpoint = opened(write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL)))
    before = mx.get_active_memory()
    block = block_of(checkpoint, 1, mx.float32)
    held = sum(array.nbytes for array in block.arrays)
    assert mx.get_active_memory() - before >= held
    del block
    assert mx.get_active_memory() - before < held / 10


def damaged(folder: Path, name: str, value: float) -> Path:
    """The folder with one element of a tensor replaced."""
    file = folder / "model.safetensors"
    stored = read_tensors([file])
    kind, shape, data = stored[name]
    written = encode(np.array([value], np.float32), kind)[2] + data[len(encode(np.zeros(1), kind)[2]) :]
    write_tensors(file, stored | {name: (kind, shape, written)})
    return folder


def test_nan_is_named_with_layer_and_sequence(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL), shards=1)
    damaged(folder, "model.language_model.layers.2.mlp.shared_expert.down_proj.weight", float("nan"))
    with pytest.raises(NumericsError) as caught:
        stream(opened(folder), sequences(5, 6), mx.float32)
    assert str(caught.value) == (
        f"{folder}: layer 2: NaN or infinite values in sequence 0: its weights are damaged, or too large for a "
        "computation in float32"
    )


def test_nan_of_one_token_is_named_with_the_sequence_that_has_it(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL), shards=1)
    damaged(folder, "model.language_model.embed_tokens.weight", float("inf"))  # of token 0
    texts = [*sequences(5, 6), mx.array([20, 0, 21], mx.int32)]
    with pytest.raises(NumericsError) as caught:
        stream(opened(folder), texts, mx.bfloat16)
    assert str(caught.value) == (
        f"{folder}: layer 0: NaN or infinite values in sequence 2: its weights are damaged, or too large for a "
        "computation in bfloat16"
    )


def test_nan_of_the_head_is_named(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL), shards=1)
    damaged(folder, "lm_head.weight", float("nan"))
    with pytest.raises(NumericsError) as caught:
        streamed(folder, sequences(5), mx.float32)
    assert str(caught.value) == (
        f"{folder}: the output head: NaN or infinite values in sequence 0: its weights are damaged, or too large for "
        "a computation in float32"
    )


def test_a_missing_tensor_is_our_error(tmp_path):
    folder = write(tmp_path / "model", Recipe("qwen3_5_moe", **SMALL), shards=1)
    name = "model.language_model.layers.3.self_attn.o_proj.weight"
    stored = read_tensors([folder / "model.safetensors"])
    del stored[name]
    write_tensors(folder / "model.safetensors", stored)
    with pytest.raises(CheckpointError, match=r"tensor layers\.3\.self_attn\.o_proj\.weight is missing"):
        stream(opened(folder), sequences(5), mx.float32)
