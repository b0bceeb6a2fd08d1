"""Output files: any layout, any order of pieces, nothing to see before the end, one place per tensor."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelocal.checkpoint.files import read_entries, weight_files
from moelocal.checkpoint.writing import Output, Tensor, files_of, write_json
from moelocal.errors import CheckpointError

DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint8)
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=9).map(
    lambda found: [Tensor(f"tensor.{i}", dtype, shape) for i, (dtype, shape) in enumerate(found)]
)


def filled(tensor: Tensor, seed: int) -> mx.array:
    """Any bytes, those of NaN too."""
    raw = np.random.RandomState(seed).randint(0, 256, tensor.nbytes).astype(np.uint8)
    return mx.array(raw).view(tensor.dtype).reshape(tensor.shape)


def bits(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def new(folder: Path) -> tuple[Path, Path]:
    work = folder / ".work"
    work.mkdir(parents=True)
    return folder, work


@settings(max_examples=60)
@given(tensors=TENSORS, most=st.integers(1, 400), data=st.data())
def test_pieces_in_any_order_and_interrupted_anywhere_make_the_same_checkpoint(
    tmp_path_factory, tensors, most, data
):
    folder, work = new(tmp_path_factory.mktemp("out"))
    arrays = {tensor.name: filled(tensor, i) for i, tensor in enumerate(tensors)}
    pieces = [(t.name, i) for t in tensors for i in range(t.shape[0])]
    order = data.draw(st.permutations(pieces))
    stop = data.draw(st.integers(0, len(order)))
    output = Output(folder, work, tensors, most)
    output.prepare()
    for name, i in order[:stop]:
        output.write(name, i, arrays[name][i : i + 1])
    output.close()  # what a process leaves that ends here
    assert [path.name for path in folder.iterdir()] == [".work"]
    output = Output(folder, work, tensors, most)
    output.prepare()
    for name, i in order[stop:]:
        output.write(name, i, arrays[name][i : i + 1])
    output.publish()

    assert list(work.iterdir()) == []
    entries = read_entries(folder)
    assert set(entries) == set(arrays)
    files = weight_files(folder)
    assert sum(file.stat().st_size for file in files) == output.nbytes
    for file in files:
        inside = [entry for entry in entries.values() if entry.file == file]
        assert sum(entry.nbytes for entry in inside) <= most or len(inside) == 1
        loaded = mx.load(str(file))
        assert set(loaded) == {entry.name for entry in inside}
        for entry in inside:
            expected = arrays[entry.name]
            assert bits(loaded[entry.name]) == bits(expected)
            assert loaded[entry.name].dtype == expected.dtype and entry.shape == expected.shape
            assert entry.offset % expected.dtype.size == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in arrays.values())}


def test_many_files_are_numbered_and_one_is_not():
    tensors = [Tensor(name, mx.uint8, (10,)) for name in "abc"]
    assert [file.name for file in files_of(tensors, 30)] == ["model.safetensors"]
    assert [(file.name, list(file.offsets)) for file in files_of(tensors, 20)] == [
        ("model-00001-of-00002.safetensors", ["a", "b"]),
        ("model-00002-of-00002.safetensors", ["c"]),
    ]


def test_an_unwritten_file_takes_no_space_and_is_missed(tmp_path):
    folder, work = new(tmp_path / "out")
    output = Output(folder, work, [Tensor("a", mx.uint8, (1 << 26,))])
    assert output.missing == output.nbytes
    output.prepare()
    assert (work / "model.safetensors").stat().st_size == output.nbytes
    assert output.nbytes - output.missing <= 1 << 16
    output.write("a", 0, mx.ones((1 << 25,), mx.uint8))
    output.sync()
    assert (1 << 25) - (1 << 16) <= output.missing <= 1 << 25
    output.close()


def test_the_digest_is_that_of_the_layout(tmp_path):
    tensors = [Tensor("a", mx.uint8, (4,)), Tensor("b", mx.float16, (4,))]
    digests = {
        Output(tmp_path, tmp_path, changed, most).digest
        for changed in (tensors, tensors[::-1], tensors[:1], [Tensor("a", mx.uint8, (2, 2)), tensors[1]])
        for most in (1, 100)
    }
    # the order of two tensors in one file is that of their sizes; one tensor makes one file
    assert len(digests) == 8 - 2


def test_the_checksum_is_of_the_bytes_that_are_there(tmp_path):
    folder, work = new(tmp_path / "out")
    output = Output(folder, work, [Tensor("a", mx.float16, (4, 3)), Tensor("b", mx.uint8, (2,))])
    output.prepare()
    rows = filled(Tensor("", mx.float16, (2, 3)), 1)
    checksum = output.write("b", 0, mx.array([1, 2], mx.uint8), output.write("a", 1, rows))
    assert output.checksum("b", 0, 2, output.checksum("a", 1, 3)) == checksum
    assert output.checksum("b", 0, 2, output.checksum("a", 0, 2)) != checksum
    output.close()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the disk. What was written is kept: free some space and run the same "
                       "command again"),
        (errno.EDQUOT, "no space left on the disk. What was written is kept: free some space and run the same "
                       "command again"),
        (errno.EIO, "cannot be written: Input/output error"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_our_error(tmp_path, monkeypatch, number, message):
    folder, work = new(tmp_path / "out")
    output = Output(folder, work, [Tensor("a", mx.uint8, (4,))])
    output.prepare()

    def refuse(fd: int, data: bytes, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(CheckpointError) as caught:
        output.write("a", 0, mx.zeros((4,), mx.uint8))
    assert str(caught.value) == f"{work / 'model.safetensors'}: {message}"
    output.close()


def test_json_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"name": "Qwen3.6 – 35B"})
    before = path.read_bytes()
    assert json.loads(before) == {"name": "Qwen3.6 – 35B"}

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError):
        write_json(path, {})
    assert path.read_bytes() == before
